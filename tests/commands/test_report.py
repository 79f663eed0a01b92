"""The report: a self-contained page for any run, and errors for corrupted workdirs."""

import base64
import contextlib
import html
import io
import json
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from vit_jax.commands.report import build, figures, sections
from vit_jax.commands.report import page as page_lib
from vit_jax.commands.report.records import read_records
from vit_jax.errors import UserError
from vit_jax.train import train


def text(page):
    """The visible text of a page."""
    page = re.sub(r"<(style|svg).*?</\1>", "", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page)))


def images_of(page):
    """(kind, bytes) of every image in a page."""
    links = re.findall(r'src="data:image/([^;]*);base64,([^"]*)"', page)
    return [(kind, base64.b64decode(content)) for kind, content in links]


def report_text(workdir, **kwargs):
    """The text of a run's report."""
    return text(build.write_report(workdir, **kwargs).read_text())


@pytest.fixture(scope="module")
def page(tiny_run, tmp_path_factory):
    """The report of a finished run."""
    workdir = tmp_path_factory.mktemp("report") / "tiny"
    shutil.copytree(tiny_run, workdir)
    return build.write_report(workdir)


def test_page_is_self_contained(page):
    content = page.read_text()
    assert "<script" not in content and "@import" not in content and "url(http" not in content
    links = re.findall(r'(?:src|href)="([^"]*)"', content)
    assert links and all(link.startswith("data:") for link in links)
    titles = re.findall(r"<h3>([^<]*)</h3><div class=scroll><(?:img|div class=gallery)", content)
    for title in ("Loss", "Accuracy", "Learning rate", "Confusion", "Patch filters"):
        assert title in titles
    assert "Position embeddings" in titles
    assert sum(", predicted " in title for title in titles) == 3  # attention, one of each class


def test_images_of_the_page_are_complete(page):
    images = images_of(page.read_text())
    assert sum(kind == "svg+xml" for kind, _ in images) == 4
    for kind, content in images:
        if kind == "svg+xml":
            assert content.startswith(b"<?xml") and content.rstrip().endswith(b"</svg>")
        else:
            assert Image.open(io.BytesIO(content)).size > (1, 1)


def test_page_states_the_provenance_of_the_run(page, tiny_run):
    content = text(page.read_text())
    result = json.loads((tiny_run / "result.json").read_text())
    run = json.loads((tiny_run / "run.json").read_text())
    for part in (f"{result['test_accuracy']:.2%}", run["command"], run["date"], ", jax 0."):
        assert part in content
    # Fields that differ from the defaults, and no others.
    assert "field tiny default" in content
    assert "Fields that are not the default" in content
    assert "model.width 16 0" in content and "optim.name" not in content
    assert "This run is" not in content  # no notice


def test_interrupted_run_has_a_notice(tiny_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run, workdir)
    (workdir / "result.json").unlink()
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 8]
    (workdir / "metrics.jsonl").write_text("".join(kept) + '{"step": 10, "train/lo')
    shutil.rmtree(workdir / "checkpoints")
    content = report_text(workdir)
    assert "still training: last logged step 8, 2 of 3 epochs finished" in content
    assert "no checkpoints in" in content


def test_run_without_metrics_has_a_page(tiny_run, tmp_path):
    shutil.copy(tiny_run / "config.json", tmp_path)
    assert "last logged step 0, 0 of 3 epochs finished" in report_text(tmp_path)


def test_notice_names_the_last_bad_batch_of_an_unfinished_run_only(tiny_run, tmp_path):
    def notices():
        return text(sections.notices(read_records(tmp_path / "run"), "run"))

    shutil.copytree(tiny_run, tmp_path / "run")
    (tmp_path / "run" / "bad_batch_5.npz").touch()
    assert "diverged" not in notices()
    (tmp_path / "run" / "result.json").unlink()
    assert "diverged" not in notices()  # it resumed past step 5
    (tmp_path / "run" / "bad_batch_99.npz").touch()
    assert "run diverged at step 99. The batch is in bad_batch_99.npz." in notices()


def test_symbolic_links_in_a_workdir_are_rejected(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("report"))
    folder = tmp_path / "run" / "report"
    folder.symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"report is a symbolic link"):
        build.write_report(tmp_path / "run")
    folder.unlink()
    folder.mkdir()
    (folder / "index.html").symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match=r"index.html is a symbolic link"):
        build.write_report(tmp_path / "run")


@pytest.mark.parametrize("damage", [b'[1]\n{"step": 1, "train/lo', b"\xff\xfe"])
def test_metrics_with_invalid_lines_or_bytes(tiny_run, tmp_path, damage):
    shutil.copytree(tiny_run, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_bytes(damage)
    if damage[0] < 128:
        assert read_records(tmp_path / "run")[0].lines == []
    else:
        with pytest.raises(UserError, match=r"metrics.jsonl is corrupted"):
            read_records(tmp_path / "run")


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("run.json", "[]", "run.json must contain a JSON object, not list"),
        ("run.json", "[" * 100_000, "run.json is corrupted"),
        ("result.json", '{"seconds": "1"}', "result.json must be a number"),
        ("result.json", "7", "result.json must contain a JSON object, not int"),
        (
            "metrics.jsonl",
            '{"step": 1, "a": "b"}',
            "a in .*metrics.jsonl must be a number; got 'b'",
        ),
        ("metrics.jsonl", f'{{"step": 1, "a": 1{"0" * 400}}}', "metrics.jsonl must be a number"),
        ("config.json", "{", "config.json is corrupted"),
        ("corruptions.json", "{}", "corruptions.json is corrupted"),
        ("corruptions.json", '{"errors": {"jpeg": ["a"]}}', "jpeg 0 in .* must be a number"),
        ("profile/operations.json", "{}", "operations.json is corrupted"),
        ("profile/operations.json", '[{"milliseconds": 1}]', "times in .* must be a number"),
    ],
)
def test_files_with_wrong_types_are_errors(tiny_run, tmp_path, file, content, says):
    shutil.copytree(tiny_run, tmp_path / "run")
    (tmp_path / "run" / "profile").mkdir()
    (tmp_path / "run" / file).write_text(content)
    with pytest.raises(UserError, match=says) as error:
        build.write_report(tmp_path / "run")
    assert "\n" not in str(error.value)


def test_a_file_in_place_of_the_report_folder_is_an_error(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("report"))
    (tmp_path / "run" / "report").touch()
    with pytest.raises(UserError, match=r"cannot write .*report: File exists"):
        build.write_report(tmp_path / "run")


def test_a_folder_in_place_of_the_page_is_an_error(tiny_run, tmp_path):
    for file in ("config.json", "run.json", "metrics.jsonl"):
        shutil.copy(tiny_run / file, tmp_path)
    (tmp_path / "report" / "index.html").mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot write .*index.html: Is a directory"):
        build.write_report(tmp_path)


def test_a_folder_in_place_of_a_file_is_an_error(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "result.json").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*result.json: Is a directory"):
        read_records(tmp_path / "run")


def test_a_seed_folder_that_links_to_its_parent_is_read_once(tiny_run, tmp_path):
    for name in ("config.json", "run.json"):
        content = json.loads((tiny_run / name).read_text())
        (tmp_path / name).write_text(
            json.dumps(content | {"num_seeds": 2} if "seed" in content else content)
        )
    (tmp_path / "seed_0").symlink_to(tmp_path)
    assert len(read_records(tmp_path)) == 1


def test_workdir_with_a_name_that_is_not_utf8_has_a_page(tiny_run, tmp_path):
    workdir = tmp_path / os.fsdecode(b"gr\xfcn")
    workdir.mkdir()
    for name in ("config.json", "run.json", "metrics.jsonl"):
        shutil.copy(tiny_run / name, workdir)
    page = build.write_report(workdir, compare=[tiny_run])
    assert page.read_bytes().isascii() and "gr\\udcfcn" in text(page.read_text())


def test_run_with_several_seeds_shows_mean_and_standard_deviation(tiny_config, tmp_path):
    tiny_config.num_seeds, tiny_config.steps = 2, 6
    result = train(tiny_config, tmp_path)
    content = report_text(tmp_path)
    assert "This run has 2 seeds (0, 1)." in content
    std = np.std(result["test_accuracy_of_each_seed"], ddof=1)
    assert f"{100 * result['test_accuracy']:.2f} ± {100 * std:.2f}%" in content


def test_diverged_run_states_the_step(tiny_config, tmp_path):
    tiny_config.optim.name, tiny_config.optim.peak_lr = "sgd", 1e20
    tiny_config.log_every, tiny_config.epochs = "1 step", 1
    with contextlib.suppress(UserError):  # training may stop with an error
        train(tiny_config, tmp_path)
    content = report_text(tmp_path)
    assert re.search(r"This run diverged at step [1-6]\b", content)
    assert "are not finite" in content or "no checkpoint" in content


def test_compared_runs_are_grouped_by_experiment(tiny_run, tiny_config, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "first")
    # The same config with another seed shares a row; a different config gets its own.
    for name, seed, accuracy, rate in (("again", 1, 0.5, 1e-2), ("other", 0, 0.25, 1e-3)):
        shutil.copytree(tiny_run, tmp_path / name)
        for file, changes in (
            ("config.json", {"seed": seed}),
            ("result.json", {"test_accuracy": accuracy}),
        ):
            content = json.loads((tmp_path / name / file).read_text()) | changes
            if file == "config.json":
                content["optim"]["peak_lr"] = rate
            (tmp_path / name / file).write_text(json.dumps(content))
    accuracy = json.loads((tiny_run / "result.json").read_text())["test_accuracy"]
    content = report_text(tmp_path / "first", compare=[tmp_path / "again", tmp_path / "other"])
    values = [100 * accuracy, 50.0]
    assert f"first, again 2 of 2 {np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}%" in content
    assert "other 1 of 1 25.00%" in content
    assert "optim.peak_lr 0.01 0.001" in content
    other = shutil.copytree(tmp_path / "other", tmp_path / "copies" / "first")
    content = report_text(tmp_path / "first", compare=[other])
    assert f"field {tmp_path.name}/first copies/first" in content


def test_missing_data_leaves_curves_and_weights(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    content = report_text(tmp_path / "run", data="folder:/nowhere")
    assert "Not evaluated" in content and "Confusion" not in content
    assert "Curves" in content and "Patch filters" in content


def evaluation(names, labels, logits):
    """The evaluation section for black images."""
    images = np.zeros((len(labels), 4, 4, 3), np.uint8)
    predictions = sections.Predictions("test", names, images.__getitem__, labels, logits)
    with figures.style():
        return sections.evaluation(predictions)


def test_class_names_are_plain_text():
    """A folder name is interpreted neither as HTML nor as a formula."""
    names = ["<b>x</b>", "$1", "$_2$", "a&b"]
    section = evaluation(names, np.array([0, 1, 2, 3, 3]), np.eye(4)[[0, 1, 2, 3, 0]])
    assert "<b>x</b>" not in section and "&lt;b&gt;x&lt;/b&gt;" in section
    assert "$_2$" in section and "a&amp;b" in section
    drawing = next(content for kind, content in images_of(section) if kind == "svg+xml").decode()
    assert "$_2$" in drawing and "a&amp;b" in drawing


def test_only_the_worst_of_many_classes_are_drawn():
    rng = np.random.default_rng(0)
    names = [f"class {i}" for i in range(50)]
    section = evaluation(names, rng.integers(0, 50, 300), rng.normal(size=(300, 50)))
    assert "20 of 50 classes" in section


def test_shares_of_a_part_of_the_classes_count_all_images():
    """100 images of a class, 50 of them predicted as one that is not drawn."""
    figure = figures.confusion(np.array([[40, 10], [0, 20]]), ["a", "b"], np.array([100, 20]))
    image = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(image, np.array([[0.4, 0.1], [0, 1]]) ** 0.6)


def test_page_is_ascii():
    assert page_lib.render("grün", [page_lib.note("π")]).isascii()


def test_long_series_are_averaged():
    x, y = figures.thin(np.arange(10_000)), figures.thin(np.arange(10_000) * 2.0)
    assert len(x) <= 800 and np.average(y) == pytest.approx(9999, rel=1e-2)
    np.testing.assert_allclose(y, 2 * x)


def test_directory_without_a_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match="contains no run"):
        build.write_report(tmp_path)
