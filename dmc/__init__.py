"""dmc: retrofit a pretrained Llama with Dynamic Memory Compression and serve it from a compressed KV cache."""

__version__ = "0.1.0"
