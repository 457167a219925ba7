# Copyright 2025 The GVE project. Licensed under the Apache License, Version 2.0.
"""Training of GVE: the Modality Pyramid recipe (`pyramid.py`) and the parts it is made of."""
