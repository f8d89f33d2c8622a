"""Trellis-coded pages: the codec TCQ."""
