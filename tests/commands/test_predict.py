"""predict: image files of any size and format, folders, stdin, corrupted files, attention."""

import io
import json
import os
import pathlib
import sys

import numpy as np
import pytest
from PIL import Image

import vit_jax
from vit_jax.augment import normalize
from vit_jax.commands import predict
from vit_jax.errors import UserError, run_command
from vit_jax.inference.classify import prepare


def run(monkeypatch, capsys, *arguments, stdin=""):
    """Runs the command in this process. Returns (lines of stdout, stderr)."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    try:
        predict.main([*map(str, arguments)])
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
    output = capsys.readouterr()
    return output.out.splitlines(), output.err


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Red, green, and blue images of several sizes and formats, in two folders."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more").mkdir()
    red, green, blue = (200, 60, 60), (60, 200, 60), (60, 60, 200)
    Image.new("RGB", (8, 8), red).save(folder / "red.png")
    Image.new("RGB", (300, 200), green).save(folder / "green.jpg")
    Image.new("RGBA", (5, 9), blue).save(folder / "more" / "blue.webp")
    Image.new("RGB", (40, 30), red).quantize().save(folder / "more" / "red.gif")
    (folder / "notes.txt").write_text("ignored")
    return folder


def test_json_for_a_folder_contains_the_models_probabilities(
    tiny_run, pictures, monkeypatch, capsys
):
    monkeypatch.setattr(predict, "BATCH_SIZE", 2)
    arguments = ("--workdir", tiny_run, "--json", "--top", 2, pictures)
    lines, _ = run(monkeypatch, capsys, *arguments)
    answers = {pathlib.Path(t["image"]).name: t["classes"] for t in map(json.loads, lines)}
    best = {name: classes[0]["class"] for name, classes in answers.items()}
    assert best == {"green.jpg": "green", "red.png": "red", "blue.webp": "blue", "red.gif": "red"}
    assert all(len(classes) == 2 for classes in answers.values())
    model, params, config = vit_jax.load(tiny_run)
    image = np.asarray(Image.open(pictures / "red.png"))[None]
    logits = model.apply({"params": params}, normalize(image, config.data.mean, config.data.std))[0]
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert answers["red.png"][0]["probability"] == pytest.approx(expected.max(), abs=1e-5)


def test_paths_on_stdin_continue_after_a_corrupted_file(tiny_run, pictures, monkeypatch, capsys):
    bad = pictures / "notes.txt"
    stdin = f"{pictures / 'red.png'}\n{bad}\n\n{pictures / 'green.jpg'}\n"
    lines, errors = run(monkeypatch, capsys, "--workdir", tiny_run, "-", stdin=stdin)
    assert [line.split()[1] for line in lines] == ["red", "green"]
    assert str(bad) in errors and "1 of 3 files could not be read" in errors
    lines, errors = run(monkeypatch, capsys, "--workdir", tiny_run, "-", stdin="")
    assert lines == [] and "no images given" in errors


def test_attention_writes_one_image_per_input(tiny_run, pictures, monkeypatch, capsys, tmp_path):
    arguments = ("--workdir", tiny_run, "--json", "--attention", tmp_path / "looks", pictures)
    lines, _ = run(monkeypatch, capsys, *arguments)
    paths = [json.loads(line)["attention"] for line in lines]
    assert len(set(paths)) == 4 and "/green-" in paths[0]
    for path in paths:
        with Image.open(path) as picture:  # two layers of two heads, and the top row
            assert picture.size == (2 * 128 + 4, 3 * 128 + 2 * 4)


def test_attention_images_of_similar_and_of_long_paths_are_all_kept(
    tiny_run, pictures, monkeypatch, capsys, tmp_path
):
    names = (
        "a/b.png",
        "a_b.png",
        f"{'x' * 250}.png",
        "/".join(["y" * 200] * 4) + ".png",
        "é" * 120,
    )
    paths = [tmp_path / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((pictures / "red.png").read_bytes())
    arguments = ("--workdir", tiny_run, "--json", "--attention", tmp_path / "looks", *paths)
    lines, errors = run(monkeypatch, capsys, *arguments)
    assert errors == ""
    written = {json.loads(line)["attention"] for line in lines}
    assert len(written) == len(paths) and all(pathlib.Path(path).is_file() for path in written)


def test_a_file_in_place_of_the_attention_folder_is_an_error(
    tiny_run, pictures, monkeypatch, capsys, tmp_path
):
    (tmp_path / "looks").touch()
    arguments = ("--workdir", tiny_run, "--attention", tmp_path / "looks", pictures)
    lines, errors = run(monkeypatch, capsys, *arguments)
    assert lines == [] and f"cannot write {tmp_path / 'looks'}: File exists" in errors


def test_paths_that_are_not_utf8_are_printed_unchanged(tiny_run, pictures, tmp_path, monkeypatch):
    path = os.fsencode(tmp_path) + b"/gr\xfcn.jpg"
    with open(path, "wb") as file:
        file.write((pictures / "green.jpg").read_bytes())
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path + b"\n"), "utf-8"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "utf-8"))
    run_command(predict.main, ["--workdir", str(tiny_run), "-", os.fsdecode(path)])
    sys.stdout.flush()
    assert [line.split()[:2] for line in printed.getvalue().splitlines()] == [[path, b"green"]] * 2


def test_invalid_input_prints_one_line_and_exits_with_2(tiny_run, tmp_path, capsys):
    for arguments, says in (
        ([tmp_path, "x.png"], "no checkpoints"),
        ([tiny_run, tmp_path], "has no images"),
    ):
        with pytest.raises(SystemExit) as end:
            run_command(predict.main, ["--workdir", *map(str, arguments)])
        assert end.value.code == 2
        line = capsys.readouterr().err
        assert says in line and line.count("\n") == 1


def test_prepare_takes_a_centered_crop():
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 200
    assert (prepare(image, (10, 10, 3)) == 200).all()
    assert (prepare(image, (5, 5, 3)) == 200).all()
    assert prepare(image, (4, 8, 3)).shape == (4, 8, 3)
    assert prepare(image, (20, 20, 1)).shape == (20, 20, 1)
    same = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(prepare(same, (8, 8, 3)), same)
