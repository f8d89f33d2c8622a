"""A generated token enters the cache."""
