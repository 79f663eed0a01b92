"""Full, failing, and vanishing disks, corrupted checkpoints, and two runs with one workdir."""

import builtins
import errno
import hashlib
import io
import os
import shutil
import subprocess
import sys
import threading
import time

import orbax.checkpoint as ocp
import pytest
from runs import assert_same, command, content, files, finish, start, train_shared

import vit_jax
from vit_jax.errors import UserError
from vit_jax.experiment import Experiment
from vit_jax.train import train
from vit_jax.workdir import Workdir, checkpoints, saved_steps
from vit_jax.workdir import files as files_lib
from vit_jax.workdir.files import find_corruption
from vit_jax.workdir.metrics import JsonLines

# Gives a child process its own 2 MB file system.
UNSHARE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
MOUNT = 'mount -t tmpfs -o size=2M none "$0"; exec "$@"'


@pytest.fixture
def saves(make_tiny_config):
    return saving(make_tiny_config())


def saving(c):
    """Six steps, with a checkpoint every two."""
    c.steps, c.save_every = 6, "2 steps"
    c.log_every, c.tensorboard = "1 step", False
    return c


@pytest.fixture(scope="module")
def original(make_tiny_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("original") / "run"
    train_shared(saving(make_tiny_config()), workdir)
    return workdir


class TestCorruption:
    @pytest.fixture
    def workdir(self, original, tmp_path):
        shutil.copytree(original, tmp_path / "run")
        (tmp_path / "run" / "result.json").unlink()
        return tmp_path / "run"

    def test_flipped_bit_in_each_file_is_detected(self, workdir):
        folder = workdir / "checkpoints" / "6"
        paths = [p for p in folder.rglob("*") if p.is_file()]
        assert {p.name for p in paths} >= {"SHA256SUMS", "manifest.ocdbt", "metadata"}
        for path in (p for p in paths if p.stat().st_size):
            intact = path.read_bytes()
            corrupted = bytearray(intact)
            corrupted[len(corrupted) // 2] ^= 1
            path.write_bytes(corrupted)
            with pytest.raises(UserError, match=r"checkpoints/6 is corrupted: .*; other steps: 4"):
                vit_jax.load(workdir)
            path.write_bytes(intact)
        assert vit_jax.load(workdir).step == 6

    def test_corrupted_checkpoint_is_moved_aside_and_the_previous_one_used(
        self, saves, workdir, original, capsys
    ):
        checkpoints = workdir / "checkpoints"
        shutil.copytree(checkpoints / "4", checkpoints / "6.corrupted")  # from an earlier run
        for path in (checkpoints / "6" / "params").rglob("*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[:10])
        corrupted = files(checkpoints / "6")
        train_shared(saves, workdir)
        printed = capsys.readouterr().out
        assert "checkpoints/6: params/" in printed and "is not what was saved; moved to" in printed
        assert "Resuming from step 4 of 6" in printed
        assert files(checkpoints / "6.corrupted.corrupted") == corrupted
        assert files(checkpoints / "6.corrupted") == files(original / "checkpoints" / "4")
        with ocp.CheckpointManager(checkpoints) as manager:
            assert manager.all_steps() == [4, 6]
        for copy in checkpoints.glob("*.corrupted*"):
            shutil.rmtree(copy)
        assert_same(content(workdir), content(original))

    def test_run_with_all_checkpoints_corrupted_does_not_start_over(self, saves, workdir):
        for step in (4, 6):
            (workdir / "checkpoints" / str(step) / "SHA256SUMS").unlink()
        before = files(workdir)
        message = r"every checkpoint is corrupted .*SHA256SUMS is missing"
        with pytest.raises(UserError, match=message):
            train_shared(saves, workdir)
        assert files(workdir) == before

    @pytest.mark.parametrize(
        ("owner", "call", "name"),
        [
            (io, "open", "SHA256SUMS"),
            (builtins, "open", "params/_METADATA"),
            (hashlib, "file_digest", "params/_METADATA"),
            (os, "scandir", "params"),
        ],
    )
    def test_unreadable_checkpoint_stops_the_run_and_stays(
        self, saves, workdir, owner, call, name, monkeypatch
    ):
        """A stale network file handle does not mean that the file is corrupted."""
        path, before, works = workdir / "checkpoints" / "6" / name, files(workdir), False
        function = getattr(owner, call)

        def stale(file, *args, **options):
            opened = file.name if owner is hashlib else file
            if not works and str(opened) == str(path):
                # The error of an open file has no file name.
                named = () if owner is hashlib else (str(path),)
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), *named)
            return function(file, *args, **options)

        monkeypatch.setattr(owner, call, stale)
        for resume in (lambda: train_shared(saves, workdir), lambda: vit_jax.load(workdir)):
            with pytest.raises(UserError, match=rf"cannot read .*/6/{name} \(Stale file handle\)"):
                resume()
        works = True
        assert files(workdir) == before
        assert vit_jax.load(workdir).step == 6


def test_best_checkpoint_is_saved_at_any_step_and_kept(saves, tmp_path, monkeypatch):
    """Keeps the newest two, the best by validation, and every eighth."""
    saves.steps, saves.keep_every = 20, "8 steps"
    saves.data.train_split, saves.data.val_split = "train[:60]", "train[60:]"
    saves.eval_every, saves.data.test_split = "5 steps", ""
    # Step 5, which the recipe does not save, is the best; step 10 ties with it.
    accuracies = iter((0.5, 0.5, 0.4, 0.3))
    monkeypatch.setattr(
        Experiment, "evaluate", lambda *_: {"accuracy": next(accuracies), "loss": 1.0}
    )
    train(saves, tmp_path)
    assert saved_steps(tmp_path / "checkpoints") == [5, 8, 16, 18, 20]
    assert vit_jax.load(tmp_path, "best").step == 5
    assert vit_jax.load(tmp_path).step == 20


def run_on_two_megabytes(c, place, *, before=""):
    """(exit code, last line, a copy of the workdir) of a run on its own file system."""
    place.mkdir()
    copy = place.with_name("copy")
    script = f'{before}"$@" || code=$?; cp -r "$0/w" {copy}; exit ${{code:-0}}'
    inner = ["sh", "-c", script, str(place), *command(c, place / "w")]
    probe = subprocess.run([*UNSHARE, "mount -t tmpfs none /mnt"], capture_output=True)
    if probe.returncode:
        pytest.skip("no file system can be mounted here")
    code, output = finish(start([*UNSHARE, MOUNT, str(place), *inner]))
    return code, output.splitlines()[-1], copy


def test_full_disk_ends_the_run_with_one_line(saves, tmp_path):
    saves.model.mlp_dim = 1024  # checkpoints of 0.4 MB
    saves.steps, saves.keep_every = 16, "2 steps"
    code, line, copy = run_on_two_megabytes(saves, tmp_path / "disk")
    assert code == 2, line
    assert (
        "No space left on device" in line and "is the last one saved; fix this, then rerun" in line
    )
    # The complete checkpoints are intact, and with more space the run resumes.
    step = saved_steps(copy / "checkpoints")[-1]
    assert f"step {step} is the last one saved" in line
    assert find_corruption(copy / "checkpoints" / str(step)) is None
    train_shared(saves, tmp_path / "whole")
    train_shared(saves, copy)
    assert_same(content(copy), content(tmp_path / "whole"))


def test_deleted_workdir_is_reported(saves, tmp_path, monkeypatch):
    write = JsonLines.write

    def remove(self, step, scalars):
        if step == 2:
            shutil.rmtree(tmp_path / "run")
        write(self, step, scalars)

    monkeypatch.setattr(JsonLines, "write", remove)
    with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl: No such file"):
        train_shared(saves, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_error_after_a_save_has_started_does_not_lose_it(saves, tmp_path, monkeypatch):
    slow, write = threading.Event(), JsonLines.write

    def write_checksums(folder):
        slow.set()
        time.sleep(1)
        files_lib.write_checksums(folder)

    def fail(self, step, scalars):
        if "train/loss" in scalars and step == 3:
            assert slow.wait(30)
            raise UserError("an image cannot be decoded")
        write(self, step, scalars)

    monkeypatch.setattr(checkpoints, "write_checksums", write_checksums)
    monkeypatch.setattr(JsonLines, "write", fail)
    with pytest.raises(UserError, match="cannot be decoded"):
        train_shared(saves, tmp_path / "run")
    assert saved_steps(tmp_path / "run" / "checkpoints") == [2]


def test_read_only_disk_is_reported(saves, tmp_path):
    code, line, _ = run_on_two_megabytes(
        saves, tmp_path / "disk", before='mkdir "$0/w"; mount -o remount,ro "$0"; '
    )
    assert code == 2
    assert line.startswith("error: cannot write ") and "Read-only file system" in line


def test_workdir_allows_one_run_at_a_time(saves, tmp_path):
    """Another process holds the lock; when that process is killed, the workdir is free."""
    code = (
        "import pathlib, sys, time\n"
        "from vit_jax import config\n"
        "from vit_jax.workdir import Workdir\n"
        "with Workdir(pathlib.Path(sys.argv[1]), config.defaults()).locked():\n"
        "    print('locked', flush=True)\n"
        "    time.sleep(600)\n"
    )
    other = start([sys.executable, "-c", code, str(tmp_path / "w")])
    try:
        assert "locked\n" in other.stdout  # reads until then; a GPU plugin may print before it
        before = files(tmp_path / "w")
        with pytest.raises(UserError, match=f"is in use by process {other.pid} on "):
            train_shared(saves, tmp_path / "w")
        assert files(tmp_path / "w") == before
    finally:
        other.kill()
        other.communicate()
    (tmp_path / "w" / "config.json").unlink()
    with Workdir(tmp_path / "w", saves).locked():
        pass
