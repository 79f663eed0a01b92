"""Model settings that a source records besides tensors, and vit_jax runs as a source."""

import json
import shutil

import pytest
import safetensors.numpy
from small_models import GOOGLE, make_trained, random_model, same_bits, save_tensors

import vit_jax
from vit_jax.errors import UserError
from vit_jax.train import train
from vit_jax.weights import layouts, save_weights


def test_unrecorded_num_heads_is_an_argument_or_the_published_number(tmp_path):
    path = tmp_path / "timm.safetensors"
    save_tensors(path, layouts.from_params(random_model()[1], layouts.TIMM, num_heads=3))
    with pytest.raises(UserError, match=r"does not record a number of heads .*: pass num_heads"):
        vit_jax.load_weights(path)
    with pytest.raises(UserError, match=r"width 24.*\(got 5\)"):
        vit_jax.load_weights(path, num_heads=5)
    save_tensors(path, layouts.from_params(random_model(width=192)[1], layouts.TIMM, num_heads=3))
    assert vit_jax.load_weights(path).model["num_heads"] == 3  # ViT-Ti


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("config", "image_size", "16"),
        ("config", "image_size", [12, 12, 3]),
        ("config", "hidden_act", ["gelu"]),
        ("config", "num_attention_heads", "2"),
        ("config", "layer_norm_eps", None),
        ("config", "id2label", {"a": "cat"}),
        ("config", "id2label", ["cat"]),
        ("preprocessor_config", "image_mean", 0.5),
    ],
)
def test_hugging_face_value_of_the_wrong_type_is_rejected_in_one_line(tmp_path, name, field, value):
    tensors = layouts.from_params(random_model()[1], layouts.HUGGINGFACE, num_heads=3)
    save_tensors(tmp_path / "model.safetensors", tensors)
    fields = {"model_type": "vit", "num_attention_heads": 3, "image_size": 12}
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    assert vit_jax.load_weights(tmp_path).preprocessing["mean"] == [0.5] * 3
    changed = (fields if name == "config" else pixels) | {field: value}
    (tmp_path / f"{name}.json").write_text(json.dumps(changed))
    with pytest.raises(UserError) as error:
        vit_jax.load_weights(tmp_path)
    assert f"/{name}.json: {field} {value!r} is not supported" in str(error.value)
    assert "\n" not in str(error.value)


def test_recorded_num_heads_must_divide_the_width(tmp_path):
    tensors = layouts.from_params(random_model()[1], layouts.HUGGINGFACE, num_heads=3)
    save_tensors(tmp_path / "model.safetensors", tensors)
    fields = {"model_type": "vit", "num_attention_heads": 5, "image_size": 12}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"width 24.*\(got 5\)"):
        vit_jax.load_weights(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_shape", [8, 8]),
        ("image_shape", []),
        ("model", {"patch_size": 0}),
        ("model", {"gelu": "fast"}),
        ("class_names", 5),
    ],
)
def test_damaged_metadata_of_our_file_is_rejected_in_one_line(tmp_path, field, value):
    save_weights(make_trained(), tmp_path / "vit.safetensors", "safetensors")
    with safetensors.safe_open(tmp_path / "vit.safetensors", framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        saved = json.loads(file.metadata()["vit_jax"])
    changed = {**saved["model"], **value} if field == "model" else value
    metadata = {"vit_jax": json.dumps(saved | {field: changed})}
    safetensors.numpy.save_file(tensors, tmp_path / "bad.safetensors", metadata)
    with pytest.raises(UserError) as error:
        vit_jax.load_weights(tmp_path / "bad.safetensors")
    assert "\n" not in str(error.value)


def test_home_directory_is_expanded(tmp_path, monkeypatch):
    _, params = random_model(**GOOGLE)
    tensors = layouts.from_params(params, layouts.GOOGLE, num_heads=3)
    save_tensors(tmp_path / "google.npz", tensors)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert same_bits(vit_jax.load_weights("~/google.npz").params, params)


def test_runs_and_checkpoints_are_sources(tiny_config, tmp_path):
    tiny_config.steps, tiny_config.model.pool, tiny_config.model.stem = 2, "gap", "conv"
    train(tiny_config, tmp_path / "run")
    model, params, _ = vit_jax.load(tmp_path / "run")
    for path in ("run", "run/checkpoints/2"):
        got = vit_jax.load_weights(tmp_path / path)
        assert same_bits(got.params, params)
        assert got.make_model() == model.clone(weight_init="trunc_normal")
        assert (got.class_names, got.grid) == (["blue", "green", "red"], (2, 2))
    (tmp_path / "seeds" / "seed_4").mkdir(parents=True)
    with pytest.raises(UserError, match="a run of several seeds; pass one of seed_4"):
        vit_jax.load_weights(tmp_path / "seeds")
    kept = tmp_path / "run" / "checkpoints" / "2"
    shutil.rmtree(kept / "params" / "d")
    with pytest.raises(UserError, match=r"checkpoints/2 is corrupted: .* is missing"):
        vit_jax.load_weights(tmp_path / "run")
