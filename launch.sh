#!/usr/bin/env bash
# Makes the environment when it is missing or pyproject.toml changed, then runs COMMAND in it:
#
#     ./launch.sh python -m vit_jax.main --config configs/cifar10_vit.py
#     ./launch.sh pytest
#
# One process a host, which takes all its GPUs. Several hosts (docs/multi_host.md):
#
#     srun ./launch.sh python -m vit_jax.main ...                                (SLURM)
#     COORDINATOR=host:port NUM_PROCESSES=n PROCESS_ID=i ./launch.sh python ...  (on each host)
#
# PYTHON chooses the interpreter (3.11 or newer), VENV the environment's folder (.venv here).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${VENV:-$root/.venv}

if [ $# -eq 0 ]; then
    sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
fi

extras=dev,prepare
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    extras=$extras,cuda12
fi

find_python() {
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.11 or newer is needed (tried: ${PYTHON:-python3 python3.13 python3.12 python3.11}); name one with PYTHON=..." >&2
    exit 2
}

install() {
    local python
    python=$(find_python)
    echo "Making the environment $venv with $("$python" --version) [$extras] ..." >&2
    if ! "$python" -m venv --clear "$venv"; then
        echo "error: '$python -m venv' failed: on Debian and Ubuntu, apt install python3-venv" >&2
        exit 2
    fi
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$root[$extras]" >&2
    echo "$stamp" >"$venv/.stamp"
}

stamp="$extras $(sha256sum <"$root/pyproject.toml")"
if [ "$(cat "$venv/.stamp" 2>/dev/null)" != "$stamp" ]; then
    mkdir -p "$(dirname "$venv")"
    exec 9>"$venv.lock"
    flock 9 # of several processes on one host, one installs and the others wait
    [ "$(cat "$venv/.stamp" 2>/dev/null)" = "$stamp" ] || install
    exec 9>&-
fi

# Huge pages for large arrays: on a CPU a step otherwise spends a fifth of its time on page faults
# (docs/performance.md). glibc alone reads it.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv"
exec "$@"
