"""Checksums: any change to any file is detected, and sha256sum agrees. Atomic writes."""

import json
import os
import subprocess

import pytest

from vit_jax.errors import UserError
from vit_jax.workdir import files
from vit_jax.workdir.files import find_corruption


@pytest.fixture
def folder(tmp_path):
    """A folder of three files with checksums."""
    for name in ("params/d/0", "params/_METADATA", "empty"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"content of {name}" * (name != "empty"))
    (tmp_path / "link").symlink_to("/etc/hostname")
    files.write_checksums(tmp_path)
    return tmp_path


def flip(path, i):
    """Flips a bit in byte `i` of a file; a second call restores it."""
    content = bytearray(path.read_bytes())
    content[i] ^= 1 << i % 8
    path.write_bytes(content)


def test_flipped_bit_in_any_file_is_detected(folder):
    assert find_corruption(folder) is None
    for name in ("params/d/0", "params/_METADATA"):
        flip(folder / name, 3)
        assert find_corruption(folder) == f"{name} is not what was saved"
        flip(folder / name, 3)
    assert find_corruption(folder) is None


def test_flipped_bit_in_each_byte_of_the_checksums_is_detected(folder):
    path = folder / "SHA256SUMS"
    for i in range(len(path.read_bytes())):
        flip(path, i)
        assert find_corruption(folder), i
        flip(path, i)
    assert find_corruption(folder) is None


def test_missing_files_are_detected(folder):
    (folder / "empty").unlink()
    assert find_corruption(folder) == "'empty' of SHA256SUMS is missing"
    (folder / "SHA256SUMS").write_text("")
    assert find_corruption(folder) == "SHA256SUMS is empty"
    (folder / "SHA256SUMS").unlink()
    assert find_corruption(folder) == "SHA256SUMS is missing"


def test_sha256sum_agrees(folder):
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    assert "link" not in (folder / "SHA256SUMS").read_text()


def test_unreadable_file_is_not_reported_as_corrupted(folder, monkeypatch):
    monkeypatch.setattr(files, "_sha256", lambda *_: os.stat("/none"))
    with pytest.raises(UserError, match="cannot read /none"):
        find_corruption(folder)


def test_json_files_are_replaced_atomically(tmp_path):
    files.write_json(tmp_path / "x.json", {"a": 1})
    files.write_json(tmp_path / "x.json", {"a": 2})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 2}
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "x.json", {"a": object()})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
