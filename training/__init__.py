"""Training of GVE: the Modality Pyramid recipe (`pyramid.py`) and the parts it is made of."""
