#!/usr/bin/env bash
# Clones the last commit of this checkout into a temporary directory and runs the README's first ```bash block there, as
# a newcomer would (its `git clone` and `cd` lines are what this script does itself).
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

git clone --quiet "$ROOT" "$work/clone"
cd "$work/clone"
commands="$(awk '/^```bash/ {inside = 1; next} /^```/ {if (inside) exit} inside' README.md | grep -vE '^ *(git clone|cd) ' || true)"
if [[ -z "$commands" ]]; then
    printf 'error: README.md has no ```bash block with commands\n' >&2
    exit 2
fi
unset LLAVA_PDROP_VENV
printf 'running in a clean clone:\n%s\n' "$commands"
start="$SECONDS"
bash -euo pipefail -c "$commands"
printf 'README commands done in %d s\n' "$((SECONDS - start))"
