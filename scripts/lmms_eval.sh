#!/usr/bin/env bash
# Installs lmms-eval beside the environment, and prints the directory to put before it:
#   PYTHONPATH=$(bash scripts/lmms_eval.sh) .venv/bin/python -m lmms_eval --model llava_pdrop ...
# Only the packages of constraints-lmms-eval.txt come along, without what they ask for: torch, transformers and all others
# are those of the environment, which is left as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${LLAVA_PDROP_VENV:-.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
pins=scripts/constraints-lmms-eval.txt
overlay=$venv/overlays/lmms-eval

if [[ ! -f $overlay/.complete || $(cat "$overlay/.complete") != $(cksum "$pins") ]]; then
    rm -rf "$overlay"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$overlay" -r "$pins" >&2
    cksum "$pins" >"$overlay/.complete"
fi
echo "$overlay"
