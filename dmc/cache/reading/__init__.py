"""Attention of steps and prompts over the cache."""
