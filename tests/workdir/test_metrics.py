"""The metric sinks, and the lines that a resumed run keeps."""

import json

import pytest

from vit_jax.config import defaults
from vit_jax.errors import UserError
from vit_jax.workdir.metrics import JsonLines, TensorBoard, read_lines


def test_resuming_drops_later_truncated_and_test_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path, step=0)
    for step in (1, 2, 3):
        sink.write(step, {"train/loss": step / 3})
    sink.write(2, {"test/accuracy": 1.0})
    sink.close()
    path.write_text(path.read_text() + '{"step": 2, "train/lo')
    sink = JsonLines(path, step=2)
    sink.write(3, {"train/loss": 1.0})
    sink.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "train/loss": 1 / 3},
        {"step": 2, "train/loss": 2 / 3},
        {"step": 3, "train/loss": 1.0},
    ]


def test_lines_that_are_not_metrics_are_not_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('[1]\n{"step": "1"}\nx\n' + "[" * 10_000 + '\n{"step": 1, "a": 2}\n')
    assert [values for _, values in read_lines(path)] == [{"step": 1, "a": 2}]


def test_file_that_is_not_text_is_reported(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"is corrupted .*: repair or delete it"):
        JsonLines(tmp_path / "metrics.jsonl", step=1)


def test_unwritten_bytes_are_kept(tmp_path):
    """A full disk accepts part of a line, then nothing, and has space again before the save."""

    class Disk:
        def __init__(self, file, room):
            self.file, self.room = file, room

        def write(self, data):
            if not self.room:
                raise OSError(28, "No space left on device")
            written = self.file.write(data[: self.room])
            self.room -= written
            return written

        def __getattr__(self, name):
            return getattr(self.file, name)

    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path, step=0)
    sink._file = Disk(sink._file, room=20)
    for step in (1, 2):
        sink.write(step, {"train/loss": 0.5})
    assert len(path.read_text()) == 20
    with pytest.raises(UserError, match="No space left on device"):
        sink.sync()
    sink._file.room = 1000
    sink.close()
    assert [values["step"] for _, values in read_lines(path)] == [1, 2]


def test_deleted_file_is_reported(tmp_path):
    sink = JsonLines(tmp_path / "metrics.jsonl", step=0)
    sink.write(1, {"a": 1.0})
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl: No such file"):
        sink.sync()


def test_full_disk_does_not_block_tensorboard(tmp_path):
    sink = TensorBoard(tmp_path, defaults(), step=0)
    file = sink._file._py_recordio_writer
    working = file._writer
    with open("/dev/full", "wb", buffering=0) as full:
        file._writer = full
        for step in range(1, 30):
            sink.write(step, {"train/loss": 0.5})
    file._writer = working
    sink.write(30, {"train/loss": 0.5})
    sink.close()
    assert b"train/loss" in next(tmp_path.glob("events.out.tfevents.*")).read_bytes()
