"""All that needs a GPU, measured by ``bash scripts/gpu_check.sh``. Read `runner.py` first, then `stages.py`."""
