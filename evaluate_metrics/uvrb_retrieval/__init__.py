# Copyright 2025 The GVE project. Licensed under the Apache License, Version 2.0.
"""The `uvrb_retrieval` Space; `ranking.py` holds the numbers and needs NumPy only."""
