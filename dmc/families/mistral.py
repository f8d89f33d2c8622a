"""Mistral without a sliding window: Llama's decoder with a head size of its own."""

from dmc.families.base import Family

FAMILY = Family("mistral", "Mistral", ("Mistral 7B v0.2, v0.3", "Mistral Nemo"), sliding=True)
