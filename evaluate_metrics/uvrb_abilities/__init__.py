# Copyright 2025 The GVE project. Licensed under the Apache License, Version 2.0.
"""The `uvrb_abilities` Space; `averages.py` holds the numbers and needs no library at all."""
