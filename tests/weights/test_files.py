"""Weight files that are corrupted, contain code, or are not weight files."""

import pathlib
import pickle

import numpy as np
import pytest
from small_models import random_model, save_tensors

import vit_jax
from vit_jax.errors import UserError
from vit_jax.weights import layouts


class Payload:
    def __reduce__(self):
        return (pathlib.Path.touch, (pathlib.Path("executed"),))


@pytest.mark.parametrize("name", ["f.npz", "f.safetensors"])
def test_corrupted_files_are_reported_in_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    layout = layouts.GOOGLE if name.endswith("npz") else layouts.TIMM
    path = save_tensors(
        tmp_path / name, layouts.from_params(random_model()[1], layout, num_heads=3)
    )
    complete = path.read_bytes()
    for content in (b"", b"nonsense", complete[: len(complete) // 2], pickle.dumps(Payload())):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is corrupted") as error:
            vit_jax.load_weights(path)
        assert "\n" not in str(error.value)
    assert not pathlib.Path("executed").exists()


def test_pickled_objects_are_rejected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "f.npz", a=np.array([Payload()], object))
    with pytest.raises(UserError, match="corrupted, or contains more than arrays"):
        vit_jax.load_weights(tmp_path / "f.npz")
    assert not pathlib.Path("executed").exists()


def test_paths_without_weights_are_rejected(tmp_path):
    (tmp_path / "w.txt").touch()
    cases = {"no.npz": "does not exist", "w.txt": "must end in", "": "contains no weights"}
    cases["typo"] = "does not exist"
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            vit_jax.load_weights(tmp_path / name)
