"""Measuring a series of checkpoints: the plan, the study, where models and data come from."""
