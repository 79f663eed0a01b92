"""Disks that fill, fail, or vanish, corrupted checkpoints, and two runs that want one workdir."""

import asyncio
import builtins
import errno
import hashlib
import os
import shutil
import subprocess

import orbax.checkpoint as ocp
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
    c.steps, c.save_every = 6, "2 steps"
    c.log_every, c.tensorboard = "1 step", False
    return c


@pytest.fixture(scope="module")
def original(make_tiny_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("original") / "run"
    train(saving(make_tiny_config()), workdir)
    return workdir


class TestCorruption:
    @pytest.fixture
    def workdir(self, original, tmp_path):
        shutil.copytree(original, tmp_path / "run")
        (tmp_path / "run" / "result.json").unlink()
        return tmp_path / "run"

    def test_flipped_bit_in_each_file_is_found(self, workdir):
        folder = workdir / "checkpoints" / "6"
        files = [p for p in folder.rglob("*") if p.is_file()]
        assert {p.name for p in files} >= {"SHA256SUMS", "manifest.ocdbt", "metadata"}
        for path in (p for p in files if p.stat().st_size):
            intact = path.read_bytes()
            corrupted = bytearray(intact)
            corrupted[len(corrupted) // 2] ^= 1
            path.write_bytes(corrupted)
            with pytest.raises(UserError, match=r"checkpoints/6 is corrupted: .*; other steps: 4"):
                vit_jax.load(workdir)
            path.write_bytes(intact)
        assert vit_jax.load(workdir).step == 6

    def test_flipped_bit_in_each_byte_of_the_checksums_is_found(self, workdir):
        folder = workdir / "checkpoints" / "6"
        sums = (folder / "SHA256SUMS").read_bytes()
        line = len(sums.splitlines(keepends=True)[0])
        for i in (*range(line + 3), len(sums) - 1):
            corrupted = bytearray(sums)
            corrupted[i] ^= 1 << i % 8
            (folder / "SHA256SUMS").write_bytes(corrupted)
            assert checkpoint.find_corruption(folder), i

    def test_sha256sum_agrees(self, workdir):
        command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
        subprocess.run(command, cwd=workdir / "checkpoints" / "6", check=True, capture_output=True)

    def test_corrupted_checkpoint_is_moved_aside_and_the_previous_one_used(
        self, saves, workdir, original, capsys
    ):
        checkpoints = workdir / "checkpoints"
        shutil.copytree(checkpoints / "4", checkpoints / "6.corrupted")  # from an earlier start
        for path in (checkpoints / "6" / "params").rglob("*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[:10])
        corrupted = files(checkpoints / "6")
        train(saves, workdir)
        printed = capsys.readouterr().out
        assert "checkpoints/6: params/" in printed and "is not what was saved; moved to" in printed
        assert "Continuing from step 4 of 6" in printed
        assert files(checkpoints / "6.corrupted.corrupted") == corrupted
        assert files(checkpoints / "6.corrupted") == files(original / "checkpoints" / "4")
        with ocp.CheckpointManager(checkpoints) as manager:
            assert manager.all_steps() == [4, 6]
        for copy in checkpoints.glob("*.corrupted*"):
            shutil.rmtree(copy)
        same(content(workdir), content(original))

    def test_with_all_corrupted_nothing_is_begun_again(self, saves, workdir):
        for step in (4, 6):
            (workdir / "checkpoints" / str(step) / "SHA256SUMS").unlink()
        before = files(workdir)
        says = r"every checkpoint is corrupted .*SHA256SUMS is missing"
        with pytest.raises(UserError, match=says):
            train(saves, workdir)
        assert files(workdir) == before

    @pytest.mark.parametrize(
        ("owner", "call", "name"),
        [
            (builtins, "open", "SHA256SUMS"),
            (builtins, "open", "params/_METADATA"),
            (hashlib, "file_digest", "params/_METADATA"),
            (os, "scandir", "params"),
        ],
    )
    def test_unreadable_checkpoint_stops_the_run_and_stays(
        self, saves, workdir, owner, call, name, monkeypatch
    ):
        """A stale handle of a network file system does not mean that the file is corrupted."""
        path, before, works = workdir / "checkpoints" / "6" / name, files(workdir), False
        function = getattr(owner, call)

        def stale(file, *args, **options):
            opened = file.name if owner is hashlib else file
            if not works and str(opened) == str(path):
                # An open file that fails to read does not name itself.
                named = () if owner is hashlib else (str(path),)
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), *named)
            return function(file, *args, **options)

        monkeypatch.setattr(owner, call, stale)
        for resumes in (lambda: train(saves, workdir), lambda: vit_jax.load(workdir)):
            with pytest.raises(UserError, match=rf"cannot read .*/6/{name} \(Stale file handle\)"):
                resumes()
        works = True
        assert files(workdir) == before
        assert vit_jax.load(workdir).step == 6

    def test_orbax_accepts_a_copy_in_a_bucket(self, workdir):
        """A bucket has no rename, so orbax looks for a file that marks what is complete."""
        from etils import epath
        from orbax.checkpoint._src.path import atomicity_defaults, temporary_paths

        in_bucket = atomicity_defaults.get_default_temporary_path_class(epath.Path("gs://b/run/6"))
        folder = workdir / "checkpoints" / "6"
        items = {p for p in folder.iterdir() if p.is_dir()}
        assert {p.name for p in items} >= {"params", "opt_state", "config", "progress"}
        for path in (folder, *items):
            finalized = temporary_paths.is_path_finalized(path, temporary_path_cls=in_bucket)
            assert asyncio.run(finalized), path
        assert "  commit_success.txt\n" in (folder / "SHA256SUMS").read_text()


def files(folder):
    """{relative path: bytes} of the files under a folder, locks aside."""
    found = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


class TestSeveralSeeds:
    """`newest_intact_step` of two directories that a kill left with different steps."""

    @pytest.fixture
    def directories(self, tmp_path):
        for seed in ("a", "b"):
            for step in (2, 4, 6):
                (tmp_path / seed / str(step)).mkdir(parents=True)
                (tmp_path / seed / str(step) / "file").write_text(f"{seed} {step}")
                checkpoint._write_sums(tmp_path / seed / str(step))
        return [tmp_path / "a", tmp_path / "b"]

    def test_step_saved_for_one_seed_only_is_deleted_and_corrupted_one_kept(self, directories):
        a, b = directories
        shutil.rmtree(b / "6")
        (b / "4" / "file").write_text("x")
        step, corrupted = checkpoint.newest_intact_step(directories)
        assert step == 2 and list(corrupted) == [b / "4"]
        assert checkpoint.clear_after(a, step, corrupted) == {}
        assert checkpoint.clear_after(b, step, corrupted) == {b / "4": b / "4.corrupted"}
        assert sorted(p.name for p in a.iterdir()) == [".deleted", "2"]
        assert sorted(p.name for p in b.iterdir()) == ["2", "4.corrupted"]

    def test_later_step_that_cannot_be_read_is_not_deleted(self, directories, monkeypatch):
        shutil.rmtree(directories[1] / "6")
        monkeypatch.setattr(checkpoint, "_sha256", lambda *_: os.stat("/none"))
        with pytest.raises(UserError, match="cannot read"):
            checkpoint.newest_intact_step(directories)

    def test_seed_that_lost_its_checkpoints_stops_the_run(self, directories):
        shutil.rmtree(directories[1])
        with pytest.raises(
            UserError, match=r"missing \(.*/b/6, .*/b/4\) that the other seeds have"
        ):
            checkpoint.newest_intact_step(directories)


def test_what_is_kept(saves, tmp_path, monkeypatch):
    """The newest two, the best by validation wherever it was, every eighth."""
    saves.steps, saves.keep_every = 20, "8 steps"
    saves.data.train_split, saves.data.val_split = "train[:60]", "train[60:]"
    saves.eval_every = "5 steps"
    # Five is the best, and no step that the recipe saves; ten is as good.
    accuracies = iter((0.5, 0.5, 0.4, 0.3))
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
    saves.steps, saves.keep_every = 30, "2 steps"
    done, out = run_on_two_megabytes(saves, tmp_path / "disk", {})
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "No space left on device" in line and "is the last one saved; make room" in line
    # What was complete is sound, and room is all that was wanting.
    step = checkpoint.saved_steps(out / "checkpoints")[-1]
    assert f"step {step} is the last one saved" in line
    assert checkpoint.find_corruption(out / "checkpoints" / str(step)) is None
    train(saves, tmp_path / "whole")
    train(saves, out)
    same(content(out), content(tmp_path / "whole"))


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
    open_workdir(tmp_path / "w", saves).close()


def test_a_link_in_a_workdir_is_not_followed(saves, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "victim").write_text("mine\n")
    (tmp_path / "w" / "metrics.jsonl").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match=r"metrics.jsonl is a symbolic link"):
        train(saves, tmp_path / "w")
    assert (tmp_path / "victim").read_text() == "mine\n"
