"""Trellis-coded pages: GEAR with the rotated backbone."""
