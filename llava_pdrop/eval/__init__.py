"""Evaluation by generation (`runner.py`), and the comparison of runs (`compare.py`, `report.py`)."""
