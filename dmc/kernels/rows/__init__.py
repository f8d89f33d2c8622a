"""Norms, gated activation and RoPE of a served model."""
