"""Shared parts of the CPU kernels: compilation, threads, vector helpers. No operation is defined here."""
