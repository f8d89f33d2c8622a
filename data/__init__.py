"""Corpora to tokens to megatron-core .bin/.idx files to resumable batches."""
