#!/usr/bin/env bash
# Trains LoRA adapters with PyramidDrop (stage 1 first where it is missing): scripts/finetune_lora.sh [CONFIG] [key=value ...]
# Default: the embedded example. Any stage-2 config takes adapters by `lora.r=64 output_dir=DIR`. See launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
source "$ROOT/scripts/launch.sh"
launch train configs/tiny/finetune_lora_pdrop.yaml "$@"
