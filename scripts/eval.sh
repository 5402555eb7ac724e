#!/usr/bin/env bash
# Evaluates a finished run in one process: bash scripts/eval.sh RUN_DIRECTORY_OR_CONFIG [section.key=value ...]
# Default: the run that finetune_pdrop.sh leaves. See environment.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
source "$ROOT/scripts/launch.sh"
export NPROC_PER_NODE=1 NNODES=1
unset SLURM_JOB_NUM_NODES SLURM_STEP_ID HOSTFILE TORCHRUN_ARGS
launch eval checkpoints/tiny/finetune_pdrop/pyramid_drop "$@"
