"""Judging on UVRB: two metric modules (each folder is a Space), the runner that feeds them, and its report."""
