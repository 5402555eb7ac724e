#!/usr/bin/env bash
# Trains with PyramidDrop, evaluates and compares: bash scripts/finetune_pdrop.sh [CONFIG] [section.key=value ...]
# Default: the embedded example, on any laptop. Sets up .venv first where needed. One process, all GPUs of a machine, or
# several machines: launch.sh says what is looked for, environment.sh and setup.sh which variables there are.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
source "$ROOT/scripts/launch.sh"
launch compare configs/tiny/finetune_pdrop.yaml "$@"
