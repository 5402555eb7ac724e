"""The study that the paper begins with, on any model: what image tokens are worth at which depth."""
