"""The Llama of the serving side: reads the export, and plain Hugging Face Llama directories."""

from dmc.model.config import ModelConfig, read_config
from dmc.model.llama import Attend, Llama

__all__ = ["Attend", "Llama", "ModelConfig", "read_config"]
