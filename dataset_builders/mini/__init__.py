"""The rendered world: an endless supply of small videos whose every text and right answer is known (`world.py` first)."""
