#!/usr/bin/env bash
# Measures training and inference: bash scripts/bench.sh [tiny|cpu|gpu] [arguments for every `bench train`]
#                              or: bash scripts/bench.sh CONFIG [section.key=value ...] [arguments for `bench train`]
# tiny takes a minute or two; cpu is the shape small-cpu; gpu is the same as scripts/gpu_check.sh, which measures the real
# shapes on one 80 GB GPU in under ten minutes and has its own arguments.
# CONFIG is the YAML file or the directory of a run. This measures what the run costs, without its weights and data, on the
# GPU if there is one. It is always one process on one GPU, so communication between GPUs is not included: for that, see
# metrics.jsonl of a short run (train.max_steps=20).
# Each bench is its own process and writes JSON, Markdown and PNG into playground/benchmarks/NAME/ (NAME of a CONFIG:
# DIRECTORY-FILE). If one fails or takes too long, the others still run; it is listed at the end, and the exit status is 1.
#
#   LLAVA_PDROP_PYTHON    a Python that already has the project's packages (e.g. torch with CUDA): see environment.sh
#   BENCH_SECONDS         limit for all benches together; default: 1800
#   DRY_RUN=1             prints the commands and measures nothing
#   BENCH_LIMIT           limit for one bench, in seconds; default: 900
set -euo pipefail

what="${1:-tiny}"
[[ $# -eq 0 ]] || shift
here="$(dirname "${BASH_SOURCE[0]}")" seconds="${BENCH_SECONDS:-1800}" limit="${BENCH_LIMIT:-900}"
case "$what" in
    tiny | cpu) ;;
    gpu) exec bash "$here/gpu_check.sh" "$@" ;;
    *) # a path is meant from where the user stands, or else from the checkout
        if [[ "$what" != /* && -e "$what" ]]; then
            what="$PWD/$what"
        elif [[ ! -e "$what" && ! -e "$here/../$what" ]]; then
            printf 'error: unknown bench %s: choose tiny, cpu or gpu, or name the YAML file of a run\n' "$what" >&2
            exit 2
        fi
        ;;
esac

# shellcheck source=scripts/environment.sh
source "$here/environment.sh" # sets ROOT and python
cd "$ROOT"

failed=()

# bench NAME ARGUMENT...: one bench, within what is left of the time. Of NAME/PART, the part is for messages only.
bench() {
    local name="$1" left=$((seconds - SECONDS)) status=0
    shift
    if [[ "$left" -le 0 ]]; then
        failed+=("$name: not started, $seconds seconds were over")
        return
    fi
    local command=("$python" -m llava_pdrop bench "$@" --out "playground/benchmarks/${name%/*}")
    if [[ -n "${DRY_RUN:-}" ]]; then
        printf '%q ' "${command[@]}"
        printf '\n'
        return
    fi
    printf '== %s\n' "$name"
    left=$((left < limit ? left : limit))
    timeout --foreground --kill-after 10 "$left" "${command[@]}" || status="$?"
    case "$status" in
        0) ;;
        130) exit 130 ;; # Ctrl-C: not on to the next one
        124 | 137) failed+=("$name: stopped after $left seconds") ;;
        *) failed+=("$name: exit status $status") ;;
    esac
}

SECONDS=0 # setting up does not count
case "$what" in
    tiny)
        bench tiny-train train --shape tiny --device cpu "$@"
        bench tiny-prefill prefill --shape tiny --device cpu
        ;;
    cpu) bench cpu-train train --shape small-cpu --device cpu "$@" ;;
    *)
        file="$(basename "$what")" directory="$(basename "$(cd "$(dirname "$what")" && pwd)")"
        name="$(printf '%s' "$directory-${file%.yaml}" | tr -c '[:alnum:]._-' -)"
        config=("${what#"$ROOT"/}") options=()
        for word in "$@"; do # both benches are of the same run, wherever its overrides stand
            if [[ "$word" == *=* && "$word" != -* ]]; then config+=("$word"); else options+=("$word"); fi
        done
        bench "$name/train" train "${config[@]}" ${options[@]+"${options[@]}"}
        bench "$name/prefill" prefill "${config[@]}"
        ;;
esac

if [[ "${#failed[@]}" -gt 0 ]]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
