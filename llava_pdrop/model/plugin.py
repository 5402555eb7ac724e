"""The old place of `llava_pdrop.generate.plugin`."""

import warnings

from llava_pdrop.generate.plugin import attach, detach

__all__ = ["attach", "detach"]

warnings.warn(
    "llava_pdrop.model.plugin has moved: from llava_pdrop import attach, detach", DeprecationWarning, stacklevel=2
)
