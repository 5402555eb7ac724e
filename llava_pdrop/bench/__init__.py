"""Figures about a run: what a schedule costs and saves."""
