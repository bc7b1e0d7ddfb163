"""Several runs at once, and published ones."""
