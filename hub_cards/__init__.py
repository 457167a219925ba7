# Copyright 2025 The GVE project. Licensed under the Apache License, Version 2.0.
"""Repos for the Hub: `assemble` completes them, `render` writes their cards, `publish` pushes, `prove` loads them."""
