"""The Zarr store of a run: what is appended step by step, kept through a kill, and read as xarray."""
