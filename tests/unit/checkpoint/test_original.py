"""Configs of original LLaVA checkpoints: settings that are not supported are refused by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from llava_pdrop.checkpoint.original import original_geometry
from tests.parity.test_export import sources  # noqa: F401


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mm_vision_select_feature", "cls_patch"),
        ("image_aspect_ratio", "anyres_max_9"),
        ("image_aspect_ratio", "square"),
        ("image_aspect_ratio", None),
    ],
)
def test_original_settings_we_do_not_have(key, value):
    config = {"image_aspect_ratio": "pad", key: value}
    with pytest.raises(ValueError, match=f"^[^\n]*{key} {value!r} is not supported[^\n]*$"):
        original_geometry(config, SimpleNamespace(image_size=28, patch_size=7))
