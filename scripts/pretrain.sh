#!/usr/bin/env bash
# Trains stage 1, the projector: bash scripts/pretrain.sh [CONFIG] [section.key=value ...]
# Default: the embedded example. See launch.sh for GPUs and nodes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
source "$ROOT/scripts/launch.sh"
launch train configs/tiny/pretrain.yaml "$@"
