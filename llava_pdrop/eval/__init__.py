"""Evaluation by generation: questions, answers, scores. Read `evaluate.py` first."""
