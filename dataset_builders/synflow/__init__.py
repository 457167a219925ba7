"""V-SynFlow: from weakly labelled video to UVRD, clean pairs in seven formats (arXiv 2510.27571, section 4)."""
