"""Measurements: ratios against a peer or a baseline, alternating in one process tree."""
