"""Training: read `run.py` first, then `trainer.py`."""
