"""What the CPU kernels share: compilation, threads, vector helpers. It knows no operation."""
