"""The Universal Video Retrieval Benchmark (arXiv 2510.27571): its 16 datasets as facts, see `tasks.py`."""
