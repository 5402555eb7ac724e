"""Scoring rules: what several benchmarks share, and what is of one alone."""
