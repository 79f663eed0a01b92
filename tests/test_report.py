"""The report: one page that needs nothing else, of any run, which says what is unusual about it."""

import contextlib
import html
import json
import os
import re
import shutil

import numpy as np
import pytest

from vit_jax import config as config_lib
from vit_jax import figures, report
from vit_jax.errors import UserError
from vit_jax.train import train


def text(page):
    """What a reader sees of a page."""
    page = re.sub(r"<(style|svg).*?</\1>", "", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page)))


def seen(workdir, **kwargs):
    """The text of a run's report."""
    return text(report.report(workdir, **kwargs).read_text())


@pytest.fixture(scope="module")
def page(tiny_run, tmp_path_factory):
    """The report of a finished run."""
    workdir = tmp_path_factory.mktemp("report") / "tiny"
    shutil.copytree(tiny_run, workdir)
    return report.report(workdir)


def test_the_page_needs_nothing_but_itself(page):
    content = page.read_text()
    assert "<script" not in content and "@import" not in content and "url(http" not in content
    links = re.findall(r'(?:src|href)="([^"]*)"', content)
    for link in links:
        inside = link.startswith(("#", "data:"))
        assert inside or (page.parent / link).is_file(), link
    drawn = {link.removesuffix(".png") for link in links if link.endswith(".png")}
    for name in (
        *("loss", "accuracy", "learning_rate", "throughput", "gradient_norm"),
        *("confusion", "class_accuracy", "calibration"),
        *("attention_1", "attention_2", "attention_3", "rollout", "attention_distance"),
        *("positions", "filters", "weight_norms", "gradient_norms"),
    ):
        assert name in drawn
        assert (page.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (page.parent / f"{name}.svg").read_text().rstrip().endswith("</svg>")


def test_every_reference_inside_the_page_is_to_one_place(page):
    content = page.read_text()
    ids = re.findall(r' id="([^"]*)"', content)
    assert len(ids) == len(set(ids))
    referred = re.findall(r'(?:url\(#|href="#)([^")]+)', content)
    assert referred and set(referred) <= set(ids)


def test_colours_of_the_figures_follow_the_page(page):
    drawings = "".join(re.findall(r"<svg.*?</svg>", page.read_text(), re.DOTALL))
    assert "var(--ink)" in drawings and "var(--c0)" in drawings
    for name in ("ink", "muted", "line", "c0", "c1"):
        assert figures.COLOURS[name] not in drawings  # else it stays dark on dark
        assert f"--{name}:{figures.COLOURS[name]}" in page.read_text()


def test_it_tells_where_the_run_comes_from(page, tiny_run):
    told = text(page.read_text())
    result = json.loads((tiny_run / "result.json").read_text())
    run = json.loads((tiny_run / "run.json").read_text())
    for part in (f"{result['test_accuracy']:.2%}", run["command"], run["date"], "jax 0."):
        assert part in told
    # The overrides of the recipe, and no field that is as the recipe has it.
    assert "What differs from configs/cifar10_vit.py" in told
    assert "model.width 16 256" in told and "optim.name 'adamw' 'adamw'" not in told
    assert "This run is" not in told  # nothing unusual


def test_an_interrupted_run_says_so(tiny_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run, workdir)
    (workdir / "result.json").unlink()
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 8]
    (workdir / "metrics.jsonl").write_text("".join(kept) + '{"step": 10, "train/lo')
    shutil.rmtree(workdir / "checkpoints")
    told = seen(workdir)
    assert "not complete" in told and "step 8; 2 epochs of its 3 epochs" in told
    assert "no checkpoints in" in told


def test_a_run_that_has_written_nothing_yet_opens(tiny_run, tmp_path):
    for name in ("config.json", "run.json"):
        shutil.copy(tiny_run / name, tmp_path)
    assert "step 0; 0 epochs" in seen(tmp_path)


def test_a_batch_that_a_run_has_gone_on_from_is_no_news(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    (tmp_path / "run" / "bad_batch_5.npz").touch()
    assert not any("stopped" in s for s in report.states(report.read_records(tmp_path / "run")))
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "bad_batch_99.npz").touch()
    said = report.states(report.read_records(tmp_path / "run"))
    assert any("stopped at step 99" in s for s in said) and not any("step 5," in s for s in said)


def test_links_in_a_workdir_are_not_written_through(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("report"))
    folder = tmp_path / "run" / "report"
    folder.symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"report is a symbolic link"):
        report.report(tmp_path / "run")
    folder.unlink()
    folder.mkdir()
    (folder / "index.html").symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match=r"index.html is a symbolic link"):
        report.report(tmp_path / "run")


@pytest.mark.parametrize("damage", [b'[1]\n{"step": 1, "train/lo', b"\xff\xfe"])
def test_metrics_of_other_lines_or_bytes(tiny_run, tmp_path, damage):
    shutil.copytree(tiny_run, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_bytes(damage)
    if damage[0] < 128:
        assert report.read_records(tmp_path / "run")[0].lines == []
    else:
        with pytest.raises(UserError, match=r"metrics.jsonl is corrupted"):
            report.read_records(tmp_path / "run")


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("run.json", "{}", "command in .*run.json must be a text or null; it is missing"),
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
    ],
)
def test_fields_of_another_type_are_errors(tiny_run, tmp_path, file, content, says):
    shutil.copytree(tiny_run, tmp_path / "run")
    (tmp_path / "run" / file).write_text(content)
    with pytest.raises(UserError, match=says) as error:
        report.report(tmp_path / "run")
    assert "\n" not in str(error.value)


def test_a_file_where_the_report_folder_should_be_is_an_error(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("report"))
    (tmp_path / "run" / "report").touch()
    with pytest.raises(UserError, match=r"cannot create the directory .*report"):
        report.report(tmp_path / "run")


def test_a_folder_where_a_file_should_be_is_an_error(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "result.json").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*result.json: Is a directory"):
        report.read_records(tmp_path / "run")


def test_seeds_that_lead_in_a_circle_end(tiny_run, tmp_path):
    for name in ("config.json", "run.json"):
        content = json.loads((tiny_run / name).read_text())
        (tmp_path / name).write_text(
            json.dumps(content | {"num_seeds": 2} if "seed" in content else content)
        )
    (tmp_path / "seed_0").symlink_to(tmp_path)
    assert len(report.read_records(tmp_path)) == 1


def test_a_workdir_whose_name_is_not_utf8_has_a_page(tiny_run, tmp_path):
    workdir = tmp_path / os.fsdecode(b"gr\xfcn")
    workdir.mkdir()
    for name in ("config.json", "run.json", "metrics.jsonl"):
        shutil.copy(tiny_run / name, workdir)
    page = report.report(workdir, compare=[tiny_run])
    assert page.read_bytes().isascii() and "gr\\udcfcn" in text(page.read_text())


def test_a_run_of_one_epoch_says_so(tiny_config, tmp_path):
    tiny_config.epochs = 1
    train(tiny_config, tmp_path)
    assert "This run is of a single epoch" in seen(tmp_path)


def test_a_run_of_several_seeds_shows_mean_and_spread(tiny_config, tmp_path):
    tiny_config.num_seeds, tiny_config.steps = 2, 6
    result = train(tiny_config, tmp_path)
    told = seen(tmp_path)
    assert "2 seeds (0, 1), trained in one program" in told
    spread = np.std(result["test_accuracy_of_each_seed"], ddof=1)
    assert f"{100 * result['test_accuracy']:.2f} ± {100 * spread:.2f}%" in told


def test_a_diverged_run_says_from_when(tiny_config, tmp_path):
    tiny_config.optim.name, tiny_config.optim.peak_lr = "sgd", 1e20
    tiny_config.log_every, tiny_config.epochs = "1 step", 1
    with contextlib.suppress(UserError):  # training may stop by itself
        train(tiny_config, tmp_path)
    told = seen(tmp_path)
    finite = r"(diverged: [\w/]+ is not a finite number at|stopped at) step [1-6]\b"
    assert re.search(f"This run {finite}", told)
    assert "not finite numbers" in told or "no checkpoint" in told


def test_runs_side_by_side(tiny_run, tiny_config, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "ours")
    # The same config with another seed is the same row, another config is another.
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
    ours = json.loads((tiny_run / "result.json").read_text())["test_accuracy"]
    told = seen(tmp_path / "ours", compare=[tmp_path / "again", tmp_path / "other"])
    values = [100 * ours, 50.0]
    assert f"ours, again 2 of 2 {np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}%" in told
    assert "other 1 of 1 25.00%" in told
    assert "optim.peak_lr 0.01 0.001" in told


def test_data_that_is_gone_leaves_curves_and_weights(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    told = seen(tmp_path / "run", name="folder:/nowhere")
    assert "Not evaluated" in told and "Confusion" not in told
    assert "Curves" in told and "Weight norms" in told


def test_names_of_classes_are_text(tmp_path):
    """No markup and no mathematics, whatever a folder is called."""
    names = ["<b>x</b>", "$1", "$_2$", "a&b"]
    drawn = report.Page(tmp_path)
    with figures.style():
        figure = figures.confusion(np.eye(4, dtype=int), names)
        drawn.figure("confusion", names[0], figure, names[3])
    content = "".join(drawn.parts)
    assert "<b>x</b>" not in content and "&lt;b&gt;x&lt;/b&gt;" in content
    assert "$_2$" in content and "a&amp;b" in content


def test_many_classes_are_drawn_in_part(tiny_run, tmp_path):
    names = [f"class {i}" for i in range(50)]
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(300, 50)), rng.integers(0, 50, 300)

    class Loaded:
        class_names, step = names, 1

    class Examples:
        images = np.zeros((300, 4, 4, 3), np.uint8)

    page = report.Page(tmp_path)
    result = report.scores.score(logits, labels, names)
    with figures.style():
        report.add_evaluation(page, Loaded, Examples, labels, logits, result, "test")
    assert "20 of 50 classes" in "".join(page.parts)


def test_long_series_are_thinned_to_their_means():
    x, y = figures.thin(np.arange(10_000), np.arange(10_000) * 2.0)
    assert len(x) <= 800 and np.average(y) == pytest.approx(9999, rel=1e-2)
    np.testing.assert_allclose(y, 2 * x)


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match="contains no run"):
        report.report(tmp_path)


def test_recipe_of_a_command():
    path, recipe = report.recipe_of("python -m vit_jax.main --config configs/cifar10_vit.py --x=1")
    assert path.name == "cifar10_vit.py" and recipe.model.width == 256
    path, recipe = report.recipe_of("python -m vit_jax.main --config=configs/gone.py")
    assert path.name == "gone.py" and recipe is None
    assert report.recipe_of("vit-jax --config cifar10_vit")[1].model.width == 256
    assert report.recipe_of("python -m vit_jax.main")[0].name == "shapes10_vit"
    for name in ("it's.py", "x" * 5000, "a\0b", "/"):
        assert report.recipe_of(f"python -m vit_jax.main --config={name}")[1] is None
    assert not config_lib.difference(
        report.recipe_of("vit-jax")[1], report.recipe_of("python -m vit_jax.main")[1]
    )
