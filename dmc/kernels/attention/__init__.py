"""Training attention of DMC and DMS, and RoPE."""
