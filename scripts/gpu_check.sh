#!/usr/bin/env bash
# Everything that needs a GPU, in one call: bash scripts/gpu_check.sh [--stages a,b] [--seconds N] [--device cpu] [--out DIR]
# Tests, step times, synchronisations, profile, prefill and more (llava_pdrop/bench/gpu/stages.py), most valuable first. Each
# stage has a time limit and saves its results before the next one begins. It uses a Python that has CUDA, creates no
# environment, installs nothing and needs no network. Exit status 1 if a stage did not measure all that the README needs.
#
#   --stages A,B     only these stages; default: all but learn and generate, each of which needs a call of its own (ranks
#                    needs several GPUs)
#   --seconds N      time limit of all stages together; default: the sum of their limits: 580 for the default stages on
#                    one GPU, 820 on several, 240 for learn, 120 for generate
#   --device cpu     a rehearsal at tiny shapes
#   --out DIR        for summary.txt, gpu_check.json and gpu_check.tar.gz; default: checkpoints/gpu_check. Unpack the
#                    archive in the checkout to put every bench file into playground/benchmarks
#
#   LLAVA_PDROP_PYTHON    the Python to use; default: the first with CUDA among LLAVA_PDROP_VENV, .venv, python3, python
#   LLAVA_PDROP_COMMIT    the commit, for a checkout without its history, or with files of a later commit
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
device=cuda out="" words=()
while [[ $# -gt 0 ]]; do # a path is meant from where the user stands
    case "$1" in
        --out | --device) [[ $# -ge 2 ]] || { printf 'error: %s needs a value\n' "$1" >&2; exit 2; } ;;&
        --out) out="$2"; shift 2 ;;
        --out=*) out="${1#*=}"; shift ;;
        --device) device="$2"; words+=("$1" "$2"); shift 2 ;;
        --device=*) device="${1#*=}"; words+=("$1"); shift ;;
        -h | --help) device=help; words+=("$1"); shift ;;
        *) words+=("$1"); shift ;;
    esac
done
if [[ -n "$out" ]]; then
    [[ "$out" == /* ]] || out="$PWD/$out"
    words+=(--out "$out")
fi

# usable PYTHON: whether it has what this check needs.
usable() {
    local wants="import torch"
    case "$device" in
        help) wants="" ;;
        cuda*) wants="import torch, sys; sys.exit(not torch.cuda.is_available())" ;;
    esac
    [[ -n "$(command -v "$1")" ]] && "$1" -c "$wants" >/dev/null 2>&1
}

python="" tried=()
if [[ -n "${LLAVA_PDROP_PYTHON:-}" ]]; then
    candidates=("$LLAVA_PDROP_PYTHON")
else
    candidates=("${LLAVA_PDROP_VENV:-$ROOT/.venv}/bin/python" python3 python)
fi
for candidate in "${candidates[@]}"; do
    tried+=("$candidate")
    if usable "$candidate"; then
        python="$(command -v "$candidate")"
        break
    fi
done
if [[ -z "$python" ]]; then
    what="PyTorch that sees a CUDA device: name one with LLAVA_PDROP_PYTHON, make one by"
    what+=" CONSTRAINTS=scripts/constraints-cuda.txt bash scripts/setup.sh, or rehearse with --device cpu"
    [[ "$device" == cuda* ]] || what="PyTorch: name one with LLAVA_PDROP_PYTHON, or run make setup"
    printf 'error: none of %s has a %s\n' "${tried[*]}" "$what" >&2
    exit 2
fi
[[ "$python" == /* ]] || python="$PWD/$python"

cd "$ROOT"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # as torchrun gives every rank
# Batches differ in length: without this, memory blocks of a shorter batch cannot serve a longer one. PyTorch prefers the
# first name, so it must not override a value that the user has set under the second.
if [[ -z "${PYTORCH_CUDA_ALLOC_CONF+set}${PYTORCH_ALLOC_CONF+set}" ]]; then
    export PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True"
fi
exec "$python" -m llava_pdrop.bench.gpu ${words[@]+"${words[@]}"}
