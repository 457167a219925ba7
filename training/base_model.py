"""The parts of `gve-mini-base` before any training: a Qwen2.5-VL of 1.7M parameters, its tokenizer and its processors.

Not in the paper: all sizes. GVE starts from Qwen2.5-VL-3B/7B; this model is what two cores can pretrain from nothing.
Patches of 7 pixels keep motion visible: 8 frames of 56 x 56 give 4 x 4 tokens for each pair of frames, 64 for a video.
"""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from dataset_builders.mini.texts import STYLES_OF_TEXT, describe
from dataset_builders.mini.world import Film, draw_scene, generator


FRAME_SIDE = 56  # pixels
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(prompts=(), vocab_size=768, n_scenes=4000):
    """Byte-level BPE trained on texts of training scenes; any string can be encoded.

    Args:
        prompts (`Sequence[str]`): instructions and prompts that should cost few tokens too.
        vocab_size (`int`): without the special tokens.
        n_scenes (`int`): scenes whose texts the merges are learned from.

    Returns:
        `Qwen2Tokenizer`: with Qwen's special tokens and a chat template.
    """
    texts = list(prompts) * 200
    for i in range(n_scenes):
        rng = generator("tokenizer", i)
        film = Film((draw_scene(rng, test=False, camera=0.5, two_moves=i % 2 == 0),))
        texts += [describe(rng, film, style).text for style in STYLES_OF_TEXT]
    return train_tokenizer(texts, vocab_size)


def train_tokenizer(texts, vocab_size):
    """Byte-level BPE with Qwen's special tokens, which follow the `vocab_size` learned ones."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        chat_template=CHAT_TEMPLATE,
        model_max_length=8192,
    )


def build_processor(tokenizer):
    """Qwen2.5-VL's processor, with frames of 56 x 56."""
    pixels = {"shortest_edge": 14 * 14, "longest_edge": FRAME_SIDE * FRAME_SIDE}
    shape = {"patch_size": 7, "temporal_patch_size": 2, "merge_size": 2}
    video_pixels = {"shortest_edge": 14 * 14, "longest_edge": 8 * FRAME_SIDE * FRAME_SIDE}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels, **shape),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=video_pixels, **shape),
        chat_template=CHAT_TEMPLATE,
    )


def build_config(tokenizer):
    """Qwen2.5-VL at 1.7M parameters, its head tied to the token embeddings."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "tie_word_embeddings": True,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "use_sliding_window": False,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_heads": 4,
            "out_hidden_size": 128,
            "patch_size": 7,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "window_size": FRAME_SIDE,
            "fullatt_block_indexes": [0, 1, 2, 3],
            "tokens_per_second": 2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    return config
