"""Dense, int8 and fp8 pages."""
