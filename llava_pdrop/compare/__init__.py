"""Runs side by side: with and without dropping (`compare.py`), variants of a config (`ablate.py`), finished runs
(`runs.py`), schedules that learn the embedded task (`learn.py`). `candidates.py` trains and asks them."""
