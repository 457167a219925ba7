r"""Pretrains `gve-mini-base` from random weights to caption the rendered world, as Qwen2.5-VL was before it became
GVE.

```bash
ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 accelerate launch --multi_gpu --num_processes 2 \
    training/pretrain_base.py --output_dir build/gve-mini-base
```

Next-token loss on captions, and beside it dense grounding of the visual tokens (`grounding.py`). One sample is a
dialogue about one film or picture: up to three captions in different styles, so that the vision tower is paid for
once; or, without pictures, one text rewritten in another style. Foundations come first: single things at rest, then
events, then several scenes. Captions leave the camera, motions and textures unread; in the middle of the training half
of the batches are therefore frame pairs for the vision tower alone. Not in the paper: all of it (its base came
pretrained).
"""

import json
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as tvf
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from torch import nn
from tqdm import tqdm
from transformers import Qwen2_5_VLForConditionalGeneration
from trl import TrlParser

from dataset_builders.mini.render import frame_times, processes, render_frame
from dataset_builders.mini.texts import describe
from dataset_builders.mini.world import FPS, Film, draw_scene, generator
from modeling_gve.layers_gve import batch_equal_windows
from training.base_model import FRAME_SIDE, build_config, build_processor, build_tokenizer
from training.grounding import GRID, GroundingHead, cover, targets


NUM_FRAMES = 8
SYSTEM = "You are a helpful assistant."
PROMPTS = {
    "coarse": "Describe briefly.",
    "general": "Describe in general.",
    "spatial": "Describe the places.",
    "object": "Describe the objects.",
    "temporal": "Describe the motion.",
    "camera": "Describe the camera.",
    "event": "Describe one event.",
    "theme": "Describe the theme.",
    "keywords": "List keywords.",
    "detailed": "Describe in detail.",
    "paragraph": "Describe the scenes.",
    "long": "Describe all at length.",
}
# Styles that say different things, so that a later caption can not be copied from an earlier one.
TRIPLES = (
    ("temporal", "spatial", "theme"),
    ("event", "object", "camera"),
    ("keywords", "spatial", "temporal"),
    ("coarse", "object", "camera"),
    ("general", "spatial", "event"),
    ("detailed",),
)
# Text to text: the style that is asked for, by the style that is given.
HELD = {"coarse": "event", "general": "coarse", "detailed": None, "temporal": "event", "spatial": "object"}
KINDS = ("first", "scene", "story", "long")


@dataclass
class PretrainingArguments:
    output_dir: str = field(default="build/gve-mini-base", metadata={"help": "Where the model goes."})
    steps: int = field(default=4600, metadata={"help": "The learning rate is zero by the last."})
    films: int = field(default=30000, metadata={"help": "Distinct rendered films, kept as frames in memory."})
    batch_size: int = field(default=16, metadata={"help": "Dialogues a step and process."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak, after the warm-up."})
    warmup_steps: int = 100
    decay_ratio: float = field(default=0.25, metadata={"help": "Share of the steps over which the rate falls."})
    grounding_weight: float = field(default=0.3, metadata={"help": "Of the dense loss, beside 1 for captions."})
    save_steps: int = field(default=200, metadata={"help": "Steps from checkpoint to checkpoint."})
    seed: int = 42
    cache_dir: str = field(default="build/cache/pretraining", metadata={"help": "Rendered frames, reused."})


def draw_film(i, seed):
    """The `i`-th training film: `(kind, Film)`."""
    rng = generator("pretraining", seed, i)
    kind = KINDS[int(rng.choice(4, p=[0.12, 0.68, 0.12, 0.08]))]
    if kind == "first":  # one or two things at rest
        return kind, Film((draw_scene(rng, False, (1, 2), (0, 1), camera=0.2),))
    if kind == "scene":
        return kind, Film((draw_scene(rng, False, (1, 3), (0, 2), camera=0.5, two_moves=rng.random() < 0.4),))
    n = int(rng.integers(2, 4) if kind == "story" else rng.integers(6, 11))
    return kind, Film(tuple(draw_scene(rng, False, (1, 2), (1, 2), camera=0.2) for _ in range(n)))


def sample_frames(film):
    """Eight uniform frames as the model sees them, `(8, 3, 56, 56)` uint8, and what their tokens show, `(8, 16)`."""
    times = frame_times(film)
    times = [times[i] for i in np.round(np.linspace(0, len(times) - 1, NUM_FRAMES)).astype(int)]
    frames = torch.from_numpy(np.stack([render_frame(*time) for time in times])).permute(0, 3, 1, 2)
    frames = tvf.resize(frames, [FRAME_SIDE, FRAME_SIDE], interpolation=tvf.InterpolationMode.BICUBIC, antialias=True)
    return frames.numpy(), np.stack([cover(*time) for time in times])


def _render_range(bounds):
    torch.set_num_threads(1)
    seed, start, stop = bounds
    return [np.stack(parts) for parts in zip(*(sample_frames(draw_film(i, seed)[1]) for i in range(start, stop)))]


def rendered_frames(arguments):
    """All films' frames `(films, 8, 3, 56, 56)` and covers `(films, 8, 16)`, rendered once and kept on disk."""
    name = f"{arguments.seed}-{arguments.films}.npy"
    paths = [Path(arguments.cache_dir) / f"{kind}-{name}" for kind in ("frames", "covers")]
    if not all(path.exists() for path in paths):
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        step = 100
        jobs = [(arguments.seed, i, min(i + step, arguments.films)) for i in range(0, arguments.films, step)]
        with ProcessPoolExecutor(processes()) as pool:
            parts = list(tqdm(pool.map(_render_range, jobs), total=len(jobs), desc="rendering", unit="x100"))
        for path, arrays in zip(paths, zip(*parts)):
            temporary = path.with_suffix(".tmp.npy")
            np.save(temporary, np.concatenate(arrays))
            os.replace(temporary, path)
    return [np.load(path, mmap_mode="r") for path in paths]


def told(film):
    """The style itself, but the motion in place of an event where a film has no event."""
    return lambda style: "temporal" if style == "event" and not film.scenes[0].events else style


class Dialogues:
    """Turns films into token ids, labels and patches."""

    def __init__(self, arguments, processor, frames, covers):
        self.arguments, self.processor, self.frames, self.covers = arguments, processor, frames, covers
        self.tokenizer = processor.tokenizer
        self.video_id = self.tokenizer.convert_tokens_to_ids("<|video_pad|>")
        self.image_id = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.kinds = np.array(
            [KINDS.index(draw_film(i, arguments.seed)[0]) for i in tqdm(range(len(frames)), desc="graphs")]
        )
        self.by_kind = [np.flatnonzero(self.kinds == k) for k in range(len(KINDS))]

    def ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def mixture(self, step):
        """Shares of (first, scene, story, long, text only, frame pairs) at a step."""
        done = step / self.arguments.steps
        if done < 0.0869:
            return 0.7, 0.3, 0.0, 0.0, 0.0, 0.0
        shares = np.array([0.08, 0.6, 0.12, 0.08, 0.12, 0.0])
        return 0.5 * shares + [0, 0, 0, 0, 0, 0.5] if 0.3913 <= done < 0.75 else shares

    def frame_pairs(self, rng, size):
        """A batch for the vision tower alone: two neighbouring frames each, and what their tokens show."""
        batch = []
        for i, k in zip(rng.choice(np.concatenate(self.by_kind[:2]), size), rng.integers(NUM_FRAMES // 2, size=size)):
            scene = draw_film(int(i), self.arguments.seed)[1].scenes[0]
            dense = [part.reshape(NUM_FRAMES // 2, GRID**2, -1)[k] for part in targets(scene, self.covers[i], False)]
            batch.append((torch.from_numpy(np.array(self.frames[i, 2 * k : 2 * k + 2])), *dense))
        videos, shown, whole = zip(*batch)
        inputs = self.processor.video_processor(videos=list(videos), do_sample_frames=False, return_tensors="pt")
        return {
            **inputs,
            "shown": torch.from_numpy(np.concatenate(shown)),
            "whole": torch.from_numpy(np.concatenate(whole)),
        }

    def sample(self, rng, kind, triple):
        """One dialogue: `(ids, labels, frames or None, seconds between frames, "video" | "image" | None, targets)`."""
        medium = None
        if kind < 4:
            i = int(rng.choice(self.by_kind[kind]))
            medium = "image" if kind == 0 or (kind == 1 and rng.random() < 0.12) else "video"
        else:
            i = int(rng.choice(self.by_kind[1]))
        film = draw_film(i, self.arguments.seed)[1]
        ids = self.ids(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n")
        labels = [-100] * len(ids)
        if medium:
            tokens = [self.image_id] * 16 if medium == "image" else [self.video_id] * 64
            ids += self.ids("<|vision_start|>") + tokens + self.ids("<|vision_end|>")
            labels = [-100] * len(ids)
        for turn, (asked, answer) in enumerate(self.turns(rng, film, kind, medium, triple)):
            head = self.ids(
                ("" if turn == 0 else "\n<|im_start|>user\n") + f"{asked}<|im_end|>\n<|im_start|>assistant\n"
            )
            tail = self.ids(f"{answer}<|im_end|>")
            ids += head + tail
            labels += [-100] * len(head) + tail
        frames = None if medium is None else self.frames[i][:1] if medium == "image" else self.frames[i]
        dense = (
            targets(film.scenes[0], self.covers[i], medium == "image") if medium and len(film.scenes) == 1 else None
        )
        return ids, labels, frames, (film.frames - 1) / (NUM_FRAMES - 1) / FPS, medium, dense

    def turns(self, rng, film, kind, medium, triple):
        """Questions and answers of a dialogue: `[(prompt, caption)]`."""
        if kind == len(KINDS):
            return [self.rewriting(rng, film)]
        if medium == "image":
            styles = ("spatial", "object")
        else:
            styles = {"story": ("paragraph",), "long": ("long",)}.get(KINDS[kind], triple)
        styles = [styles[i] for i in rng.permutation(len(styles))]
        return [(PROMPTS[style], describe(rng, film, style).text) for style in map(told(film), styles)]

    def rewriting(self, rng, film):
        """One text in a style whose facts it holds; the detailed one holds all."""
        source, other = map(str, rng.choice(list(HELD), 2, replace=False))
        style = told(film)(HELD[source] or other)
        asked = f"{describe(rng, film, source).text} {PROMPTS[style]}"
        return asked, describe(rng, film, style).text

    def batch(self, step, rank):
        rng = generator("batch", self.arguments.seed, step)  # the same kind on all ranks
        # One kind a batch: mixed lengths would be mostly padding.
        kind = int(rng.choice(len(KINDS) + 2, p=self.mixture(step)))
        size = self.arguments.batch_size // (2 if kind == KINDS.index("long") else 1)
        triple = TRIPLES[int(rng.integers(len(TRIPLES)))]
        rng = generator("batch", self.arguments.seed, step, rank)
        if kind > len(KINDS):
            return self.frame_pairs(rng, 4 * size)
        rows = [self.sample(rng, kind, triple) for _ in range(size)]
        length = max(len(row[0]) for row in rows)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([row[0] + [pad] * (length - len(row[0])) for row in rows])
        inputs = {
            "input_ids": ids,
            "labels": torch.tensor([row[1] + [-100] * (length - len(row[1])) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row[0]) + [0] * (length - len(row[0])) for row in rows]),
            "mm_token_type_ids": (ids == self.image_id).int() + 2 * (ids == self.video_id).int(),
        }
        videos = [torch.from_numpy(np.array(row[2])) for row in rows if row[4] == "video"]
        images = [torch.from_numpy(np.array(row[2][0])) for row in rows if row[4] == "image"]
        if videos:
            inputs |= self.processor.video_processor(videos=videos, do_sample_frames=False, return_tensors="pt")
            inputs["second_per_grid_ts"] = torch.tensor([2 * row[3] for row in rows if row[4] == "video"])
        if images:
            inputs |= self.processor.image_processor(images=images, return_tensors="pt")
        # The model sees pictures before videos; so do the targets.
        dense = [row[5] for medium in ("image", "video") for row in rows if row[4] == medium and row[5] is not None]
        if dense:
            inputs["shown"], inputs["whole"] = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*dense))
        return inputs


class GroundedCaptioner(nn.Module):
    """The captioner and the head that reads its visual tokens."""

    def __init__(self, captioner, weight):
        super().__init__()
        self.captioner, self.weight = captioner, weight
        self.head = GroundingHead(captioner.config.vision_config.out_hidden_size)
        self.tokens = []
        captioner.model.visual.register_forward_hook(lambda *call: self.tokens.append(call[-1].pooler_output))

    def forward(self, shown=None, whole=None, **inputs):
        """Both losses' weighted sum, the captions' loss or None, and the grounding's or None."""
        self.tokens.clear()
        if "input_ids" not in inputs:
            self.captioner.model.visual(inputs["pixel_values_videos"], grid_thw=inputs["video_grid_thw"])
            grounding = self.head(torch.cat(self.tokens), shown, whole)
            return self.weight * grounding, None, grounding
        captions = self.captioner(**inputs, use_cache=False).loss
        if shown is None:
            return captions, captions, None
        grounding = self.head(torch.cat(self.tokens), shown, whole)
        return captions + self.weight * grounding, captions, grounding


def learning_rate_factor(step, arguments):
    """Linear warm-up, constant, linear fall to zero."""
    left = (arguments.steps - step) / (arguments.decay_ratio * arguments.steps)
    return min(1.0, (step + 1) / arguments.warmup_steps, left)


def save(model, processor, folder, record):
    """Writes the folder whole: bf16 safetensors, processor, the record of the run."""
    temporary = Path(f"{folder}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    model.save_pretrained(temporary, state_dict=state)
    processor.save_pretrained(temporary)
    (temporary / "pretraining_run.json").write_text(json.dumps(record, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def main(arguments):
    # A batch of text does not touch the vision tower: its parameters are unused then.
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    set_seed(arguments.seed)
    with accelerator.main_process_first():
        frames, covers = rendered_frames(arguments)
    tokenizer = build_tokenizer([SYSTEM, *PROMPTS.values()] + ["user\n", "assistant\n", "system\n"])
    processor = build_processor(tokenizer)
    model = GroundedCaptioner(Qwen2_5_VLForConditionalGeneration(build_config(tokenizer)), arguments.grounding_weight)
    batch_equal_windows(model.captioner.model.visual)
    dialogues = Dialogues(arguments, processor, frames, covers)
    optimizer = torch.optim.AdamW(
        model.parameters(), arguments.learning_rate, weight_decay=0.05, betas=(0.9, 0.98), fused=True
    )
    model.train()
    checkpoint = Path(f"{arguments.output_dir}.checkpoint.pt")
    step, history, smooth = 0, [], {"captions": None, "grounding": None}
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, smooth, history = state["step"], state["smooth"], state["history"]
    prepared = accelerator.prepare_model(model)
    bar = tqdm(total=arguments.steps, initial=step, desc="captioning", disable=not accelerator.is_main_process)
    while step < arguments.steps:
        batch = dialogues.batch(step, accelerator.process_index)
        loss, *parts = prepared(**batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = arguments.learning_rate * learning_rate_factor(step, arguments)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for name, part in zip(smooth, parts):
            if part is not None:
                smooth[name] = part.item() if smooth[name] is None else 0.98 * smooth[name] + 0.02 * part.item()
        step += 1
        bar.update()
        bar.set_postfix({name: f"{value:.4f}" for name, value in smooth.items() if value is not None})
        if step % 50 == 0:
            history.append({"step": step} | {name: round(value, 4) for name, value in smooth.items() if value})
        if step % arguments.save_steps == 0 and accelerator.is_main_process:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "smooth": smooth,
                "history": history,
            }
            torch.save(state, f"{checkpoint}.tmp")
            os.replace(f"{checkpoint}.tmp", checkpoint)
    record = {"arguments": {k: v for k, v in vars(arguments).items() if "dir" not in k}, "history": history}
    if accelerator.is_main_process:
        save(model.captioner, processor, arguments.output_dir, record)
        checkpoint.unlink(missing_ok=True)
    accelerator.end_training()


if __name__ == "__main__":
    main(TrlParser([PretrainingArguments]).parse_args_and_config()[0])
