#!/usr/bin/env bash
# Trains every variant of an ablation, one after the other, and writes one table: bash scripts/ablate.sh [ABLATION] [key=value ...]
# Default: ratios and stages on the embedded data. `--plan` lists the variants and trains nothing; `checkpoint=RUN` evaluates
# one trained model with every schedule instead. Start it again to resume. GPUs and nodes: launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
source "$ROOT/scripts/launch.sh"
launch ablate configs/ablations/tiny.yaml "$@"
