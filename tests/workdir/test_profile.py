"""The profile of a run: its trace, read back by xprof, and the time of its operations."""

import importlib.util
import json
import time

import jax
import numpy as np
import pytest
from runs import train_shared

from vit_jax.errors import UserError
from vit_jax.workdir import profile
from vit_jax.workdir.metrics import JsonLines


@pytest.fixture(scope="module")
def profiled(make_tiny_config, tmp_path_factory):
    """(config, workdir, result) of a run of six steps with a trace of the third and the fourth."""
    c = make_tiny_config()
    c.steps, c.tensorboard = 6, False
    workdir = tmp_path_factory.mktemp("profiled")
    return c, workdir, train_shared(c, workdir, profile_steps=(3, 4))


def test_trace_has_the_steps(profiled):
    (path,) = (profiled[1] / "profile").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    events = [e for plane in planes for line in plane.lines for e in line.events]
    assert {int(dict(e.stats)["step_num"]) for e in events if e.name == "train"} == {3, 4}
    assert list((profiled[1] / "profile").rglob("*.trace.json.gz"))  # for Perfetto


def test_xprof_reads_the_steps_of_the_trace(profiled, require):
    there = importlib.util.find_spec("xprof") is not None
    require("xprof", there, "xprof is not installed: pip install xprof")
    from xprof.convert.raw_to_tool_data import xspace_to_tool_data

    paths = list(map(str, (profiled[1] / "profile").rglob("*.xplane.pb")))
    text, _ = xspace_to_tool_data(paths, "trace_viewer", {})
    events = json.loads(text)["traceEvents"]
    steps = {e["args"]["step_num"] for e in events if "step_num" in e.get("args", {})}
    assert set(map(int, steps)) == {3, 4}


def test_operations_have_the_names_of_the_model(profiled):
    c, workdir, _ = profiled
    rows = json.loads((workdir / "profile" / "operations.json").read_text())
    milliseconds = [row["milliseconds"] for row in rows]
    assert milliseconds == sorted(milliseconds, reverse=True) and milliseconds[0] > 0
    times = {row["operation"]: row["times"] for row in rows}
    assert times["jvp/block/mlp/fc1/dot_general"] == c.model.depth
    assert times["transpose(jvp)/head/dot_general"] == 1


def test_combined_collectives_are_named_by_their_kind():
    program = """
  %all-reduce.1 = (f32[8]{0}) all-reduce(%a, %b), metadata={op_name="(jit(f)/x/dot:jit(f)/y/dot)"}
  ROOT %dot.2 = f32[8] dot(%c, %d), metadata={op_name="jit(f)/jvp(VisionTransformer)/block_3/dot"}
"""
    assert profile._names(program) == {"all-reduce.1": "all-reduce", "dot.2": "jvp/block/dot"}


def test_profile_changes_no_result(profiled, tmp_path):
    c, _, result = profiled
    other = train_shared(c, tmp_path)
    assert np.array_equal(other["test_loss"], result["test_loss"])


def test_trace_ends_with_a_run_that_fails(profiled, tmp_path, monkeypatch):
    def fail(self, step, scalars):
        raise UserError("a sink fails")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="a sink fails"):
        patch.setattr(JsonLines, "write", fail)
        train_shared(profiled[0], tmp_path / "failed", profile_steps=(1, 6))
    train_shared(profiled[0], tmp_path / "next", profile_steps=(1, 2))
    assert (tmp_path / "next" / "profile" / "operations.json").exists()


def test_profile_of_the_last_steps_is_not_part_of_the_training_time(
    profiled, tmp_path, monkeypatch
):
    operations = profile._operations

    def slow(*args):
        time.sleep(2)
        return operations(*args)

    monkeypatch.setattr(profile, "_operations", slow)
    result = train_shared(profiled[0], tmp_path, profile_steps=(2, 6))
    assert result["seconds"] < 2 and (tmp_path / "profile" / "operations.json").exists()
    result = train_shared(profiled[0], tmp_path / "other", profile_steps=(2, 3))
    assert result["seconds"] < 2


@pytest.mark.parametrize("steps", [(0, 2), (4, 3), (5, 7)])
def test_steps_outside_the_run_are_refused(profiled, tmp_path, steps):
    c = profiled[0].copy_and_resolve_references()
    with pytest.raises(UserError, match=r"--profile_steps .*: this run trains steps 1 to 6"):
        train_shared(c, tmp_path / "run", profile_steps=steps)
    assert not (tmp_path / "run" / "run.json").exists()
