"""A seed's workdir: its lock and config, the identity of its data, and its commit."""

import json
import re
import subprocess

import pytest

from vit_jax import config as config_lib
from vit_jax.errors import UserError
from vit_jax.workdir import Workdir, checkpoints, environment
from vit_jax.workdir.folder import commit_of


@pytest.fixture
def config():
    return config_lib.defaults()


def test_lock_is_held_during_the_context(config, tmp_path):
    workdir = Workdir(tmp_path / "w", config)
    with workdir.locked():
        assert json.loads((tmp_path / "w" / "config.json").read_text()) == json.loads(
            json.dumps(config.to_dict())
        )
        with pytest.raises(UserError, match=r"w is in use by process \d+ on "):
            Workdir(tmp_path / "w", config).locked().__enter__()
    with workdir.locked():
        pass


def test_different_config_is_rejected_and_releases_the_lock(config, tmp_path):
    with Workdir(tmp_path, config).locked():
        pass
    other = config_lib.defaults()
    other.optim.peak_lr, other.tensorboard = 0.5, not config.tensorboard
    with (
        pytest.raises(UserError, match=r"\(optim.peak_lr: 0.5, was [\d.]+\): use another"),
        Workdir(tmp_path, other).locked(),
    ):
        pass
    with Workdir(tmp_path, config).locked():
        pass


def test_begin_removes_the_result_of_an_earlier_run(config, tmp_path):
    (tmp_path / "result.json").write_text("{}")
    Workdir(tmp_path, config).begin(0, "command", {})
    assert (tmp_path / "run.json").exists() and not (tmp_path / "result.json").exists()


def test_unreadable_config_is_reported(config, tmp_path):
    (tmp_path / "config.json").write_text("{")
    with (
        pytest.raises(UserError, match=r"config.json is not the config of a run"),
        Workdir(tmp_path, config).locked(),
    ):
        pass


@pytest.mark.parametrize("name", ["run[1]", "a*", "what?"])
def test_pattern_is_rejected_as_a_path(config, tmp_path, name):
    """In such a path, orbax saves a checkpoint that cannot be restored, or reads other runs."""
    with (
        pytest.raises(UserError, match=r"contains \*, \?, or \[.*use another --workdir"),
        Workdir(tmp_path / name, config).locked(),
    ):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints/5"])
def test_symlink_in_a_workdir_is_not_followed(config, tmp_path, name):
    (tmp_path / "w" / "checkpoints").mkdir(parents=True)
    (tmp_path / "victim").write_text("mine\n")
    (tmp_path / "w" / name).symlink_to(tmp_path / "victim")
    with (
        pytest.raises(UserError, match=rf"{name} is a symbolic link"),
        Workdir(tmp_path / "w", config).locked(),
    ):
        pass
    assert (tmp_path / "victim").read_text() == "mine\n"
    assert not (tmp_path / "w" / "config.json").exists()


@pytest.mark.parametrize(
    "saved",
    [
        [],
        {"class_names": ["a"]},
        {"class_names": None, "splits": {}},
        {"class_names": ["a"], "splits": {"train": {"num_examples": "4"}}},
        {"class_names": ["a"], "splits": {"train": {"num_examples": 3}}},
    ],
    ids=str,
)
def test_malformed_data_item_is_reported(config, tmp_path, monkeypatch, saved):
    documents = {"config": {"config": config.to_dict()}, "data": saved}
    monkeypatch.setattr(checkpoints, "read_document", lambda _, item: documents[item])
    current = {"class_names": ["a"], "splits": {"train": {"num_examples": 3, "digest_of": "x"}}}
    with pytest.raises(UserError, match="checkpoints/2/data is not what vit_jax writes") as error:
        Workdir(tmp_path, config).check_resume(2, current)
    assert "\n" not in str(error.value)


def test_without_git_a_run_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment("command")["commit"] is None


def test_commit_belongs_to_the_repository_that_tracks_the_file(tmp_path):
    """An environment inside another project's checkout is ignored, not tracked."""
    installed, tracked = tmp_path / ".venv" / "folder.py", tmp_path / "src" / "folder.py"
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
    assert re.fullmatch("[0-9a-f]{40}", commit_of(tracked))
    assert commit_of(installed) is None
    tracked.write_text("changed")
    assert commit_of(tracked).endswith("-dirty")
