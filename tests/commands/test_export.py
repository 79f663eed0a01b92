"""The export command: formats, suffixes, and its output."""

import json
import shutil

import pytest
from small_models import same_bits

import vit_jax
from vit_jax.commands import export
from vit_jax.errors import UserError


def test_format_and_suffix_must_agree():
    assert export.parse_format("a/vit.pt", None) == "notebook"
    assert export.parse_format("vit.pt", "timm") == "timm"
    assert export.parse_format("folder", None) == "huggingface"
    with pytest.raises(UserError, match=r"ends in \.pt, \.safetensors, \.npz, \.jax"):
        export.parse_format("vit.h5", None)
    with pytest.raises(UserError, match=r"--format google is written to \.npz"):
        export.parse_format("vit.pt", "google")


def test_export_writes_the_runs_weights_and_never_overwrites(tiny_run, tmp_path, capsys):
    folder = tmp_path / "folder"
    argv = ["--workdir", str(tiny_run), "--to", str(folder)]
    export.main(argv)
    assert capsys.readouterr().out == f"{folder}: step 12 of {tiny_run}, as huggingface\n"
    saved = json.loads((folder / "config.json").read_text())
    assert saved["id2label"] == {"0": "blue", "1": "green", "2": "red"}
    assert same_bits(vit_jax.load_weights(folder).params, vit_jax.load(tiny_run).params)
    card = (folder / "README.md").read_text()
    result = json.loads((tiny_run / "result.json").read_text())
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"# {tiny_run.name}\n" in card and "| step | 12 |" in card
    assert f"| test accuracy | {result['test_accuracy']:.2%} (95% interval " in card
    assert "| command | python -m vit_jax.main --config" in card
    assert "model.width = 16\n" in card and "model.qk_norm" not in card
    with pytest.raises(UserError, match=f"{folder} exists: give another name, or delete it"):
        export.main(argv)


@pytest.mark.parametrize("file", ["run.json", "result.json"])
def test_corrupted_record_is_reported_before_anything_is_written(tiny_run, tmp_path, file):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / file).write_text("[]")
    with pytest.raises(UserError, match=f"{file} must contain a JSON object, not list"):
        export.main(["--workdir", str(run), "--to", str(tmp_path / "folder")])
    assert not (tmp_path / "folder").exists()
