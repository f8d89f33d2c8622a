"""Weights in and out: Hugging Face and megatron-core, the checkpoint store, the export, the base model."""
