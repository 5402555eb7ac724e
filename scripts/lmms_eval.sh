#!/usr/bin/env bash
# Installs lmms-eval beside the environment, and prints the directory to put before it:
#   PYTHONPATH=$(bash scripts/lmms_eval.sh) .venv/bin/python -m lmms_eval --model llava_pdrop ...
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/beside.sh" lmms-eval
