"""Page formats, with kernels that read and write their pages, on GPU and CPU."""
