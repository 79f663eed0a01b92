"""The evaluate command: its table and its JSON object."""

import json
import shutil

import pytest

from vit_jax.commands import evaluate


def test_table_has_intervals_classes_and_confusions(tiny_run, tiny_folder, tmp_path, capsys):
    for name in ("red", "blue"):  # the model has blue, green, red
        shutil.copytree(tiny_folder / "test" / name, tmp_path / name)
    evaluate.main(["--workdir", str(tiny_run), "--data", str(tmp_path)])
    heading, summary, _, header, *classes = capsys.readouterr().out.splitlines()
    assert heading.startswith("train of") and heading.endswith("step 12")
    assert "95% interval" in summary and "20 images" in summary
    assert header.split()[:2] == ["class", "accuracy"]
    assert [line.split()[0] for line in classes] == ["blue", "green", "red"]
    assert classes[1].split() == ["green", "-", "0"]


def test_json_matches_the_result_of_training(tiny_run, capsys):
    evaluate.main(["--workdir", str(tiny_run), "--json"])
    printed = json.loads(capsys.readouterr().out)
    result = json.loads((tiny_run / "result.json").read_text())
    assert (printed["split"], printed["step"], printed["count"]) == ("test", 12, 30)
    assert printed["accuracy"] == result["test_accuracy"]
    assert printed["loss"] == pytest.approx(result["test_loss"], rel=1e-5)
