# Copyright 2026 The GVE project. Licensed under the Apache License, Version 2.0.
"""Turning texts, images and videos into the inputs of GVE.

An input is one chat turn: the instruction as system text, then image, video and text of the user, the opening of the
assistant's answer, and an end-of-text token, whose last hidden state becomes the embedding. Qwen2.5-VL gets the times
of frames through `second_per_grid_ts`, Qwen3-VL as a text before each temporal patch.
"""

import json
import logging
from dataclasses import dataclass

import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    BatchFeature,
    PretrainedConfig,
    ProcessorMixin,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD

from .configuration_gve import DEFAULT_INSTRUCTION, GVEConfig, check_limits
from .video_gve import DEFAULT_LIMITS, MediaLimits, load_image, load_video, mean_spacing


MAX_ASPECT_RATIO = 200  # of transformers' resizing
ITEM_KEYS = ("text", "image", "video", "instruction", "fps", "times")
# The chat turn above as a template, for tools that render one. It ends in the pooled token, whatever was asked for.
CHAT_TEMPLATE = """
{%- set chat = namespace(system=INSTRUCTION, image="", video="", text="") -%}
{%- for message in messages -%}
    {%- if message.role == "system" -%}
        {%- set chat.system = message.content if message.content is string else message.content[0].text -%}
    {%- elif message.content is string -%}
        {%- set chat.text = chat.text ~ message.content -%}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == "image" -%}
                {%- set chat.image = chat.image ~ "<|vision_start|><|image_pad|><|vision_end|>" -%}
            {%- elif part.type == "video" -%}
                {%- set chat.video = chat.video ~ "VIDEO" -%}
            {%- else -%}
                {%- set chat.text = chat.text ~ part.text -%}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endfor -%}
{{- "<|im_start|>system\\n" ~ chat.system ~ "<|im_end|>\\n<|im_start|>user\\n" -}}
{{- chat.image ~ chat.video ~ chat.text ~ "<|im_end|>\\n<|im_start|>assistant\\n<|endoftext|>" -}}
"""

logger = logging.getLogger(__name__)


@dataclass
class PreparedItem:
    """An item whose media are in memory: what `collate` takes, and what a data loader's worker may hand over.

    Attributes:
        instruction (`str`): system text.
        text (`str`): user text, may be empty.
        image (`np.ndarray` of shape `(H, W, 3)`, *optional*): uint8 RGB.
        frames (`np.ndarray` of shape `(T, H, W, 3)`, *optional*): uint8 RGB.
        times (`np.ndarray` of shape `(T,)`, *optional*): when the frames are shown, in seconds.
        cut_tokens (`int`): tokens of its texts that `max_length` cut away; set by `collate`.
    """

    instruction: str
    text: str = ""
    image: np.ndarray | None = None
    frames: np.ndarray | None = None
    times: np.ndarray | None = None
    cut_tokens: int = 0


class GVEProcessor(ProcessorMixin):
    """Inputs of [`GVEModel`] from items.

    An item is a `str` or a dict with any of `text`, `image`, `video`, and optionally `instruction` and, for bare
    frames, `fps` or `times`. `image` and `video` take every form of `load_image` and `load_video`; a video that is
    decoded already comes as a `VideoFrames`. Missing and `None` mean the same; an `id` is ignored.

    Args:
        image_processor (`Qwen2VLImageProcessor`): resizes, normalises and cuts images into patches.
        tokenizer (`PreTrainedTokenizerBase`): a tokenizer with Qwen's special tokens.
        video_processor (`Qwen2VLVideoProcessor`): the same for videos.
        num_frames (`int`, defaults to 8): frames read from a video.
        max_tokens_per_frame (`int`, defaults to 200): a frame or image gets strictly fewer visual tokens.
        max_length (`int`, defaults to 8192): most tokens of an input; only text is cut to fit.
        instruction (`str`, *optional*): system text of an item that brings none.
        decoder (`str`, defaults to `"auto"`): which library reads videos, see `decode_video`.
        max_pixels, max_seconds, max_bytes: files beyond them are refused, see `MediaLimits`.
        times_in_text (`bool`, defaults to `False`): write the times of frames as text, as Qwen3-VL reads them, instead
            of `second_per_grid_ts`.

    Raises:
        ValueError: a limit is out of range, or the tokenizer lacks a special token.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        video_processor=None,
        num_frames: int = 8,
        max_tokens_per_frame: int = 200,
        max_length: int = 8192,
        instruction: str = DEFAULT_INSTRUCTION,
        decoder: str = "auto",
        max_pixels: int = DEFAULT_LIMITS.max_pixels,
        max_seconds: float = DEFAULT_LIMITS.max_seconds,
        max_bytes: int = DEFAULT_LIMITS.max_bytes,
        times_in_text: bool = False,
        chat_template: str | None = None,
    ):
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template)
        check_limits(num_frames, max_tokens_per_frame, max_length, video_processor.temporal_patch_size)
        self.num_frames = num_frames
        self.max_tokens_per_frame = max_tokens_per_frame
        self.max_length = max_length
        self.instruction = instruction
        self.decoder = decoder
        self.max_pixels, self.max_seconds, self.max_bytes = max_pixels, max_seconds, max_bytes
        self.times_in_text = times_in_text
        for vision in (image_processor, video_processor):
            pixels = (vision.patch_size * vision.merge_size) ** 2
            vision.size.shortest_edge = pixels  # of one token: only what is smaller still is enlarged
            vision.size.longest_edge = (max_tokens_per_frame - 1) * pixels
        self._layout = _ChatLayout(tokenizer)

    @classmethod
    def from_config(cls, config: GVEConfig, tokenizer) -> "GVEProcessor":
        """The processor that fits a model's configuration."""
        vision = config.backbone_config.vision_config
        shape = {
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": vision.spatial_merge_size,
        }
        if config.times_in_text:  # Qwen3-VL
            shape |= {"image_mean": IMAGENET_STANDARD_MEAN, "image_std": IMAGENET_STANDARD_STD}
        names = ("num_frames", "max_tokens_per_frame", "max_length", "instruction", "times_in_text")
        settings = {name: getattr(config, name) for name in names}
        settings["chat_template"] = _chat_template(config)
        # The cap on a whole video is for dense sampling; here frames are few and each has its own limit.
        video_processor = Qwen2VLVideoProcessor(cap_pixels_per_frame=False, **shape)
        return cls(Qwen2VLImageProcessor(**shape), tokenizer, video_processor, **settings)

    @classmethod
    def for_model(cls, path: str, config: GVEConfig) -> "GVEProcessor":
        """The processor saved in a GVE repo; for any other checkpoint, one built from `config` and its tokenizer."""
        if cls.get_processor_dict(path)[0].get("processor_class") == cls.__name__:
            return cls.from_pretrained(path, trust_remote_code=True)
        return cls.from_config(config, AutoTokenizer.from_pretrained(path, config=config.backbone_config))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "GVEProcessor":
        """Load a saved processor; limits given by name replace the saved ones."""
        # Without a configuration at hand the tokenizer looks for the model's, whose code it would ask to run.
        kwargs.setdefault("config", PretrainedConfig())
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        clock = [] if self.times_in_text else ["second_per_grid_ts"]
        return [*super().model_input_names, "mm_token_type_ids", *clock]

    def __call__(self, items, instruction: str | None = None) -> BatchFeature:
        """Inputs of a batch, padded on the right.

        Args:
            items (`str`, `dict` or list of them): see the class.
            instruction (`str`, *optional*): system text of items that bring none, instead of the processor's own.

        Returns:
            `BatchFeature`: `input_ids`, `attention_mask` and `mm_token_type_ids` (0 text, 1 image, 2 video) of shape
            `(B, S)`; with images `pixel_values` and `image_grid_thw` of shape `(num_images, 3)`; with videos
            `pixel_values_videos`, `video_grid_thw` of shape `(num_videos, 3)` and `second_per_grid_ts` of shape
            `(num_videos,)`, the seconds that one temporal patch spans, unless `times_in_text`.

        Raises:
            ValueError: an item has nothing to embed or an unknown key, a medium cannot be read, or the visual tokens
                of an item exceed `max_length`. `VideoError` is one of these.
        """
        items = [items] if isinstance(items, (str, dict)) else items
        return self.collate([self.prepare(item, instruction) for item in items])

    def prepare(self, item: str | dict, instruction: str | None = None) -> PreparedItem:
        """Check one item and bring its media into memory.

        Raises:
            ValueError: see `__call__`.
        """
        item = {"text": item} if isinstance(item, str) else item
        if not isinstance(item, dict):
            raise ValueError(f"item of type {type(item).__name__}: use a str or a dict with text, image or video")
        item = {key: value for key, value in item.items() if value is not None and key != "id"}
        if unknown := set(item) - set(ITEM_KEYS):
            raise ValueError(f"item has unknown keys {sorted(unknown)}: use {', '.join(ITEM_KEYS)}")
        if not {"text", "image", "video"} & set(item):
            raise ValueError("item has none of text, image and video")
        fallback = self.instruction if instruction is None else instruction
        prepared = PreparedItem(_checked_text(item, "instruction", fallback), _checked_text(item, "text", ""))
        limits = MediaLimits(self.max_pixels, self.max_seconds, self.max_bytes)
        if "image" in item:
            prepared.image = load_image(item["image"], limits)
        if "video" in item:
            clock = item.get("fps"), item.get("times")
            prepared.frames, prepared.times = load_video(item["video"], self.num_frames, *clock, self.decoder, limits)
        elif "fps" in item or "times" in item:
            raise ValueError("item has fps or times but no video")
        self._check_size(prepared)
        return prepared

    def collate(self, prepared: list[PreparedItem]) -> BatchFeature:
        """Inputs of prepared items; arguments, result and errors as in `__call__`.

        All images go through the image processor in one call, and all videos through the video processor.
        """
        images = [_channels_first(item.image) for item in prepared if item.image is not None]
        videos = [_channels_first(item.frames) for item in prepared if item.frames is not None]
        features, image_counts, video_counts = {}, [], []
        as_they_are = {"do_convert_rgb": False, "input_data_format": "channels_first", "return_tensors": "pt"}
        if images:
            features.update(self.image_processor(images, **as_they_are))
            image_counts = (features["image_grid_thw"].prod(1) // self.image_processor.merge_size**2).tolist()
        if videos:
            features.update(self.video_processor(videos, do_sample_frames=False, return_metadata=False, **as_they_are))
            video_counts = (features["video_grid_thw"].prod(1) // self.video_processor.merge_size**2).tolist()
            if not self.times_in_text:
                spacings = [mean_spacing(item.times) for item in prepared if item.frames is not None]
                spacings = torch.tensor(spacings, dtype=torch.float64)
                features["second_per_grid_ts"] = (spacings * self.video_processor.temporal_patch_size).float()
        image_counts, video_counts = iter(image_counts), iter(video_counts)
        counts = [
            (
                0 if item.image is None else next(image_counts),
                0 if item.frames is None else next(video_counts),
                self._clock_texts(item),
            )
            for item in prepared
        ]
        rows = self._layout.token_ids(prepared, counts, self.max_length)
        return BatchFeature({**self._pad(rows), **features})

    def _clock_texts(self, item):
        """Texts before the equal parts of a video's tokens: the times of its temporal patches, else one empty text."""
        if item.frames is None:
            return ()
        if not self.times_in_text:
            return ("",)
        step = self.video_processor.temporal_patch_size
        # From the first frame on: where a container starts its clock says nothing of the content.
        seconds = np.asarray(item.times, dtype=np.float64) - item.times[0]
        seconds = np.pad(seconds, (0, -len(seconds) % step), mode="edge")  # as the video processor pads its frames
        return tuple(
            f"<{(first + last) / 2:.1f} seconds>" for first, last in zip(seconds[::step], seconds[step - 1 :: step])
        )

    def _pad(self, rows):
        lengths = np.array([len(row) for row in rows])
        attended = np.arange(lengths.max()) < lengths[:, None]
        input_ids = np.full(attended.shape, self._layout.end_of_text, dtype=np.int64)
        input_ids[attended] = np.concatenate(rows)
        types = (input_ids == self._layout.image_pad) + 2 * (input_ids == self._layout.video_pad)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attended.astype(np.int64)),
            "mm_token_type_ids": torch.from_numpy(types.astype(np.int64)),
        }

    def _check_size(self, prepared):
        """Refuse what cannot become as few visual tokens as the limits allow."""
        counts = [0, 0]
        if prepared.image is not None:
            self._check_aspect(*prepared.image.shape[:2])
            patches = self.image_processor.get_number_of_image_patches(*prepared.image.shape[:2])
            counts[0] = patches // self.image_processor.merge_size**2
        if prepared.frames is not None:
            self._check_aspect(*prepared.frames.shape[1:3])
            patches = self.video_processor.get_num_of_video_patches(*prepared.frames.shape[:3], videos_kwargs={})
            counts[1] = patches // self.video_processor.merge_size**2
        fixed = self._layout.fixed_length(*counts, self._clock_texts(prepared))
        if fixed > self.max_length:
            raise ValueError(f"max_length={self.max_length} is less than an item's {fixed} visual and fixed tokens")

    def _check_aspect(self, height, width):
        limit = min(MAX_ASPECT_RATIO, self.max_tokens_per_frame - 1)
        if max(height, width) > limit * min(height, width):
            raise ValueError(
                f"picture of {width} x {height} pixels: its sides may differ {limit} times at most; crop it"
            )


class _ChatLayout:
    """Token ids of the chat turn, put together from pieces so that visual tokens are counted, never parsed.

    Pieces between special tokens are tokenised on their own, which is what a tokenizer does with the whole string;
    text that spells a special token stays text.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._kept = {}
        self.end_of_text = self._special("<|endoftext|>")
        self.image_pad, self.video_pad = self._special("<|image_pad|>"), self._special("<|video_pad|>")
        self._start, end = self._special("<|im_start|>"), self._special("<|im_end|>")
        self._vision_start, self._vision_end = self._special("<|vision_start|>"), self._special("<|vision_end|>")
        self._system, self._user, newline, assistant = self._tokenize(["system\n", "user\n", "\n", "assistant\n"])
        self._user_start = [end, *newline, self._start]
        self._tail = [end, *newline, self._start, *assistant, self.end_of_text]

    def token_ids(self, prepared, counts, max_length):
        """Token ids of each item, cut to `max_length` in its texts only; each `cut_tokens` is set.

        Args:
            prepared (list of `PreparedItem`): B items.
            counts (list of `(int, int, tuple of str)`): their visual tokens in image and video, and the texts before
                the equal parts of the latter, none without a video.
            max_length (`int`): at least each item's `fixed_length`.
        """
        system_texts = {f"system\n{item.instruction}": None for item in prepared}
        visuals = [self._visual(*count) for count in counts]
        user_texts = [item.text if visual else f"user\n{item.text}" for item, visual in zip(prepared, visuals)]
        pieces = self._tokenize([*system_texts, *user_texts])
        system_ids = dict(zip(system_texts, pieces))
        rows = []
        for item, visual, user in zip(prepared, visuals, pieces[len(system_texts) :]):
            system = system_ids[f"system\n{item.instruction}"]
            room = max_length - self._fixed_length(visual)
            system_room = len(self._system) + room
            user_room = (0 if visual else len(self._user)) + max(system_room - len(system), 0)
            item.cut_tokens = max(len(system) - system_room, 0) + max(len(user) - user_room, 0)
            row = [self._start, *system[:system_room], *self._user_start, *visual, *user[:user_room], *self._tail]
            rows.append(row)
        if cut := [item.cut_tokens for item in prepared if item.cut_tokens]:
            logger.warning(
                "max_length=%d: text of %d of %d items was cut at its end, by %d tokens in all",
                *(max_length, len(cut), len(rows), sum(cut)),
            )
        return rows

    def fixed_length(self, image_count, video_count, clock_texts):
        """Tokens that are never cut: all but the instruction and the user's text."""
        return self._fixed_length(self._visual(image_count, video_count, clock_texts))

    def __deepcopy__(self, memo):
        return self  # its result never changes; a processor is copied when it is saved, and a vocabulary is large

    def _fixed_length(self, visual):
        opening = visual or self._user
        return 1 + len(self._system) + len(self._user_start) + len(opening) + len(self._tail)

    def _visual(self, image_count, video_count, clock_texts):
        """Ids from the user's name to the last visual token, empty without image and video."""
        texts = [*([""] if image_count else []), *clock_texts]
        if not texts:
            return []
        texts[0] = "user\n" + texts[0]
        blocks = [(self.image_pad, image_count)] if image_count else []
        blocks += [(self.video_pad, video_count // len(clock_texts)) for _ in clock_texts]
        ids = []
        for text, (pad, count) in zip(texts, blocks):
            if text not in self._kept:  # few different ones recur
                self._kept[text] = self._tokenize([text])[0]
            ids += [*self._kept[text], self._vision_start, *[pad] * count, self._vision_end]
        return ids

    def _tokenize(self, texts):
        return self._tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

    def _special(self, token):
        index = self._tokenizer.convert_tokens_to_ids(token)
        if index is None or self._tokenizer.convert_ids_to_tokens(index) != token:  # an unknown one becomes another
            raise ValueError(f"the tokenizer lacks {token}: use one with the special tokens of Qwen-VL")
        return index


def _chat_template(config):
    # Qwen3-VL's processors put the markers of vision around each temporal patch, behind its time.
    video = "<|video_pad|>" if config.times_in_text else "<|vision_start|><|video_pad|><|vision_end|>"
    instruction = json.dumps(config.instruction, ensure_ascii=False)
    return CHAT_TEMPLATE.strip().replace("INSTRUCTION", instruction).replace("VIDEO", video)


def _checked_text(item, key, default):
    text = item.get(key, default)
    if not isinstance(text, str):
        raise ValueError(f"item's {key} is of type {type(text).__name__}: use a str")
    return text


def _channels_first(pixels):
    return torch.from_numpy(np.require(pixels, requirements="CW")).movedim(-1, -3)  # read-only arrays are copied
