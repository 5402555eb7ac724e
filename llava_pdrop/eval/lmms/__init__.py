"""Our models in lmms-eval, from outside: entry point ``llava_pdrop`` of its group ``lmms_eval.models`` (setup.py).

lmms-eval is no requirement of this package. Only `manifest`, which lmms-eval calls, and `model.py`, which it then asks
for by name, import it: nothing else here does, and nothing else imports `model.py`.
"""

from __future__ import annotations

from typing import Any

MODEL = "llava_pdrop"
"""``python -m lmms_eval --model llava_pdrop``."""


def manifest() -> Any:
    """What lmms-eval registers. It is asked for whichever model is wanted, so nothing of ours is imported here."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL, simple_class_path=f"{__name__}.model.LlavaPdrop")
