# Copyright 2025 The GVE project. Licensed under the Apache License, Version 2.0.
"""Judging on UVRB: two metric modules (each folder is a Space), the runner that feeds them, and its report."""
