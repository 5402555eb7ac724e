# Sourced by the other scripts: sets ROOT and python, makes .venv where it is missing, and sets what every run wants.
#
#   LLAVA_PDROP_PYTHON    a Python that has the project's packages already: no environment is made
#   LLAVA_PDROP_VENV      where the environment lies; default: .venv in the checkout
#   CONSTRAINTS           the versions it is made with (see setup.sh)
# shellcheck shell=bash

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

if [[ "${DRY_RUN:-0}" == 0 ]]; then unset DRY_RUN; fi
if [[ -n "${LLAVA_PDROP_PYTHON:-}" ]]; then
    python="$(command -v "$LLAVA_PDROP_PYTHON")" || fail "LLAVA_PDROP_PYTHON=$LLAVA_PDROP_PYTHON is not a program"
    [[ "$python" == /* ]] || python="$PWD/$python"
else
    export LLAVA_PDROP_VENV="${LLAVA_PDROP_VENV:-$ROOT/.venv}"
    [[ "$LLAVA_PDROP_VENV" == /* ]] || LLAVA_PDROP_VENV="$PWD/$LLAVA_PDROP_VENV"
    python="$LLAVA_PDROP_VENV/bin/python"
    [[ -n "${DRY_RUN:-}" ]] || bash "$ROOT/scripts/setup.sh"
fi

# glibc gives large tensors back to the kernel after every step and gets them anew, zeroed: keeping them took a step of a
# prototype on 2 cores from 3.8 to 2.2 seconds.
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-8589934592}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-17179869184}"
# Batches differ in length: without this, blocks of GPU memory of a shorter one are of no use to a longer one. The first
# name is the one that PyTorch prefers, so it must not be set beside a value that the user has given by the second.
if [[ -z "${PYTORCH_CUDA_ALLOC_CONF+set}${PYTORCH_ALLOC_CONF+set}" ]]; then
    export PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True"
fi
# A thread of PyTorch's that waits for the others spins for a moment and then sleeps: on a busy machine endless spinning
# takes the core from those it waits for, and would be counted as CPU time of the step.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-20000}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}" # it would warn at every fork of a data worker
