"""The model: read `vlm.py` first, then `pyramid_drop.py` (the algorithm)."""
