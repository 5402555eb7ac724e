#!/usr/bin/env bash
# Trains LoRA adapters with PyramidDrop (stage 1 first if it is missing): scripts/finetune_lora.sh [CONFIG] [key=value ...]
# Default: the embedded example. `lora.r=64 output_dir=DIR` adds adapters to any stage-2 config. GPUs and nodes: launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
source "$ROOT/scripts/launch.sh"
launch train configs/tiny/finetune_lora_pdrop.yaml "$@"
