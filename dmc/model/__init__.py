"""The decoder of the serving side: reads exports, and plain Hugging Face directories of every family."""

from dmc.model.config import ModelConfig, read_config
from dmc.model.decoder import Attend, Decoder

__all__ = ["Attend", "Decoder", "ModelConfig", "read_config"]
