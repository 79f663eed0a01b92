"""The description of a compiled program and of a run."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from vit_jax.commands.describe.program import Program

ROOT = pathlib.Path(__file__).parents[2]


def test_transfers_count_bytes_by_kind_and_loops_by_iteration():
    program = """HloModule m

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = f32[8]{0} all-gather(%x), dimensions={0}
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %g)
}

ENTRY %main (a: f32[4,2]) -> f32[] {
  %r = (f32[4,2]{1,0}, bf16[3]{0}) all-reduce-start(%a, %b), to_apply=%add
  %d = (f32[4,2]{1,0}, bf16[3]{0}) all-reduce-done(%r)
  %w = (s32[], f32[8]{0}) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %s = f32[] add(%x, %y)
}
"""  # noqa: E501
    assert Program(program).transfers() == {
        "all-reduce": (1, 38, ["bf16", "f32"]),
        "all-gather": (5, 160, ["f32"]),
    }


def test_transfers_count_the_results_of_asynchronous_operations_alone():
    # As XLA prints them: a start's tuple lists operands, results, and contexts.
    program = """HloModule m, num_partitions=2

ENTRY %main (a: f32[4,2], b: f32[8,2]) -> f32[8,2] {
  %ag = (f32[4,2]{1,0}, f32[8,2]{1,0}) all-gather-start(%a), replica_groups={{0,1}}, dimensions={0}
  %agd = f32[8,2]{1,0} all-gather-done(%ag)
  %cp = (f32[4,2]{1,0}, f32[4,2]{1,0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1},{1,0}}
  %cpd = f32[4,2]{1,0} collective-permute-done(%cp)
  %rs = ((f32[8,2]{1,0}), f32[4,2]{1,0}, s32[]) reduce-scatter-start(%b), replica_groups={{0,1}}, dimensions={0}, to_apply=%add
  %rsd = f32[4,2]{1,0} reduce-scatter-done(%rs)
  %aa = ((f8e4m3fn[8,2]{1,0}), f8e4m3fn[8,2]{1,0}, s32[]) all-to-all-start(%q), replica_groups={{0,1}}, dimensions={0}
  %aau = ((f8e4m3fn[8,2]{1,0}), f8e4m3fn[8,2]{1,0}, s32[]) all-to-all-update(%aa)
  %aad = f8e4m3fn[8,2]{1,0} all-to-all-done(%aau)
  ROOT %r = f32[8,2]{1,0} add(%agd, %agd)
}
"""  # noqa: E501
    assert Program(program).transfers() == {
        "all-gather": (1, 64, ["f32"]),
        "collective-permute": (1, 32, ["f32"]),
        "reduce-scatter": (1, 32, ["f32"]),
        "all-to-all": (1, 16, ["f8e4m3fn"]),
    }


@pytest.mark.parametrize("streaming", [False, True])
def test_dry_run_describes_the_program_and_writes_nothing(tiny_folder, tmp_path, streaming):
    command = [sys.executable, "-m", "vit_jax.main", "--dry_run", "--workdir", tmp_path / "w"]
    command += ["--config", "configs/cifar10_vit.py", f"--config.data.name=folder:{tiny_folder}"]
    command += ["--config.batch_size=16", "--config.model.depth=1", "--config.mesh.fsdp=8"]
    command += [f"--config.data.streaming={streaming}"]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert lines["devices"].startswith("8 x cpu (data 1, fsdp 8); global batch 16, 2 per device")
    device, total = lines["sharding"].split("; ")[2].split(" MB per device of ")
    device, total = float(device), float(total.split()[0])
    assert total / 8 < device < total / 6
    assert float(lines["memory"].split()[0]) > device
    assert "all-gather" in lines["communication"]
    found = re.match(
        r"(\S+) GFLOP per step, .*; in the compiled products (\S+) GFLOP per step and device",
        lines["compute"],
    )
    assert 8 * float(found[2]) == pytest.approx(float(found[1]), rel=0.05)
    assert not (tmp_path / "w").exists()
