"""The evaluate command: its table and its JSON object."""

import json
import shutil

import pytest

from vit_jax.commands import evaluate, report


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


def test_classes_without_names_are_taken_by_number(tiny_run, tiny_folder, tmp_path, capsys):
    for number, name in enumerate(("blue", "green", "red")):  # the model's order
        shutil.copytree(tiny_folder / "test" / name, tmp_path / str(number))
    evaluate.main(["--workdir", str(tiny_run), "--data", str(tmp_path), "--json"])
    printed = capsys.readouterr()
    assert "have no names: they are matched by number" in printed.err
    result = json.loads((tiny_run / "result.json").read_text())
    assert json.loads(printed.out)["accuracy"] == result["test_accuracy"]


def test_corruptions_are_tabulated_and_saved_for_the_report(tiny_run, tmp_path, capsys):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    evaluate.main(["--workdir", str(run), "--corruptions"])
    printed = capsys.readouterr().out
    saved = json.loads((run / "corruptions.json").read_text())
    result = json.loads((run / "result.json").read_text())
    assert saved["errors"]["clean"] == pytest.approx([1 - result["test_accuracy"]])
    assert saved["step"] == 12 and len(saved["errors"]["jpeg"]) == 5
    assert "error on corrupted images" in printed and "gaussian_noise" in printed
    report.main(["--workdir", str(run)])
    page = (run / "report" / "index.html").read_text()
    assert "<h2>Robustness</h2>" in page and f"Error on test of {saved['source']}" in page
