"""What a captioner of the rendered world reads from unseen films, kind of word by kind of word.

```bash
python -m training.caption_accuracy training/gve-mini-base
```

Each word that states a fact of the graph is predicted from the film and the caption up to that word (teacher forcing);
the share that is right is printed beside the share of the commonest answer. Scenes are the benchmark's, which no
training has seen.
"""

import argparse
from collections import Counter

import torch
from tqdm import tqdm
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from dataset_builders.mini.texts import describe
from dataset_builders.mini.world import (
    COLOURS,
    FPS,
    SHAPES,
    SIZES,
    STYLES,
    TEXTURES,
    THEMES,
    Film,
    draw_scene,
    generator,
)
from training.pretrain_base import NUM_FRAMES, PROMPTS, SYSTEM, sample_frames


# In which caption a kind of word is read, and the words of that kind.
KINDS = {
    "theme": ("theme", THEMES),
    "style": ("theme", STYLES),
    "colour": ("object", tuple(COLOURS)),
    "shape": ("object", (*SHAPES, *(f"{shape}s" for shape in SHAPES), "crosses")),
    "texture": ("object", TEXTURES),
    "size": ("object", SIZES),
    "count": ("object", ("a", "an", "two", "three")),
    "row": ("spatial", ("top", "middle", "bottom")),
    "column": ("spatial", ("left", "right", "center")),
    "action": (
        "event",
        ("left", "right", "up", "down", "grows", "shrinks", "clockwise", "counterclockwise", "grow", "shrink", "hits"),
    ),
    "camera": (
        "camera",
        ("still", "left", "right", "up", "down", "in", "out", "clockwise", "counterclockwise"),
    ),
}


def spans(text, words):
    """Character spans of the given words, the camera's sentence on its object left out."""
    place = 0
    for word in text.split(" "):
        bare = word.strip(".,")
        if bare in words:
            yield place, place + len(bare)
        place += len(word) + 1


@torch.inference_mode()
def accuracy(model, processor, n_films=200, seed=0):
    """`{kind: (share right, share of the commonest word, words)}` over `n_films` unseen films of one scene each."""
    tokenizer = processor.tokenizer
    right, truth = Counter(), {kind: Counter() for kind in KINDS}
    for i in tqdm(range(n_films), desc="films"):
        rng = generator("caption accuracy", seed, i)
        film = Film((draw_scene(rng, True, camera=0.5),))
        videos = processor.video_processor(
            videos=[torch.from_numpy(sample_frames(film)[0])], do_sample_frames=False, return_tensors="pt"
        )
        videos["second_per_grid_ts"] = torch.tensor([2 * (film.frames - 1) / (NUM_FRAMES - 1) / FPS])
        tokens = int(videos["video_grid_thw"].prod()) // processor.video_processor.merge_size**2
        for style in dict.fromkeys(style for style, _ in KINDS.values()):
            caption = describe(rng, film, style).text
            head = (
                f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n<|vision_start|>{'<|video_pad|>' * tokens}"
                f"<|vision_end|>{PROMPTS[style]}<|im_end|>\n<|im_start|>assistant\n"
            )
            encoded = tokenizer(head + caption, return_tensors="pt", return_offsets_mapping=True)
            offsets = (encoded.pop("offset_mapping")[0] - len(head)).tolist()
            is_video = encoded["input_ids"] == tokenizer.convert_tokens_to_ids("<|video_pad|>")
            guess = model(**encoded, mm_token_type_ids=2 * is_video.int(), **videos).logits[0].argmax(-1)
            ids = encoded["input_ids"][0]
            for kind, (asked, words) in KINDS.items():
                for start, end in spans(caption, words) if asked == style else ():
                    # The word's tokens, with the space before it.
                    at = [k for k, (a, b) in enumerate(offsets) if b > start and a < end and b > 0]
                    right[kind] += all(guess[k - 1] == ids[k] for k in at)
                    truth[kind][caption[start:end]] += 1
    return {
        kind: (right[kind] / counts.total(), max(counts.values()) / counts.total(), counts.total())
        for kind, counts in truth.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--films", type=int, default=200)
    arguments = parser.parse_args()
    processor = Qwen2_5_VLProcessor.from_pretrained(arguments.model)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32).eval()
    print("| kind of word | right | commonest word | words |\n|---|---|---|---|")
    for kind, (right, common, words) in accuracy(model, processor, arguments.films).items():
        print(f"| {kind} | {right:.3f} | {common:.3f} | {words} |")


if __name__ == "__main__":
    main()
