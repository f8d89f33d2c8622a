"""Encoding of full pages."""
