#!/usr/bin/env bash
# Installs another release of transformers beside the environment, and prints the directory to put before it:
#   PYTHONPATH=$(bash scripts/overlay.sh 5.24) python ...
# What that release needs in another version than the environment has comes along; anything else that does not fit is an
# error. The environment itself is left as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
release=${1:?name a release of transformers, e.g. 5.24}
venv=${LLAVA_PDROP_VENV:-.venv}
python=$venv/bin/python
overlay=$PWD/$venv/overlays/transformers-$release
[[ $venv == /* ]] && overlay=$venv/overlays/transformers-$release

if [[ ! -f $overlay/.complete ]]; then
    rm -rf "$overlay"
    packages=("transformers==$release.*")
    # This one does not know huggingface-hub 2.
    [[ $release == 5.17 ]] && packages+=("huggingface-hub>=1.5,<2")
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$overlay" "${packages[@]}" >&2
    found=$(PYTHONPATH=$overlay "$python" -m pip check 2>&1 | grep -i transformers || true)
    if [[ -n $found ]]; then
        rm -rf "$overlay"
        echo "error: transformers $release does not fit this environment: $found" >&2
        exit 2
    fi
    touch "$overlay/.complete"
fi
echo "$overlay"
