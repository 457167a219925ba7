# Copyright 2026 The GVE project. Licensed under the Apache License, Version 2.0.
"""GVE as a module of sentence-transformers (6 or newer): the same items, the same embeddings.

`SentenceTransformer(path, trust_remote_code=True).encode(items)` takes every item of [`GVEProcessor`]. A prompt of
sentence-transformers is GVE's instruction: system text of items that bring none. `precision="int8"` is the library's
own here: it calibrates each dimension on the embeddings of the call, where `GVEModel.encode` takes a calibration.
"""

from sentence_transformers.base.modules import InputModule

from .configuration_gve import GVEConfig
from .modeling_gve import GVEModel
from .processing_gve import GVEProcessor


class GVETransformer(InputModule):
    """Input and only module of a GVE repo.

    Args:
        model (`GVEModel`): embeds.
        processor (`GVEProcessor`): makes its inputs.
    """

    def __init__(self, model: GVEModel, processor: GVEProcessor):
        super().__init__()
        self.model = model
        self.processor = processor

    @classmethod
    def load(
        cls,
        model_name_or_path,
        token=None,
        cache_folder=None,
        revision=None,
        local_files_only=False,
        model_kwargs=None,
        processor_kwargs=None,
        config_kwargs=None,
        **kwargs,
    ) -> "GVETransformer":
        """Load a GVE repo; arguments as of sentence-transformers' modules."""
        hub = {
            "token": token,
            "cache_dir": cache_folder,
            "revision": revision,
            "local_files_only": local_files_only,
        }
        config = GVEConfig.from_pretrained(model_name_or_path, **hub, **(config_kwargs or {}))
        model = GVEModel.from_pretrained(model_name_or_path, config=config, **hub, **(model_kwargs or {}))
        processor = GVEProcessor.from_pretrained(model_name_or_path, **hub, **(processor_kwargs or {}))
        return cls(model, processor)

    def save(self, output_path, *args, safe_serialization=True, **kwargs) -> None:
        """Write weights, processor and code, as `save_pretrained` does."""
        self.model.save_pretrained(output_path)
        self.processor.save_pretrained(output_path)

    @property
    def modalities(self):
        return ["text", "image", "video", "message"]  # "message" admits their combinations

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    @property
    def max_seq_length(self) -> int:
        return self.processor.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.processor.max_length = value

    def get_embedding_dimension(self) -> int:
        return self.model.config.embedding_dim

    def preprocess(self, inputs, prompt=None, **kwargs):
        """Features of a list of items; `prompt` is the instruction of those that bring none."""
        return dict(self.processor([_with_clock(item) for item in inputs], instruction=prompt or None))

    def forward(self, features, **kwargs):
        """Adds `sentence_embedding`: float32 of shape `(B, D)`, L2-normalised."""
        inputs = {name: features[name] for name in self.processor.model_input_names if name in features}
        return {**features, "sentence_embedding": self.model(**inputs).embeddings}


def _with_clock(item):
    """The item with frames and their rate, where its video is sentence-transformers' `{"array", "video_metadata"}`."""
    video = item.get("video") if isinstance(item, dict) else None
    if not isinstance(video, dict) or "array" not in video:
        return item
    return {**item, "video": video["array"], "fps": video["video_metadata"]["fps"]}
