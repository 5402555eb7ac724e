#!/usr/bin/env bash
# Trains with PyramidDrop and compares: bash scripts/finetune_pdrop.sh [CONFIG] [section.key=value ...]
# Default: the embedded example, on any laptop. Sets up .venv first where needed (see setup.sh for its variables).
#
#   NPROC_PER_NODE    processes, one per GPU; default: as many as nvidia-smi lists, else 1; 1 for
#                     configs/tiny/, which run on the CPU
#   TORCHRUN_ARGS     more arguments for torchrun, e.g. "--nnodes 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500"
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
config="configs/tiny/finetune_pdrop.yaml"
if [[ $# -gt 0 && "$1" != *=* && "$1" != -* ]]; then
    config="$1"
    shift
    # A path is meant from where the user stands; the paths inside configs are meant from the checkout.
    if [[ "$config" != /* && -f "$config" ]]; then config="$(pwd)/$config"; fi
    config="${config#"$ROOT"/}"
fi

export LLAVA_PDROP_VENV="${LLAVA_PDROP_VENV:-$ROOT/.venv}"
[[ "$LLAVA_PDROP_VENV" == /* ]] || LLAVA_PDROP_VENV="$PWD/$LLAVA_PDROP_VENV"
bash "$ROOT/scripts/setup.sh"
cd "$ROOT"

# glibc gives large tensors back to the kernel after every step and gets them anew, zeroed: keeping them took a step of a
# prototype on 2 cores from 3.8 to 2.2 seconds.
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-8589934592}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-17179869184}"
# A thread of PyTorch's that waits for the others spins for a moment and then sleeps: on a busy machine endless spinning
# takes the core from those it waits for, and would be counted as CPU time of the step.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-20000}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}" # it would warn at every fork of a data worker

python="$LLAVA_PDROP_VENV/bin/python"
gpus="$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true)"
if [[ "/$config" == */configs/tiny/* ]]; then gpus=0; fi
processes="${NPROC_PER_NODE:-$((gpus > 1 ? gpus : 1))}"
if [[ "$processes" -gt 1 || -n "${TORCHRUN_ARGS:-}" ]]; then
    read -r -a more <<<"${TORCHRUN_ARGS:---standalone}"
    exec "$python" -m torch.distributed.run --nproc-per-node "$processes" "${more[@]}" -m llava_pdrop compare "$config" "$@"
fi
exec "$python" -m llava_pdrop compare "$config" "$@"
