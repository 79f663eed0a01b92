#!/usr/bin/env bash
# Makes the environment if it is missing, then runs COMMAND in it:
#
#     ./launch.sh python -m vit_jax.main --config configs/cifar10_vit.py
#     ./launch.sh pytest
#
# One process per host, which uses all its GPUs. Several hosts (docs/multi_host.md):
#
#     srun ./launch.sh python -m vit_jax.main ...                                (SLURM)
#     COORDINATOR=host:port NUM_PROCESSES=n PROCESS_ID=i ./launch.sh python ...  (on each host)
#
# PYTHON names the interpreter (3.11 or newer), VENV the environment's folder. CUDA=12, 13, or none
# selects JAX's wheels; by default they are the newest that the NVIDIA driver and every GPU support.
# EXTRAS lists the extras of pyproject.toml to install (default: dev,prepare).
#
# This script never changes a complete environment, so a running job keeps the packages it started
# with. The folder, .venvs/KIND-HASH, is named by what determines its contents: the CUDA version,
# the interpreter, the architecture, the requirements, and the checkout's path. If one of them
# differs (another kind of node on a shared file system, an update, a moved checkout), another
# environment is made next to it. Delete old ones when no job runs in them.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)

if [ $# -eq 0 ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
fi

fail() {
    echo "error: $1" >&2
    exit 2
}

# The CUDA version of JAX's wheels: 13 needs driver 580 and compute capability 7.5, 12 driver 525.
detect_cuda() {
    local driver capability # of the oldest GPU; nvidia-smi rejects compute_cap before driver 510
    IFS=', ' read -r driver capability < <(
        { query driver_version,compute_cap || query driver_version; } | sed -n '/^[0-9]/p' | sort -t, -k2V
    ) || true
    if [ -z "$driver" ]; then
        echo none
    elif ! at_least 525 "$driver"; then
        fail "the NVIDIA driver $driver is too old for JAX: install 525 or newer (580 for CUDA 13), or use the CPU with CUDA=none"
    elif at_least 580 "$driver" && at_least 7.5 "$capability"; then
        echo 13
    else
        echo 12
    fi
}
query() { nvidia-smi --query-gpu="$1" --format=csv,noheader 2>/dev/null; }
at_least() { printf '%s\n' "$@" | sort -V -C; }

cuda=${CUDA:-$(detect_cuda)}
extras=${EXTRAS:-dev,prepare}
case $cuda in
12 | 13) kind=cuda$cuda extras=$extras,cuda$cuda ;;
none) kind=cpu ;;
*) fail "CUDA must be 12, 13, or none (CPU wheels); got $cuda" ;;
esac
[ "${CUDA:-}" != none ] || export JAX_PLATFORMS=cpu # without it, a GPU that is not used is an error

python=
candidates=(python3 python3.13 python3.12 python3.11)
[ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
for candidate in "${candidates[@]}"; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] ||
    fail "Python 3.11 or newer is needed (tried: ${candidates[*]}); name one with PYTHON=..."

hash=$("$python" -I - "$extras" "$root" <<'PYTHON'
import hashlib, sys, sysconfig, tomllib

with open(f"{sys.argv[2]}/pyproject.toml", "rb") as f:
    made_from = tomllib.load(f)
made_from["tool"] = made_from.get("tool", {}).get("hatch")  # not the settings of pytest and ruff
interpreter = (sys.base_prefix, sys.version_info[:2], sysconfig.get_platform())
print(hashlib.sha256(repr((sys.argv[1:], interpreter, made_from)).encode()).hexdigest()[:10])
PYTHON
)
venv=${VENV:-$root/.venvs/$kind-$hash}
venv=${venv%/}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac

# The state, in one file next to the environment, is the lock too: a hash once it is complete.
complete() { [ "$(cat "$venv.state" 2>/dev/null)" = "$hash" ] && [ -x "$venv/bin/python" ]; }

install() {
    local see_gpu='import jax; jax.devices("cuda")'
    # A job may run in any environment except one whose installation was interrupted.
    if [ -n "$(ls -A "$venv" 2>/dev/null)" ] && [ "$(cat "$venv.state")" != incomplete ]; then
        fail "$venv was not made for this checkout, interpreter, and requirements: name another folder with VENV, or delete it when no job runs in it"
    fi
    echo "Making the environment $venv with $("$python" --version) [$extras]: at least 3 GB, minutes ..." >&2
    echo incomplete >"$venv.state"
    "$python" -m venv --clear "$venv" ||
        fail "'$python -m venv' failed: on Debian and Ubuntu, apt install python3-venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile -e "$root[$extras]" >&2
    echo "$hash" >"$venv.state"
    if [ "$cuda" != none ] && ! env -u JAX_PLATFORMS "$venv/bin/python" -c "$see_gpu" >/dev/null 2>&1; then
        echo "WARNING: JAX sees no GPU with its CUDA $cuda wheels; to see why, run $venv/bin/python -c '$see_gpu'" >&2
    fi
    local all=("$root"/.venvs/*/)
    [ -n "${VENV:-}" ] || [ ${#all[@]} -eq 1 ] ||
        echo "${#all[@]} environments are in $root/.venvs: delete those that no job or node needs" >&2
}

if ! complete; then
    mkdir -p "$(dirname "$venv")"
    exec 9>>"$venv.state"
    flock --nonblock 9 || { echo "Waiting for the process that makes $venv ..." >&2 && flock 9; }
    complete || install
    exec 9>&-
fi

# Huge pages for large arrays: on a CPU a step otherwise spends a fifth of its time on page faults
# (docs/performance.md). Only glibc reads it.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv"
export VIT_JAX_LAUNCHER="$root/launch.sh" # for the commands that are printed
exec "$@"
