#!/usr/bin/env bash
# Creates the virtual environment of this checkout and installs the project with its tested versions.
# A second run finds the stamp of the first and exits at once. Nothing outside the environment is changed.
#
#   PYTHON              interpreter to use (3.11 or newer); default: the first one found
#   LLAVA_PDROP_VENV    directory of the environment; default: .venv in the checkout
#   CONSTRAINTS         file of versions, relative to here or to the checkout; default: the one used before, else
#                       scripts/constraints.txt. For GPUs: CONSTRAINTS=scripts/constraints-cuda.txt
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${LLAVA_PDROP_VENV:-$ROOT/.venv}"
[[ "$VENV" == /* ]] || VENV="$PWD/$VENV"
EXTRAS="data,test"
STAMP="$VENV/.llava_pdrop_stamp"
CHOICE="$VENV/.llava_pdrop_constraints" # the scripts that come here later do not say it again

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

if [[ -n "${CONSTRAINTS:-}" ]]; then
    pins="$CONSTRAINTS"
    if [[ "$pins" != /* && -f "$pins" ]]; then pins="$PWD/$pins"; fi
elif [[ -f "$CHOICE" ]]; then
    pins="$(cat "$CHOICE")"
else
    pins="scripts/constraints.txt"
fi
pins="${pins#"$ROOT"/}" # a file of the checkout is remembered by its place in it
choice="$pins"
[[ "$pins" == /* ]] || pins="$ROOT/$pins"
[[ -f "$pins" ]] || fail "there is no file $pins: name one, such as CONSTRAINTS=scripts/constraints-cuda.txt"

# What the environment depends on, its path included: it does not survive being moved.
fingerprint() {
    { printf '%s\n' "$ROOT" "$EXTRAS"; cat "$ROOT/setup.py" "$pins"; } | cksum
}

is_ready() { [[ -x "$VENV/bin/python" && -f "$STAMP" && "$(cat "$STAMP")" == "$(fingerprint)" ]]; }

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    local candidate
    if [[ -n "${PYTHON:-}" ]]; then
        command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is not a program"
        is_recent "$PYTHON" || fail "PYTHON=$PYTHON is not Python 3.11 or newer"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.14 python; do
        if is_recent "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer found: install one, or name it with PYTHON=/path/to/python"
}

# One step: its name, then its command. Output is shown only on failure.
step() {
    local name="$1" log
    shift
    say "$name"
    log="$(mktemp)"
    if ! "$@" >"$log" 2>&1; then
        cat "$log" >&2
        rm -f "$log"
        fail "setup stopped at: $name"
    fi
    rm -f "$log"
}

is_ready && exit 0

python="$(find_python)"
mkdir -p "$VENV"
# If two setups run at once, the second waits here. The lock belongs to the open file, so it outlives the Python that
# takes it.
exec 9>"$VENV/.llava_pdrop_lock"
"$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)' || say "no file locks here: do not run two setups at once"
is_ready && exit 0

if ! [[ -x "$VENV/bin/python" ]] || ! is_recent "$VENV/bin/python"; then
    "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
        fail "$python cannot make virtual environments: install its venv package (python3-venv on Debian and Ubuntu)"
    step "virtual environment with $("$python" -V 2>&1) in $VENV" "$python" -m venv "$VENV"
fi
rm -f "$STAMP"
printf '%s\n' "$choice" >"$CHOICE"
pip=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c "$pins")
step "PyTorch" "${pip[@]}" torch
cd "$ROOT"
step "the project and what it needs" "${pip[@]}" -e ".[$EXTRAS]"
fingerprint >"$STAMP"
say "ready: $VENV"
