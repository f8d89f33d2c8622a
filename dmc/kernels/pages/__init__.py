"""Data types of pages, the views of them that kernels take, and device functions on these views."""
