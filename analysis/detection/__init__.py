"""The search for events in a series, with intervals and p-values."""
