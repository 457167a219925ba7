"""The rendered world: an endless supply of small videos whose texts and right answers are known (`world.py` first)."""
