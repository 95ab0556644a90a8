#!/usr/bin/env bash
# Make (once) this checkout's Python 3.13 environment, link .venv to it, and run the given command inside it.
#   bash setup_env.sh                     set up only; then: source .venv/bin/activate
#   bash setup_env.sh python main.py      set up, then run
# NN_VENV_HOME    where environments live (default ~/.cache/nn_decompositions/venvs: local disk, one per checkout)
# TORCH_INDEX_URL another index for torch, e.g. the one of a CUDA 12.4 build
# SPD_DIR         a checkout of the goodfire spd repository, installed too if it is there (default ../spd; not needed)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
home=${NN_VENV_HOME:-$HOME/.cache/nn_decompositions/venvs}
spd=${SPD_DIR:-$here/../spd}

# OpenMP's threads spin while they wait for each other: where two jobs share the cores, most of the time goes there
threads_sleep='export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}'

runs() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 13))' >/dev/null 2>&1; } # a shim may exist and refuse

find_python() {
    local candidate
    for candidate in "$(command -v python3.13 || true)" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python3.13; do
        if [ -n "$candidate" ] && runs "$candidate"; then echo "$candidate"; return; fi
    done
    candidate=$(uv python find 3.13 2>/dev/null || true)
    if [ -z "$candidate" ] && uv python install 3.13 >&2; then candidate=$(uv python find 3.13); fi
    if [ -z "$candidate" ] && command -v add-apt-repository >/dev/null && [ "$(id -u)" = 0 ]; then
        add-apt-repository -y ppa:deadsnakes/ppa >&2 && apt-get install -y python3.13 python3.13-venv >&2 \
            && candidate=$(command -v python3.13)
    fi
    if [ -n "$candidate" ] && runs "$candidate"; then echo "$candidate"; return; fi
    echo "setup_env.sh: found no Python 3.13. Install it (e.g. 'pyenv install 3.13' or 'uv python install 3.13')." >&2
    exit 1
}

hash=$(cat "$here/requirements.txt" "$here/pyproject.toml" <(echo "$here 3.13 ${TORCH_INDEX_URL:-}") | sha256sum | cut -c1-12)
venv=$home/$hash
if [ ! -e "$venv/.complete" ]; then
    if ! command -v uv >/dev/null; then
        bootstrap=$home/uv
        [ -x "$bootstrap/bin/uv" ] || { python3 -m venv "$bootstrap" && "$bootstrap/bin/pip" install -q uv; }
        PATH=$bootstrap/bin:$PATH
    fi
    python=$(find_python)
    echo "setting up $venv" >&2
    rm -rf "$venv" # what an interrupted set-up left
    mkdir -p "$home"
    uv venv -q --python "$python" "$venv"
    export VIRTUAL_ENV=$venv
    if [ -n "${TORCH_INDEX_URL:-}" ]; then uv pip install -q torch --index-url "$TORCH_INDEX_URL"; fi
    uv pip install -q -r "$here/requirements.txt"
    uv pip install -q --no-deps --compile-bytecode -e "$here" # all packages': else every start compiles what it imports, where
    # PYTHONDONTWRITEBYTECODE is set
    if [ -e "$spd/pyproject.toml" ]; then uv pip install -q --no-deps -e "$spd"; fi
    echo "$threads_sleep" >> "$venv/bin/activate"
    touch "$venv/.complete"
fi
ln -sfn "$venv" "$here/.venv"

if [ $# -gt 0 ]; then
    export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH:$home/uv/bin # uv too, for the optional requirements
    eval "$threads_sleep"
    exec "$@"
fi
