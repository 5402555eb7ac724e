# Sourced by the other scripts: sets ROOT and python, creates .venv if it is missing, and sets the environment of every run.
#
#   LLAVA_PDROP_PYTHON    a Python that already has the project's packages: no environment is created
#   LLAVA_PDROP_VENV      directory of the environment; default: .venv in the checkout
#   CONSTRAINTS           file of versions to install (see setup.sh)
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

# By default glibc returns large tensors to the kernel after every step and gets them back zeroed. Keeping them took a step
# of a prototype on 2 cores from 3.8 to 2.2 seconds.
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-8589934592}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-17179869184}"
# Batches differ in length: without this, GPU memory blocks of a shorter batch cannot serve a longer one. PyTorch prefers the
# first name, so it must not override a value that the user has set under the second.
if [[ -z "${PYTORCH_CUDA_ALLOC_CONF+set}${PYTORCH_ALLOC_CONF+set}" ]]; then
    export PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True"
fi
# A waiting thread of PyTorch spins for a moment, then sleeps. On a busy machine, endless spinning would take the core from
# the threads it waits for, and count as CPU time of the step.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-20000}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}" # it would warn at every fork of a data worker
