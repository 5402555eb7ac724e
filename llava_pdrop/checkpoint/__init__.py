"""Weights from disk into a model and back, in every layout: read `open.py` and `build.py` first."""
