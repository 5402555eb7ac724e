"""The golden cases of `tests/golden` once more, on the GPU in float32, held to the same tolerances."""

from __future__ import annotations

import pytest

from tests.golden import test_cases, test_generation
from tests.golden.cases import Case, case_files


def of(files):
    return pytest.mark.parametrize("file", files, ids=test_cases.identify)


@of(case_files())
def test_packed_training_path(file):
    test_cases.test_case(Case.load(file, "cuda"))


@of(test_generation.FILES)
def test_generate(file):
    test_generation.test_generate(Case.load(file, "cuda"))


@of(test_generation.FILES)
def test_recomputation(file):
    test_generation.test_recomputation(Case.load(file, "cuda"))
