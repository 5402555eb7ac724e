#!/usr/bin/env bash
# Trains stage 2 (stage 1 first if it is missing): bash scripts/finetune.sh [CONFIG] [section.key=value ...]
# Default: the embedded example with PyramidDrop; `pyramid_drop=null output_dir=DIR` trains it vanilla. See launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
source "$ROOT/scripts/launch.sh"
launch train configs/tiny/finetune_pdrop.yaml "$@"
