#!/usr/bin/env bash
# Trains two steps on 8 (virtual) devices, then restores the weights and predicts on 1 and on 3 in a
# fresh environment that contains only jax, orbax, and numpy (from the package index):
#
#     ./launch.sh scripts/clean_restore.sh [EXISTING_CLEAN_PYTHON]
#
# Exits 0 if the probabilities on 1 and on 3 devices equal vit_jax's to 4 decimals. Always uses the CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
export JAX_PLATFORMS=cpu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

clean=${1:-$folder/venv/bin/python}
if [ $# -eq 0 ]; then
    python -m venv "$folder/venv"
    "$clean" -m pip install --quiet --disable-pip-version-check \
        "jax==$(python -c 'import jax; print(jax.__version__)')" \
        "orbax-checkpoint==$(python -c 'from importlib import metadata as m; print(m.version("orbax-checkpoint"))')"
fi
! "$clean" -c 'import flax' 2>/dev/null || { echo "error: $clean contains flax" >&2; exit 2; }

XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m vit_jax.main \
    --config configs/shapes10_vit.py --workdir "$folder/run" --config.steps=2 --config.optim.warmup= \
    --config.model.depth=2 --config.data.test_split='test[:100]' | grep -E '^(devices|Test)'
python - "$folder/run" >"$folder/expected" <<'PYTHON'
import sys

import jax
import numpy as np

import vit_jax
from vit_jax.augment import normalize

trained = vit_jax.load(sys.argv[1])
black = np.zeros((1, *trained.image_shape), np.uint8)
pixels = normalize(black, trained.config.data.mean, trained.config.data.std)
logits = trained.model.apply({"params": trained.params}, pixels)
for name, p in zip(trained.class_names, jax.nn.softmax(logits)[0], strict=True):
    print(f"{p:.4f} {name}")
PYTHON
cp docs/restore_elsewhere.py "$folder"
for devices in 1 3; do
    (cd "$folder" && XLA_FLAGS=--xla_force_host_platform_device_count=$devices \
        "$clean" -I restore_elsewhere.py run/checkpoints/2) >"$folder/actual"
    diff "$folder/expected" "$folder/actual" && echo "the same on $devices device(s)"
done
