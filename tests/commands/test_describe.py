"""The description of a compiled program and of a run."""

import os
import pathlib
import re
import subprocess
import sys

import gpu_helpers
import pytest

from vit_jax import main
from vit_jax.commands.describe import describe
from vit_jax.commands.describe.program import Program
from vit_jax.errors import UserError
from vit_jax.experiment import make_experiment

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


def test_dry_run_describes_the_program_and_writes_nothing(tiny_folder, tmp_path):
    command = [sys.executable, "-m", "vit_jax.main", "--dry_run", "--workdir", tmp_path / "w"]
    command += ["--config", "configs/cifar10_vit.py", f"--config.data.name=folder:{tiny_folder}"]
    command += ["--config.batch_size=16", "--config.model.depth=1", "--config.mesh.fsdp=8"]
    command += ["--config.data.streaming=true"]
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
    assert re.search(r"; data decoded by \d+ threads per process$", lines["sharding"])
    assert float(lines["memory"].split()[0]) > device
    assert "all-gather" in lines["communication"]
    found = re.match(
        r"(\S+) GFLOP per step, .*; compiled matrix products: (\S+) GFLOP per step per device",
        lines["compute"],
    )
    assert 8 * float(found[2]) == pytest.approx(float(found[1]), rel=0.05)
    assert not (tmp_path / "w").exists()


SMALL = ("depth=1", "width=64", "num_heads=2", "mlp_dim=128")
SMALL = ("--config", "cifar10_vit", *(f"--config.model.{field}" for field in SMALL))


def test_layers_list_every_module(make_tiny_config):
    experiment = make_experiment(make_tiny_config(depth=2))
    text = describe.layers(experiment)
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if "│" in line}
    assert "Linear" in rows["block_0/mlp/fc1"] and "float32[1,5,32]" in rows["block_0/mlp/fc1"]
    assert "kernel: float32[16,32]" in text
    assert f"Total Parameters: {experiment.num_params:,}" in text


@pytest.mark.gpu_check
def test_target_describes_a_run_on_other_gpus(require, capsys):
    require("gpu_check", gpu_helpers.INSTALLED, gpu_helpers.REMEDY)
    arguments = ["--dry_run", *SMALL, "--target", "rtx4090x4", "--shape", "32x32x3x10"]
    main.main([*arguments, "--examples", "4000", "--fit", "--kernels", "--rates", "launch=1"])
    text, table = capsys.readouterr().out.split("\n\n", 1)
    lines = dict(line.split(": ", 1) for line in text.splitlines())
    assert lines["devices"].startswith("4 x NVIDIA GeForce RTX 4090 (data 4, fsdp 1)")
    assert lines["data"].startswith("32x32x3 images of 10 classes, not read; train: 4,000 images")
    found = re.search(
        r"^(\S+) MB per device.*\((\S+) MB of state, (\S+) MB of data, (\S+) MB temporary\); "
        "fits in 18.0 GB",
        lines["memory"],
    )
    peak, *parts = map(float, found.groups())
    assert sum(parts) == pytest.approx(peak, abs=0.2) and min(parts) > 0
    assert re.match(r"all-reduce 0.1\d+ MB \(f32, s32\) in \d+ messages", lines["communication"])
    assert "1,008 GB/s, 1 us per launch, not a forecast" in lines["estimate"]
    assert lines["largest batch"].startswith("4,000, with ")
    tried = "the entire training split; compiled batches: 64, 256, 4,000"
    assert lines["largest batch"].endswith(tried)
    assert {"with accumulate_steps=2", "with model.remat=True", "with mesh.fsdp=4"} < set(lines)
    rows = [line.split() for line in table.splitlines()]
    parts = {row[0]: float(row[-5]) for row in rows[1:] if row and row[-3].isdigit()}
    assert {"attention", "LayerNorm", "GELU", "optimizer", "collectives"} <= set(parts)
    total = float(re.match(r"at least (\S+) ms", lines["estimate"])[1])
    assert total == pytest.approx(sum(parts.values()), abs=0.02)


@pytest.mark.gpu_check
def test_what_an_older_gpu_lacks_is_said(require, capsys):
    require("gpu_check", gpu_helpers.INSTALLED, gpu_helpers.REMEDY)
    main.main(["--dry_run", *SMALL, "--target", "t4", "--shape", "32x32x3x10"])
    assert "\nlacking: it has no bfloat16 units" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry_run", "--target", "h100sxm"], r"unknown target h100sxm \(did you mean h100\?\)"),
        (["--dry_run", "--target", "h100x0"], "unknown target h100x0"),
        (["--dry_run", "--fit"], "need a --target"),
        (["--dry_run", "--profile_steps", "2-3"], "--profile_steps cannot be used with --dry_run"),
        (["--target", "h100"], "only with --dry_run"),
        (["--dry_run", "--examples", "50"], "--examples needs --shape"),
    ],
)
def test_wrong_arguments_are_explained(arguments, message, tiny_folder):
    with pytest.raises(UserError, match=message):
        main.main([*SMALL, f"--config.data.name=folder:{tiny_folder}", *arguments])


def test_shape_must_have_four_sizes(tiny_config):
    with pytest.raises(UserError, match="--shape 32x32: use HEIGHTxWIDTHxCHANNELSxCLASSES"):
        describe.stand_in(tiny_config, "32x32", 100)


def test_stand_in_needs_no_memory(tiny_config):
    split = describe.stand_in(tiny_config, "224x224x3x1000", 10**9)["train"]
    assert split.num_examples == 10**9 and split.image_shape == (224, 224, 3)
    assert len(split.class_names) == 1000


def test_largest_batch_is_found_by_a_line():
    def memory_of(batch_size):
        return 1000 + 7 * batch_size

    def largest(most, usable):
        sizes = {64: memory_of(64)}
        return describe.largest_batch(memory_of, sizes, multiple=8, most=most, usable=usable)

    found = largest(10**6, usable=100_000)
    assert found % 8 == 0 and 0.96 < found / (99_000 / 7) <= 1
    assert largest(800, usable=100_000) == 800
    assert largest(800, usable=1_100) == 8
    assert largest(800, usable=500) == 0


def test_missing_compiler_names_the_extra(monkeypatch):
    from jax.experimental import topologies

    def missing(*args, **kwargs):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(UserError, match=r"pip install 'vit-jax\[gpu-check\]'"):
        main.main(["--dry_run", *SMALL, "--target", "h100", "--shape", "32x32x3x10"])
