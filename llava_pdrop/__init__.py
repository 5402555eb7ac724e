"""llava_pdrop: LLaVA training and inference whose decoder drops image tokens stage by stage (PyramidDrop)."""

__version__ = "0.1.0"
