"""Appending generated tokens to the cache."""
