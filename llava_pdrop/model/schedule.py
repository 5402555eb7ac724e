"""The old place of `llava_pdrop.schedule`."""

import warnings

from llava_pdrop.schedule import Schedule

__all__ = ["Schedule"]

warnings.warn(
    "llava_pdrop.model.schedule has moved: from llava_pdrop import Schedule", DeprecationWarning, stacklevel=2
)
