#!/usr/bin/env bash
# The Python inside the image of container.def, for LLAVA_PDROP_PYTHON: launchers (Slurm, torchrun by hand) stay outside,
# training processes run inside. Not run yet: no Apptainer was available.
#
#   LLAVA_PDROP_IMAGE    the image, on a disk shared by all nodes
#   APPTAINER_BIND       other directories that the processes need besides the checkout and the home directory, e.g. /data
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
IMAGE="${LLAVA_PDROP_IMAGE:-}"

fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

command -v apptainer >/dev/null || fail "apptainer is not installed here (on many clusters: module load apptainer)"
[[ -n "$IMAGE" ]] || fail "LLAVA_PDROP_IMAGE does not say which image: apptainer build IMAGE.sif scripts/container.def"
[[ -e "$IMAGE" ]] || fail "LLAVA_PDROP_IMAGE=$IMAGE does not exist: apptainer build $IMAGE scripts/container.def"
exec apptainer exec --nv --bind "$ROOT" --pwd "$PWD" "$IMAGE" /opt/venv/bin/python "$@"
