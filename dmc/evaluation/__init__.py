"""Quality of models and caches: perplexity, divergence, tasks."""
