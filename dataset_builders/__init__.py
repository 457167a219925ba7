"""Builders of the benchmark and of the training pairs: each writes a repo for `load_dataset`."""
