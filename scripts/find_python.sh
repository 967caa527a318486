#!/usr/bin/env bash
# Print a Python >= 3.12 with venv: $PYTHON, then PATH, then pyenv. Exit 1 with what to do when there is none.
set -u

good() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null
}

candidates=()
[ -n "${PYTHON:-}" ] && candidates+=("$PYTHON")
for name in python3.12 python3.13 python3.14 python3 python; do
    # -a: a pyenv shim that fails must not hide a system Python behind it
    while read -r path; do candidates+=("$path"); done < <(type -aP "$name")
done
root=${PYENV_ROOT:-$(pyenv root 2>/dev/null || echo "$HOME/.pyenv")}
for path in "$root"/versions/3.1[2-9]*/bin/python; do candidates+=("$path"); done

for path in "${candidates[@]}"; do
    if good "$path"; then echo "$path"; exit 0; fi
done
printf "%s\n" "error: no Python >= 3.12 with the venv module was found on PATH or in pyenv (megatron-core >= 0.17 needs 3.12)." \
    "fix:   install one (for instance: pyenv install 3.12) or name it: make setup PYTHON=/path/to/python3.12" >&2
exit 1
