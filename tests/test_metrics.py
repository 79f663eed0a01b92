"""What a run writes down: whole files, lines kept on continuing, throughput, known peaks."""

import json
import re
import subprocess

import numpy as np
import pytest

from vit_jax import metrics


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def writer(workdir, step=0):
    return metrics.Writer([workdir], step=step, total_steps=10, steps_per_epoch=4, batch_size=4)


def test_continuing_drops_later_torn_and_test_lines(tmp_path):
    first = writer(tmp_path)
    for step in (1, 2, 3):
        first.write(step, {"train/loss": step / 3})
    first.write(3, {"test/accuracy": 1.0})
    first.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "train/lo')
    second = writer(tmp_path, step=2)
    second.write(3, {"train/loss": 1.0})
    second.close()
    assert lines(path) == [
        {"step": 1, "train/loss": 1 / 3},
        {"step": 2, "train/loss": 2 / 3},
        {"step": 3, "train/loss": 1.0},
    ]


def test_where_there_is_no_git_a_run_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert metrics.environment("command")["commit"] is None


def test_commit_is_of_the_repository_that_tracks_the_file(tmp_path):
    """An environment inside another project's checkout is ignored there, not tracked."""
    installed, tracked = tmp_path / ".venv" / "metrics.py", tmp_path / "src" / "metrics.py"
    for path in (installed, tracked):
        path.parent.mkdir()
        path.write_text("")
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for arguments in (
        ["init", "--quiet"],
        ["add", "src"],
        [*author, "commit", "--quiet", "-m", "x"],
    ):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    assert re.fullmatch("[0-9a-f]{40}", metrics.commit_of(tracked))
    assert metrics.commit_of(installed) is None
    tracked.write_text("changed")
    assert metrics.commit_of(tracked).endswith("-dirty")


def test_write_json_replaces_whole_files(tmp_path):
    metrics.write_json(tmp_path / "x.json", {"a": 1})
    metrics.write_json(tmp_path / "x.json", {"a": 2})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_clock_leaves_out_compilation_and_pauses(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    clock = metrics.Clock(images=100, seconds=10.0)
    for passed, images in ((60.0, 64), (2.0, 64), (1.0, 16)):  # the first step compiles
        now[0] += passed
        clock.tick(images)
    assert clock.lap() == pytest.approx(80 / 3)
    now[0] += 100.0  # an evaluation
    clock.skip()
    now[0] += 1.0
    clock.tick(64)
    assert clock.lap() == pytest.approx(64)
    assert (clock.images, clock.seconds) == (100 + 144, pytest.approx(14.0))


def test_progress_without_a_terminal_is_a_line_now_and_then(tmp_path, capsys):
    w = writer(tmp_path)
    values = {"train/loss": np.array([2.0]), "train/accuracy": np.array([0.25])}
    values |= {"train/lr": np.array([1e-3]), "time/images_per_second": 8.0, "time/mfu": 0.31}
    w.progress(1, values)
    assert capsys.readouterr().out == ""
    w._last_plain -= 60
    w.progress(6, values)
    told = re.sub(r"[\d.]+ GB", "1.0 GB", capsys.readouterr().out)
    assert told == (
        "epoch 2/3, step 6/10, loss 2.0000, accuracy 25.0%, lr 0.001, 8 images/s, MFU 31%, "
        "1.0 GB, 2 s left\n"
    )
    w.progress(7, values)  # not again so soon
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(42, "42 s"), (170, "3 min"), (4830, "1 h 20 min"), (90_000, "25 h 0 min")],
)
def test_durations_are_readable(seconds, text):
    assert metrics.duration(seconds) == text
