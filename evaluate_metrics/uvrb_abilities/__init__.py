"""The `uvrb_abilities` Space; `averages.py` holds the numbers and needs no library at all."""
