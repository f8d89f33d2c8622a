"""How a step and a prompt attend to the cache."""
