"""Checkpoints: retention, restoring, and recovery after a kill or corruption."""

import asyncio
import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from vit_jax.durations import Every
from vit_jax.errors import UserError
from vit_jax.workdir import checkpoints, files, newest_intact_step, saved_steps
from vit_jax.workdir.checkpoints import Checkpoints, clear_after


def tree(step):
    return {"a": np.full((2, 3), step, np.float32), "b": {"c": np.int32(step)}}


def save(opened, step, accuracy=None):
    arrays = {"params": tree(step), "ema_params": None, "opt_state": [tree(-step)]}
    documents = {"config": {"x": 1}, "progress": {"sums": {}}}
    opened.save(step, arrays, documents, accuracy)


def shapes():
    def shape(x):
        return jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype)

    one = jax.tree.map(shape, tree(0))
    return {"params": one, "ema_params": None, "opt_state": [one]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """20 steps, every other one saved: 5 is the best, and 10 ties with it. Do not write to it."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    opened = Checkpoints(directory, Every(8))
    accuracies = {5: 0.5, 10: 0.5, 15: 0.4, 20: 0.3}
    for step in (2, 4, 5, 6, 8, 10, 12, 14, 15, 16, 18, 20):
        save(opened, step, accuracies.get(step))
    opened.close()
    return directory


def test_newest_two_first_best_and_cadence_are_kept(saved):
    assert saved_steps(saved) == [5, 8, 16, 18, 20]
    with ocp.CheckpointManager(saved) as manager:
        assert manager.all_steps() == [5, 8, 16, 18, 20]


def test_restored_checkpoint_remembers_the_best(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "c")
    opened = Checkpoints(tmp_path / "c", Every(0))
    restored, progress = opened.restore(18, shapes())
    expected = {"params": tree(18), "ema_params": None, "opt_state": [tree(-18)]}
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    assert opened.is_best(0.51) and not opened.is_best(0.5)
    assert progress["best"] == {"step": 5, "val_accuracy": 0.5}
    save(opened, 21, 0.5)  # not better
    save(opened, 22)
    opened.close()
    assert saved_steps(tmp_path / "c") == [5, 21, 22]


def test_checkpoint_of_another_model_is_an_error(saved):
    opened = Checkpoints(saved, Every(1))
    with pytest.raises(UserError, match=r"cannot restore .*/18: .*; move it elsewhere"):
        opened.restore(18, shapes() | {"params": {"other": jax.ShapeDtypeStruct((), np.int32)}})
    opened.close()


def test_orbax_accepts_a_copy_in_a_bucket(saved):
    """A bucket has no rename, so orbax requires a file that marks complete checkpoints."""
    from etils import epath
    from orbax.checkpoint._src.path import atomicity_defaults, temporary_paths

    in_bucket = atomicity_defaults.get_default_temporary_path_class(epath.Path("gs://b/run/6"))
    folder = saved / "20"
    items = {p for p in folder.iterdir() if p.is_dir()}
    assert {p.name for p in items} == {"params", "opt_state", "config", "progress"}
    for path in (folder, *items):
        finalized = temporary_paths.is_path_finalized(path, temporary_path_cls=in_bucket)
        assert asyncio.run(finalized), path
    assert "  commit_success.txt\n" in (folder / "SHA256SUMS").read_text()


def test_restore_for_inference_lists_the_available_steps(saved, tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint 3 in .*: it has 5, 8, 16, 18, 20"):
        checkpoints.restore_for_inference(saved, 3)
    for _ in range(2):  # no folder, and an empty one
        with pytest.raises(UserError, match=r"no checkpoints in .*, or train with this"):
            checkpoints.restore_for_inference(tmp_path / "checkpoints")
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "seed_4").mkdir()
    with pytest.raises(UserError, match="a run of several seeds; pass one of seed_4"):
        checkpoints.restore_for_inference(tmp_path / "checkpoints")
    shutil.copytree(saved, tmp_path / "other")
    (tmp_path / "other" / "20" / "params" / "_METADATA").write_text(json.dumps({}))
    with pytest.raises(UserError, match=r"20 is corrupted: params/_METADATA .*; other steps: 5, 8"):
        checkpoints.restore_for_inference(tmp_path / "other")


class TestSeveralSeeds:
    """`newest_intact_step` and `clear_after` on two directories that differ after a kill."""

    @pytest.fixture
    def directories(self, tmp_path):
        for seed in ("a", "b"):
            for step in (2, 4, 6):
                (tmp_path / seed / str(step)).mkdir(parents=True)
                (tmp_path / seed / str(step) / "file").write_text(f"{seed} {step}")
                files.write_checksums(tmp_path / seed / str(step))
        return [tmp_path / "a", tmp_path / "b"]

    def test_step_saved_for_one_seed_only_is_deleted_and_a_corrupted_one_kept(
        self, directories, capsys
    ):
        a, b = directories
        shutil.rmtree(b / "6")
        (b / "4" / "file").write_text("x")
        step, corrupted = newest_intact_step(directories)
        assert step == 2 and corrupted == {b / "4": "file is not what was saved"}
        clear_after(a, 2, corrupted)
        assert capsys.readouterr().out == ""
        clear_after(b, 2, corrupted)
        assert f"{b}/4: file is not what was saved; moved to {b}/4.corr" in capsys.readouterr().out
        assert sorted(p.name for p in a.iterdir()) == [".deleted", "2"]
        assert sorted(p.name for p in b.iterdir()) == ["2", "4.corrupted"]

    def test_transient_read_error_does_not_delete_a_checkpoint(self, directories, monkeypatch):
        a, digest = directories[0], files._sha256
        wrong_once = lambda path: "" if path == a / "6/file" else digest(path)  # noqa: E731
        with monkeypatch.context() as transient:
            transient.setattr(files, "_sha256", wrong_once)
            step, corrupted = newest_intact_step(directories)
        assert step == 4
        clear_after(a, step, corrupted)
        assert sorted(p.name for p in a.iterdir()) == ["2", "4", "6.corrupted"]

    def test_later_step_that_cannot_be_read_is_not_deleted(self, directories, monkeypatch):
        shutil.rmtree(directories[1] / "6")
        monkeypatch.setattr(files, "_sha256", lambda *_: open("/none"))
        with pytest.raises(UserError, match="cannot read"):
            newest_intact_step(directories)

    def test_seed_with_lost_checkpoints_stops_the_run(self, directories):
        shutil.rmtree(directories[1])
        message = r"missing or corrupted \(.*/b/6, .*/b/4\) that other seeds have"
        with pytest.raises(UserError, match=message):
            newest_intact_step(directories)

    def test_folders_that_are_not_checkpoints_are_ignored(self, tmp_path):
        (tmp_path / "a" / "tmp").mkdir(parents=True)
        assert newest_intact_step([tmp_path / "a", tmp_path / "b"]) == (0, {})
