# Copyright 2025 The GVE project. Licensed under the Apache License, Version 2.0.
"""Builders of the benchmark and of the training pairs: each writes a repo for `load_dataset`."""
