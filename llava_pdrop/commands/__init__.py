"""The verbs of the command line, one file each. Torch is imported only where a verb runs."""
