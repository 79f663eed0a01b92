"""Disks that fill, refuse or vanish, checkpoints that rot, and two runs that want one workdir."""

import shutil
import subprocess

import pytest
import test_train
from test_kills import content, same

import vit_jax
from vit_jax import checkpoint
from vit_jax import train as train_lib
from vit_jax.errors import UserError
from vit_jax.metrics import Writer
from vit_jax.train import open_workdir, train

# A file system of its own for a child process: 2 MB, and no more.
UNSHARE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
MOUNT = 'mount -t tmpfs -o size=2M none "$0"; exec "$@"'


@pytest.fixture
def saves(make_tiny_config):
    return saving(make_tiny_config())


def saving(c):
    """Six steps, a checkpoint every two."""
    c.steps, c.checkpoint_every_steps, c.checkpoint_every_epochs = 6, 2, 0
    c.log_every_steps, c.tensorboard = 1, False
    return c


@pytest.fixture(scope="module")
def original(make_tiny_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("original") / "run"
    train(saving(make_tiny_config()), workdir)
    return workdir


class TestDamage:
    @pytest.fixture
    def workdir(self, original, tmp_path):
        shutil.copytree(original, tmp_path / "run")
        (tmp_path / "run" / "result.json").unlink()
        return tmp_path / "run"

    def test_a_flipped_bit_in_each_file_in_turn_is_named(self, workdir):
        folder = workdir / "checkpoints" / "6"
        files = [p for p in folder.rglob("*") if p.is_file()]
        assert {p.name for p in files} >= {"SHA256SUMS", "manifest.ocdbt", "metadata"}
        for path in files:
            sound = path.read_bytes()
            damaged = bytearray(sound)
            damaged[len(damaged) // 2] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=r"checkpoints/6 is damaged: .*; other steps: 4"):
                vit_jax.load(workdir)
            path.write_bytes(sound)
        assert vit_jax.load(workdir).step == 6

    def test_a_bit_of_each_byte_of_the_sums_counts(self, workdir):
        folder = workdir / "checkpoints" / "6"
        sums = (folder / "SHA256SUMS").read_bytes()
        line = len(sums.splitlines(keepends=True)[0])
        for i in (*range(line + 3), len(sums) - 1):
            damaged = bytearray(sums)
            damaged[i] ^= 1 << i % 8
            (folder / "SHA256SUMS").write_bytes(damaged)
            assert checkpoint.damage(folder), i

    def test_sha256sum_agrees(self, workdir):
        command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
        subprocess.run(command, cwd=workdir / "checkpoints" / "6", check=True, capture_output=True)

    def test_the_checkpoint_before_is_used_and_the_run_ends_the_same(
        self, saves, workdir, original, tmp_path, capsys
    ):
        shutil.copytree(workdir, tmp_path / "damaged")
        for path in (tmp_path / "damaged" / "checkpoints" / "6" / "params").rglob("*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[:10])
        train(saves, tmp_path / "damaged")
        printed = capsys.readouterr().out
        assert "checkpoints/6: params/" in printed and "is not what was saved" in printed
        assert "Continuing from step 4 of 6" in printed
        same(content(tmp_path / "damaged"), content(original))

    def test_with_all_damaged_nothing_is_begun_again(self, saves, workdir):
        for step in (4, 6):
            (workdir / "checkpoints" / str(step) / "SHA256SUMS").unlink()
        lines = (workdir / "metrics.jsonl").read_bytes()
        with pytest.raises(UserError, match=r"every checkpoint is damaged .*SHA256SUMS is missing"):
            train(saves, workdir)
        assert (workdir / "metrics.jsonl").read_bytes() == lines


def test_what_is_kept(saves, tmp_path, monkeypatch):
    """The newest two, the best by validation wherever it was, every eighth."""
    saves.steps, saves.keep_every_steps = 20, 8
    saves.data.train_split, saves.data.val_split = "train[:60]", "train[60:]"
    saves.eval_every_steps, saves.eval_every_epochs = 5, 0
    # Five is the best, and no step that the recipe saves; ten is as good.
    accuracies = iter((0.5, 0.5, 0.4, 0.3, 0.3))
    setup = train_lib.setup

    def with_these_accuracies(*args, **options):
        run = setup(*args, **options)
        told = lambda _: [{"accuracy": next(accuracies), "loss": 1.0}]  # noqa: E731
        object.__setattr__(run, "evaluator", lambda split: told)
        return run

    saves.data.test_split = ""
    monkeypatch.setattr(train_lib, "setup", with_these_accuracies)
    train(saves, tmp_path)
    assert checkpoint.saved_steps(tmp_path / "checkpoints") == [5, 8, 16, 18, 20]
    assert vit_jax.load(tmp_path, "best").step == 5
    assert vit_jax.load(tmp_path).step == 20


def run_on_two_megabytes(c, place, prepare, *, before=""):
    """A run on a full file system, in a process of its own; what it had there is copied out."""
    place.mkdir()
    out = place.with_name("out")
    script = f'{before}"$@" || code=$?; cp -r "$0/w" {out}; exit ${{code:-0}}'
    inner = ["sh", "-c", script, str(place), *test_train.command(c, place / "w")]
    probe = subprocess.run([*UNSHARE, "mount -t tmpfs none /mnt"], capture_output=True)
    if probe.returncode:
        pytest.skip("no file system can be mounted here")
    done = subprocess.run(
        [*UNSHARE, MOUNT, str(place), *inner],
        cwd=test_train.ROOT, env=test_train.environment() | prepare, capture_output=True, text=True,
    )  # fmt: skip
    return done, out


def test_a_full_disk_ends_the_run_with_one_line(saves, tmp_path):
    saves.model.mlp_dim, saves.model.depth = 512, 1  # checkpoints of 0.2 MB
    saves.steps, saves.keep_every_steps = 30, 2
    done, out = run_on_two_megabytes(saves, tmp_path / "disk", {})
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "No space left on device" in line and "is the last one saved; make room" in line
    # What was complete is sound, and room is all that was wanting.
    step = checkpoint.saved_steps(out / "checkpoints")[-1]
    assert f"step {step} is the last one saved" in line
    assert checkpoint.damage(out / "checkpoints" / str(step)) is None
    train(saves, tmp_path / "whole")
    train(saves, out)
    same(content(out), content(tmp_path / "whole"))


def test_a_disk_that_refuses_for_a_while(saves, original, tmp_path, capsys, monkeypatch):
    """on_save_error = continue: the lines and the next checkpoint are there when it takes again."""
    saves.on_save_error = "continue"
    write = Writer.write

    def move_away_and_back(self, step, metrics):
        if step == 2 and "train/loss" in metrics:
            (tmp_path / "run").rename(tmp_path / "gone")
        if step == 4 and "train/loss" in metrics:
            (tmp_path / "gone").rename(tmp_path / "run")
        write(self, step, metrics)

    monkeypatch.setattr(Writer, "write", move_away_and_back)
    train(saves, tmp_path / "run")
    assert "warning: cannot write" in capsys.readouterr().out
    assert checkpoint.saved_steps(tmp_path / "run" / "checkpoints") == [4, 6]
    assert content(tmp_path / "run")[0] == content(original)[0]


def test_a_workdir_that_vanished(saves, tmp_path, monkeypatch):
    write = Writer.write

    def remove(self, step, metrics):
        if step == 2:
            shutil.rmtree(tmp_path / "run")
        write(self, step, metrics)

    monkeypatch.setattr(Writer, "write", remove)
    with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl: No such file"):
        train(saves, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_read_only_disk_is_named(saves, tmp_path):
    done, _ = run_on_two_megabytes(
        saves, tmp_path / "disk", {}, before='mkdir "$0/w"; mount -o remount,ro "$0"; '
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "cannot write the workdir" in line and "Read-only file system" in line


def test_one_run_a_workdir(saves, tmp_path):
    """Another process holds it; when that is killed, it is free."""
    saves.steps = 100_000
    other = test_train.start(saves, tmp_path / "w")
    try:
        while not (tmp_path / "w" / "metrics.jsonl").exists():
            assert other.poll() is None, other.communicate()
        before = (tmp_path / "w" / "config.json").stat().st_mtime_ns
        with pytest.raises(UserError, match=f"is in use by process {other.pid} on "):
            train(saves, tmp_path / "w")
        assert (tmp_path / "w" / "config.json").stat().st_mtime_ns == before
    finally:
        other.kill()
        other.communicate()
    open_workdir(tmp_path / "w", saves, "").close()


def test_a_link_in_a_workdir_is_not_followed(saves, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "victim").write_text("mine\n")
    (tmp_path / "w" / "metrics.jsonl").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match=r"metrics.jsonl is a symbolic link"):
        train(saves, tmp_path / "w")
    assert (tmp_path / "victim").read_text() == "mine\n"
