"""The smoothing of curves."""

from __future__ import annotations

import numpy as np
import pytest

from llava_pdrop.compare.figures import running_mean


def test_running_mean():
    values = np.asarray([1.0, 2.0, 6.0, 3.0])
    assert running_mean(values, 1).tolist() == [1.5, 3.0, pytest.approx(11 / 3), 4.5]
    assert running_mean(values, 0).tolist() == values.tolist()
