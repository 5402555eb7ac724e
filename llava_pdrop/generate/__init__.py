"""Dropping inside Hugging Face's ``generate``: read `plugin.py` first."""
