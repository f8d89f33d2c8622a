"""Pages of min/max groups: the published GEAR, and KIVI."""
