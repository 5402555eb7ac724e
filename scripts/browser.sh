#!/usr/bin/env bash
# Prints the Chromium that tests/browser drive; where none is installed, Debian's is (by root).
set -euo pipefail
found=$(command -v "${LLAVA_PDROP_CHROMIUM:-chromium}" || command -v chromium-browser || true)
if [[ -z $found ]]; then
    if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
        echo "error: no chromium here: install it (Debian: apt-get install chromium), or name one: LLAVA_PDROP_CHROMIUM" >&2
        exit 2
    fi
    { apt-get -qq update && apt-get -qq install --no-install-recommends --yes chromium; } >&2
    found=$(command -v chromium)
fi
echo "$found"
