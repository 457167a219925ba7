"""Repos for the Hub: `assemble` completes them, `render` writes their cards, `publish` pushes, `prove` loads them."""
