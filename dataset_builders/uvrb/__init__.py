# Copyright 2025 The GVE project. Licensed under the Apache License, Version 2.0.
"""The Universal Video Retrieval Benchmark (arXiv 2510.27571): its 16 datasets as facts, see `tasks.py`."""
