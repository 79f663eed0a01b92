"""One to eight devices, data parallel and fsdp: the same training, and what it sends."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from vit_jax import mesh
from vit_jax.errors import UserError
from vit_jax.explain import traffic

ROOT = pathlib.Path(__file__).parents[1]
EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
AUGMENTED = {"augment.crop": "pad", "augment.crop_padding": 2, "augment.flip": "random"}
AUGMENTED |= {"augment.mixup_alpha": 0.8, "augment.cutmix_alpha": 1.0}
MESHES = [(1, 1), (4, 1), (8, 8)]  # devices, of them on fsdp; more: device_table.py


@pytest.fixture(scope="module")
def found(tiny_folder, tmp_path_factory):
    """The results of all jobs, from one process with eight devices: starting one is what costs."""
    from vit_jax import config

    c = config.from_file(ROOT / "configs" / "cifar10_vit.py")
    c.data.name = f"folder:{tiny_folder}"
    c.batch_size = 16
    c.model.patch_size, c.model.width, c.model.depth = 4, 16, 1
    c.model.num_heads, c.model.mlp_dim = 2, 256  # wide enough for fsdp to split it
    c.model.pool = "gap"  # the one block is computed for all tokens
    c.optim.peak_lr = 1e-3
    jobs = [
        {"name": f"{n},{fsdp}", "devices": n, "steps": 20, "set": AUGMENTED | {"mesh.fsdp": fsdp}}
        for n, fsdp in MESHES
    ]
    crop_and_flip = {k: v for k, v in AUGMENTED.items() if "mix" not in k}
    levers = AUGMENTED | {"accumulate_steps": 4, "model.remat": True, "mesh.fsdp": 2}
    jobs.append({"name": "accumulated", "devices": 4, "steps": 20, "set": levers})
    jobs.append({"name": "not mixed", "devices": 4, "steps": 0, "set": crop_and_flip})
    path = tmp_path_factory.mktemp("jobs") / "jobs.json"
    path.write_text(json.dumps({"config": c.to_dict(), "jobs": jobs}))
    cache = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "eight_devices.py"), str(path)],
        cwd=ROOT, env=os.environ | EIGHT | cache, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("devices", "fsdp"), MESHES[1:])
def test_any_mesh_trains_as_one_device_does(found, devices, fsdp):
    one, several = found["1,1"]["losses"], found[f"{devices},{fsdp}"]["losses"]
    assert len(one) == 20 and one[0] != one[-1]
    np.testing.assert_allclose(several, one, atol=1e-5)


def test_accumulated_and_rematerialised_it_is_the_same_training(found):
    """The last batch of an epoch holds 10 of 16: a mean of the parts' means would differ."""
    one, several = found["1,1"]["losses"], found["accumulated"]["losses"]
    np.testing.assert_allclose(several, one, atol=1e-5)


def test_a_data_parallel_step_sends_the_gradients_once_and_nothing_else(found):
    gradients = 4 * found["not mixed"]["num_params"]
    sent = found["not mixed"]["traffic"]
    assert sent.keys() == {"all-reduce"}  # nothing to the host either
    assert gradients <= sent["all-reduce"][1] <= gradients + 256  # and scalars: loss, counts


def test_mixing_sends_single_images_to_neighbours_and_gathers_none(found):
    sent, gradients = found["4,1"]["traffic"], 4 * found["4,1"]["num_params"]
    assert "all-gather" not in sent and "all-to-all" not in sent
    assert sum(b for _, b in sent.values()) - gradients < found["4,1"]["image_bytes"]


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts an nvidia-smi that lists one GPU on PATH."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def test_unused_gpu_stops_the_command(nvidia_smi, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    command = [sys.executable, "-m", "vit_jax.main", "--workdir", str(tmp_path / "w")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert "GPU 0: NVIDIA H100 80GB HBM3, but JAX did not start CUDA (Unknown backend" in line
    assert "JAX_PLATFORMS=cpu" in line
    assert not (tmp_path / "w").exists()


def test_cpu_can_be_chosen_on_a_machine_with_a_gpu(nvidia_smi, monkeypatch):
    mesh.check_backend()  # the tests set JAX_PLATFORMS=cpu
    chosen = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    try:
        with pytest.raises(UserError, match="GPU 0"):
            mesh.check_backend()
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hides the GPU
        mesh.check_backend()
    finally:
        jax.config.update("jax_platforms", chosen)


def test_traffic_counts_bytes_by_kind_and_loops_by_their_turns():
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
    assert traffic(program) == {"all-reduce": (1, 38), "all-gather": (5, 160)}


def test_traffic_counts_the_results_of_asynchronous_operations_alone():
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
  %snd = (f32[4,2]{1,0}, u32[], token[]) send(%a, %tok), channel_id=5, is_host_transfer=true
  %sndd = token[] send-done(%snd), channel_id=5, is_host_transfer=true
  %rcv = (f32[4,2]{1,0}, u32[], token[]) recv(%tok), channel_id=6, is_host_transfer=true
  %rcvd = (f32[4,2]{1,0}, token[]) recv-done(%rcv), channel_id=6, is_host_transfer=true
  %inf = ((f32[4,2]{1,0}, pred[3]{0}), token[]) infeed(%tok)
  %out = token[] outfeed(%b, %tok), outfeed_shape=f32[8,2]{1,0}, metadata={op_name="x[3]"}
  ROOT %r = f32[8,2]{1,0} add(%agd, %agd)
}
"""  # noqa: E501
    assert traffic(program) == {
        "all-gather": (1, 64),
        "collective-permute": (1, 32),
        "reduce-scatter": (1, 32),
        "all-to-all": (1, 16),
        "send": (1, 32),
        "recv": (1, 32),
        "infeed": (1, 35),
        "outfeed": (1, 64),
    }


@pytest.mark.parametrize("streaming", [False, True])
def test_dry_run_explains_and_writes_nothing(tiny_folder, tmp_path, streaming):
    command = [sys.executable, "-m", "vit_jax.main", "--dry_run", "--workdir", tmp_path / "w"]
    command += ["--config", "configs/cifar10_vit.py", f"--config.data.name=folder:{tiny_folder}"]
    command += ["--config.batch_size=16", "--config.model.depth=1", "--config.mesh.fsdp=8"]
    command += [f"--config.data.streaming={streaming}"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | EIGHT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert said["devices"].startswith("8 x cpu (data 1, fsdp 8); batch 16 in all, 2 a device")
    whole, part = said["sharding"].split("; ")[2].split(" MB a device of ")
    assert float(part.split()[0]) / 8 < float(whole) < float(part.split()[0]) / 6
    assert float(said["memory of a step, by the compiler"].split()[0]) > float(whole)
    assert "all-gather" in said["communication of a step"]
    work = said["work"].split()
    assert work[1:3] == ["GFLOP", "a"] and work[-5:-3] == ["GFLOP", "a"] and work[-1] == "device"
    assert 0.8 < 8 * float(work[-6]) / float(work[0]) < 1.5  # padding and augmentation besides
    assert not (tmp_path / "w").exists()
