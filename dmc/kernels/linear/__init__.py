"""Linear layers of a served model on a CPU."""
