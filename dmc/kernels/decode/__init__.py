"""Decode attention over pages."""
