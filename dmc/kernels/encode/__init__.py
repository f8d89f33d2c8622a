"""Full pages are encoded."""
