#!/usr/bin/env bash
# Installs the packages of constraints-NAME.txt, here, beside the environment, and prints the directory to put before it:
#   PYTHONPATH=$(bash scripts/beside.sh demo) .venv/bin/llava-pdrop demo
# Only these packages come along, without what they ask for: torch, transformers and all others are those of the
# environment, which is left as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
name=${1:?name one of constraints-NAME.txt, e.g. demo}
venv=${LLAVA_PDROP_VENV:-.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
here=scripts
pins=$here/constraints-$name.txt
overlay=$venv/overlays/$name

if [[ ! -f $overlay/.complete || $(cat "$overlay/.complete") != $(cksum "$pins") ]]; then
    rm -rf "$overlay"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$overlay" -r "$pins" >&2
    cksum "$pins" >"$overlay/.complete"
fi
echo "$overlay"
