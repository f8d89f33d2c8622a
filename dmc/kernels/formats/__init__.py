"""Page formats: how a page of each format is read and written, on GPU and CPU."""
