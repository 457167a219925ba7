"""The `uvrb_retrieval` Space; `ranking.py` holds the numbers and needs NumPy only."""
