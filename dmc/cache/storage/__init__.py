"""Page pool, rows and their block tables, eviction, swap, integrity."""
