#!/usr/bin/env bash
# Evaluates a finished run: bash scripts/eval.sh RUN_DIRECTORY_OR_CONFIG [section.key=value ...]
# All GPUs (see launch.sh) share the questions. Default: the run of finetune_pdrop.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
source "$ROOT/scripts/launch.sh"
launch eval checkpoints/tiny/finetune_pdrop/pyramid_drop "$@"
