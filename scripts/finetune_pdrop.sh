#!/usr/bin/env bash
# Trains with PyramidDrop, evaluates and compares: bash scripts/finetune_pdrop.sh [CONFIG] [section.key=value ...]
# Default: the embedded example, on any laptop. Creates .venv first if needed. Uses one process, all GPUs of a machine, or
# several machines: launch.sh documents how they are detected, environment.sh and setup.sh list the variables.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
source "$ROOT/scripts/launch.sh"
launch compare configs/tiny/finetune_pdrop.yaml "$@"
