"""The export command: formats, suffixes, and its output."""

import json
import subprocess
import sys

import pytest
from small_models import same_bits

import vit_jax
from vit_jax.errors import UserError
from vit_jax.export import parse_format
from vit_jax.train import train


def test_format_and_suffix_must_agree():
    assert parse_format("a/vit.pt", None) == "notebook"
    assert (
        parse_format("vit.pt", "timm") == "timm" and parse_format("folder", None) == "huggingface"
    )
    with pytest.raises(UserError, match=r"ends in \.pt, \.safetensors, \.npz, \.jax"):
        parse_format("vit.onnx", None)
    with pytest.raises(UserError, match=r"--format google is written to \.npz"):
        parse_format("vit.pt", "google")


def test_export_command(tiny_config, tmp_path):
    tiny_config.steps = 2
    train(tiny_config, tmp_path / "run")

    folder = tmp_path / "folder"
    base = [sys.executable, "-m", "vit_jax.export", "--workdir", str(tmp_path / "run"), "--to"]
    done = subprocess.run([*base, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder}: step 2 of {tmp_path / 'run'}, as huggingface\n"
    saved = json.loads((folder / "config.json").read_text())
    assert saved["id2label"] == {"0": "blue", "1": "green", "2": "red"}
    assert same_bits(vit_jax.load_weights(folder).params, vit_jax.load(tmp_path / "run").params)
    # A second run does not overwrite it.
    done = subprocess.run([*base, str(folder)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: {folder} exists: give another name, or delete it\n"
