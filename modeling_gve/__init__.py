"""The GVE embedding model: configuration, model, processor and video reading, files that travel to a model repo."""

from .configuration_gve import GVEConfig
from .layers_gve import batch_equal_windows
from .modeling_gve import GVEModel, GVEOutput, quantize_embeddings
from .processing_gve import GVEProcessor, PreparedItem
from .video_gve import VideoError, VideoFrames, decode_video


# Saved repos carry the code, so that they load with trust_remote_code where this project is not installed.
GVEConfig.register_for_auto_class()
GVEModel.register_for_auto_class("AutoModel")
GVEProcessor.register_for_auto_class("AutoProcessor")

__all__ = [
    "GVEConfig",
    "GVEModel",
    "GVEOutput",
    "GVEProcessor",
    "PreparedItem",
    "VideoError",
    "VideoFrames",
    "batch_equal_windows",
    "decode_video",
    "quantize_embeddings",
]
