"""Relaxed decisions: noise, alpha and omega."""
