"""The main job end to end on a small data set: results, continuing, refusals."""

import importlib.util
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

import vit_jax
from vit_jax import augment, checkpoint
from vit_jax import config as config_lib
from vit_jax import train as train_lib
from vit_jax.data.tfds import TFRecordFile
from vit_jax.errors import UserError
from vit_jax.run import header, setup
from vit_jax.train import train

ROOT = pathlib.Path(__file__).parents[1]


def lines(workdir, prefix=""):
    """metrics.jsonl without what depends on the clock."""
    parsed = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    parsed = [{k: v for k, v in p.items() if not k.startswith("time/")} for p in parsed]
    return [p for p in parsed if any(k.startswith(prefix) for k in p)]


def test_augmentation_unsuitable_for_the_images_is_rejected_before_the_first_write(
    tiny_config, tmp_path
):
    tiny_config.augment.crop, tiny_config.augment.crop_padding = "pad", 8
    with pytest.raises(UserError, match="use at most 7"):
        train(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_learns_and_writes_its_workdir(tiny_config, tmp_path, capsys):
    result = train(tiny_config, tmp_path / "run", command="a command")
    printed = capsys.readouterr().out
    assert result["test_accuracy"] > 0.9  # the class is the image's tint
    assert (result["steps"], result["epochs"], result["seed"]) == (18, 3, 0)
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    for name in ("config.json", "run.json", "metrics.jsonl", "checkpoints/18/params"):
        assert (tmp_path / "run" / name).exists()
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["command"] == "a command" and run["versions"]["jax"] == jax.__version__

    # The notebook's lines, and the epoch's mean of the batch losses.
    logged = lines(tmp_path / "run", "train/")
    assert [p["step"] for p in logged] == list(range(2, 19, 2))
    epochs = lines(tmp_path / "run", "epoch/")
    for i, epoch in enumerate(epochs):
        assert f"Epoch {i + 1}, Loss: {epoch['epoch/loss']:.4f}\n" in printed
    assert result["train_loss"] == pytest.approx(epochs[-1]["epoch/loss"])
    assert f"Test Accuracy: {100 * result['test_accuracy']:.2f}%\n" in printed

    # Started again, it is already complete and changes nothing.
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert train(tiny_config, tmp_path / "run") == result
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before

    # And it can be used.
    model, params, loaded = vit_jax.load(tmp_path / "run")
    assert config_lib.difference(loaded, tiny_config) == []
    image = np.zeros((1, 8, 8, 3), np.float32) - 1
    image[..., 2] = 1
    assert model.apply({"params": params}, image).argmax() == sorted(
        ("red", "green", "blue")
    ).index("blue")


def test_epoch_loss_is_the_mean_of_every_batch_loss(tiny_config, tmp_path):
    tiny_config.log_every = "1 step"
    train(tiny_config, tmp_path)
    losses = [p["train/loss"] for p in lines(tmp_path, "train/")]
    means = [p["epoch/loss"] for p in lines(tmp_path, "epoch/")]
    assert len(losses) == 18  # six batches an epoch, the last of 10
    np.testing.assert_allclose(np.reshape(losses, (3, 6)).mean(1), means, rtol=1e-6)


def test_validation_split_is_watched_and_the_test_split_read_once(tiny_config, tmp_path, capsys):
    tiny_config.data.train_split, tiny_config.data.val_split = "train[:60]", "train[60:]"
    tiny_config.optim.ema_decay = 0.5
    result = train(tiny_config, tmp_path)
    assert [p["step"] for p in lines(tmp_path, "val/")] == [4, 8, 12]
    assert len(lines(tmp_path, "test/")) == 1
    assert lines(tmp_path, "val/")[-1]["val/accuracy"] == result["val_accuracy"]
    assert "Validation Accuracy" in capsys.readouterr().out
    # The averaged weights are what is evaluated, saved and loaded.
    params, _, _ = checkpoint.restore_for_inference(tmp_path / "checkpoints")
    raw = setup(tiny_config)
    params = jax.tree.map(lambda p: p[None], params)
    (again,) = raw.evaluator(raw.test)(params)
    assert again["accuracy"] == result["test_accuracy"]
    assert again["loss"] == pytest.approx(result["test_loss"], rel=1e-6)


@pytest.mark.parametrize("eval_batch_size", [1, 7, 30, 64])
def test_evaluation_counts_each_example_once(tiny_config, eval_batch_size):
    tiny_config.eval_batch_size = eval_batch_size
    run = setup(tiny_config)
    (result,) = run.evaluator(run.test)(run.init(run.seeds).params)
    assert result["count"] == 30
    tiny_config.eval_batch_size = 30
    run = setup(tiny_config)
    (whole,) = run.evaluator(run.test)(run.init(run.seeds).params)
    assert result == {**whole, "loss": pytest.approx(whole["loss"])}


def test_several_seeds_train_as_one_program_as_each_would_alone(tiny_config, tmp_path, capsys):
    tiny_config.steps, tiny_config.seed, tiny_config.augment.flip = 7, 5, "random"
    alone = []
    for tiny_config.seed in (5, 6):
        train(tiny_config, tmp_path / f"alone{tiny_config.seed}")
        alone.append(lines(tmp_path / f"alone{tiny_config.seed}"))
    tiny_config.seed, tiny_config.num_seeds = 5, 2
    result = train(tiny_config, tmp_path / "both")
    for expected, seed in zip(alone, (5, 6), strict=True):
        got = lines(tmp_path / "both" / f"seed_{seed}")
        assert [g.keys() for g in got] == [e.keys() for e in expected]
        for g, e in zip(got, expected, strict=True):
            np.testing.assert_allclose(list(g.values()), list(e.values()), rtol=2e-3, atol=1e-5)
        config = vit_jax.load(tmp_path / "both" / f"seed_{seed}").config
        assert (config.seed, config.num_seeds) == (seed, 1)
    of_each = result["test_accuracy_of_each_seed"]
    assert result["test_accuracy"] == pytest.approx(np.mean(of_each)) and len(of_each) == 2
    assert "mean of 2 seeds" in capsys.readouterr().out
    assert train(tiny_config, tmp_path / "both") == result

    # Killed when one seed had saved its last step and the other had not.
    both, seed_6 = lines(tmp_path / "both" / "seed_5"), tmp_path / "both" / "seed_6"
    shutil.rmtree(seed_6 / "checkpoints" / "7")
    (tmp_path / "both" / "result.json").unlink()
    again = train(tiny_config, tmp_path / "both")
    assert "Continuing from step 6 of 7" in capsys.readouterr().out
    for name in ("train_loss_of_each_seed", "test_loss_of_each_seed"):
        assert again[name] == result[name]
    assert lines(tmp_path / "both" / "seed_5") == both


def test_steps_bound_a_run_of_any_recipe(tiny_config, tmp_path, capsys):
    tiny_config.steps = 8
    result = train(tiny_config, tmp_path)
    assert result["steps"] == 8 and (tmp_path / "checkpoints" / "8").is_dir()
    assert "(2 of its 6 steps)" in capsys.readouterr().out


def test_header_explains_the_run(tiny_config, tmp_path):
    text = "\n".join(header(setup(tiny_config), tmp_path))
    for part in (
        "patch 4, width 16, depth 2, 2 heads, MLP 32",
        "parameters",
        "GFLOP an image",
        "batch 16 in all, 16 a device",
        "weights and optimizer state whole on each device; 0.1 MB a device of 0.1 MB; data",
        "18 of batch 16, 6 an epoch (3 epochs; the last batch of an epoch holds 10)",
        "adamw, constant 0.01",
        "(all of them)",
        "augmentation: none",
        "train: 90, test: 30 images, 3 classes",
        str(tmp_path),
    ):
        assert part in text
    tiny_config.optim.decay = "kernels"
    tiny_config.augment.crop, tiny_config.augment.flip = "pad", "random"
    text = "\n".join(header(setup(tiny_config), tmp_path))
    assert "(not on bias, cls_token, pos_embed, scale)" in text
    line = next(x for x in text.splitlines() if x.startswith("augmentation:"))
    assert 0 < line.index("crop") < line.index("flip")


def test_validation_runs_once_on_the_final_weights(tiny_config, tmp_path, monkeypatch):
    c, validated = tiny_config, []
    c.data.train_split, c.data.val_split, c.data.test_split = "train[:60]", "train[60:]", ""
    c.epochs, c.tensorboard = 2, False
    setup = train_lib.setup

    def counted(*args, **options):
        run = setup(*args, **options)
        evaluate = lambda _: validated.append(1) or [{"accuracy": len(validated), "loss": 1.0}]  # noqa: E731
        object.__setattr__(run, "evaluator", lambda split: evaluate)
        return run

    monkeypatch.setattr(train_lib, "setup", counted)
    assert train(c, tmp_path)["val_accuracy"] == len(validated) == 2
    # Killed after the last save and before the result, the weights are validated anew.
    (tmp_path / "result.json").unlink()
    assert train(c, tmp_path)["val_accuracy"] == 3


def test_step_is_traced_once(tiny_config, tmp_path, monkeypatch):
    """Tracing it before the first write, for its errors, must not cost a second trace later."""
    traces, make_augment = [], augment.make_augment

    def counted(*args, **options):
        augment_fn = make_augment(*args, **options)
        return lambda *a, **k: traces.append(1) or augment_fn(*a, **k)

    monkeypatch.setattr(augment, "make_augment", counted)
    tiny_config.steps, tiny_config.tensorboard = 2, False
    train(tiny_config, tmp_path)
    assert len(traces) == 1


def test_home_is_expanded_in_paths(tiny_run, tmp_path, monkeypatch):
    shutil.copytree(tiny_run, tmp_path / "run")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    c = config_lib.from_dict(json.loads((tiny_run / "config.json").read_text()))
    c.steps = 1
    with pytest.raises(UserError, match="another config"):
        train(c, "~/run")
    c.init_from = "~/run"
    train(c, "~/tuned")
    assert vit_jax.load("~/tuned").step == 1
    assert not (tmp_path / "~").exists()


class TestOtherData:
    """A run resumes only on the data that it began with."""

    @pytest.fixture
    def run(self, tiny_config, tiny_folder, tmp_path):
        shutil.copytree(tiny_folder, tmp_path / "data")
        tiny_config.data.name, tiny_config.tensorboard = f"folder:{tmp_path / 'data'}", False
        tiny_config.steps = 2
        return (
            tiny_config,
            tmp_path / "data",
            tmp_path / "run",
            train(tiny_config, tmp_path / "run"),
        )

    def test_resuming_on_other_data_is_rejected(self, run):
        c, folder, workdir, result = run
        (workdir / "result.json").unlink()
        before = contents(workdir)

        def rename():
            for split in ("train", "test"):
                (folder / split / "blue").rename(folder / split / "sky")

        def replace():
            shutil.copy(folder / "test" / "red" / "0.png", folder / "test" / "red" / "1.png")

        changes = {
            rename: "class 0 is green, was blue",
            (folder / "train" / "red" / "7.png").unlink: "train: 89 images, was 90",
            replace: "test: other images or labels",
        }
        original = shutil.copytree(folder, folder.with_name("original"))
        for change, says in changes.items():
            change()
            with pytest.raises(UserError, match=f"holds a run on other data .{says}") as refused:
                train(c, workdir)
            assert "\n" not in str(refused.value) and contents(workdir) == before
            shutil.rmtree(folder)
            shutil.copytree(original, folder)
        # The same images, streamed or moved to another place, are the same data.
        c.data.streaming = True
        assert train(c, workdir)["test_loss"] == pytest.approx(result["test_loss"], rel=1e-6)

    @pytest.mark.parametrize("saved", [None, [], {"class_names": 1}, {"class_names": ["a"]}])
    def test_data_item_of_another_shape_is_rejected(self, saved, tmp_path, monkeypatch):
        replica = object.__new__(train_lib.Replica)
        splits = {"train": {"num_examples": 1, "digest": "", "digest_of": ""}}
        replica.directory = tmp_path
        replica._run = SimpleNamespace(data_identity={"class_names": ["a"], "splits": splits})
        monkeypatch.setattr(checkpoint, "read_data", lambda folder: saved)
        with pytest.raises(UserError, match="5/data is not what vit_jax writes"):
            replica.check_data(5)


def contents(folder):
    """{path: bytes} of the files under a folder, locks aside."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_steps_bound_a_run_with_a_longer_warmup_and_mixing(tiny_config, tmp_path):
    tiny_config.steps, tiny_config.optim.warmup = 2, "4 epochs"
    tiny_config.augment.mixup_alpha, tiny_config.augment.mix_off_last = 1.0, "2 epochs"
    assert train(tiny_config, tmp_path)["steps"] == 2


class TestRefusals:
    """Wrong input ends in one line before anything is written."""

    def refused(self, c, workdir, says):
        with pytest.raises(UserError) as e:
            train(c, workdir)
        assert says in str(e.value) and "\n" not in str(e.value)
        assert not (workdir / "metrics.jsonl").exists()

    def test_batch_larger_than_the_split(self, tiny_config, tmp_path):
        tiny_config.batch_size = 91
        self.refused(tiny_config, tmp_path / "w", "batch_size=91 is larger than the 90 examples")
        assert not (tmp_path / "w").exists()

    def test_image_not_a_multiple_of_the_patch(self, tiny_config, tmp_path):
        tiny_config.model.patch_size = 3
        self.refused(tiny_config, tmp_path / "w", "8x8 pixels do not divide into patches of 3")
        assert not (tmp_path / "w").exists()

    def test_channels(self, tiny_config, tmp_path):
        tiny_config.data.mean = tiny_config.data.std = (0.5,)
        self.refused(tiny_config, tmp_path / "w", "has 1 entries")

    def test_what_only_tracing_the_step_finds(self, tiny_config, tmp_path):
        tiny_config.augment.crop, tiny_config.augment.crop_padding = "pad", 8
        self.refused(tiny_config, tmp_path / "w", "crop_padding=8 is too large for images of 8x8 pixels")
        assert not (tmp_path / "w").exists()

    def test_mesh_of_other_devices(self, tiny_config, tmp_path):
        tiny_config.mesh.fsdp = 3
        self.refused(tiny_config, tmp_path / "w", "does not make 1 devices")

    def test_workdir_of_another_config(self, tiny_config, tmp_path):
        tiny_config.steps = 2
        train(tiny_config, tmp_path)
        tiny_config.optim.peak_lr = 0.5
        with pytest.raises(UserError, match=r"optim.peak_lr: 0.5, was 0.01"):
            train(tiny_config, tmp_path)

    def test_workdir_that_cannot_be_written(self, tiny_config, tmp_path):
        (tmp_path / "file").write_text("")
        self.refused(tiny_config, tmp_path / "file" / "w", "cannot write the workdir")

    def test_disk_too_small_for_the_checkpoints(self, tiny_config, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
        self.refused(tiny_config, tmp_path / "w", "where 0.1 MB are free")
        assert not (tmp_path / "w").exists()

    def test_what_is_saved_already_needs_no_room_again(self, tiny_run, tmp_path, monkeypatch):
        shutil.copytree(tiny_run, tmp_path / "run")
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
        (tmp_path / "run" / "result.json").unlink()
        c = config_lib.from_dict(json.loads((tmp_path / "run" / "config.json").read_text()))
        assert train(c, tmp_path / "run")["steps"] > 0

    def test_disk_that_fills_while_training(self, tiny_config, tmp_path):
        """A file-size limit stands in for a full disk: the save fails in orbax's threads."""
        tiny_config.model.mlp_dim = 4096  # checkpoints of 3 MB
        code = "import resource as r, runpy, sys; r.setrlimit(r.RLIMIT_FSIZE, (500_000, 500_000)); "
        code += "runpy.run_module('vit_jax.main', run_name='__main__', alter_sys=True)"
        arguments = command(tiny_config, tmp_path / "w")[3:]
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=ROOT, env=environment(), capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert "cannot save to" in line and "nothing is saved yet; make room" in line


def command(c, workdir):
    """A main command that makes the config of `c`."""
    changed = config_lib.difference(c, config_lib.from_file(ROOT / "configs" / "cifar10_vit.py"))
    overrides = []
    for name in (d.split(":")[0] for d in changed):
        value = c
        for part in name.split("."):
            value = value[part]
        overrides.append(f"--config.{name}={value}")
    base = [sys.executable, "-m", "vit_jax.main", "--config", "configs/cifar10_vit.py"]
    return [*base, "--workdir", str(workdir), *overrides]


def environment():
    cache = jax.config.jax_compilation_cache_dir
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }


def start(c, workdir):
    return subprocess.Popen(
        command(c, workdir),
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config.sed=1"], "did you mean seed?"),
        (["--cnfig", "x"], "unknown argument --cnfig"),
        (["--config", "none.py"], "none.py does not exist"),
        (["--config.data.name=folder:/none"], "/none"),
    ],
)
def test_commands_end_wrong_input_with_one_line_and_code_2(arguments, says, tmp_path):
    base = [sys.executable, "-m", "vit_jax.main", "--workdir", str(tmp_path / "w")]
    done = subprocess.run([*base, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert says in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_evaluate_command_repeats_the_result(tiny_config, tmp_path):
    tiny_config.steps = 6
    result = train(tiny_config, tmp_path)
    base = [sys.executable, "-m", "vit_jax.evaluate", "--workdir", str(tmp_path), "--json"]
    done = subprocess.run(
        base, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    told = json.loads(done.stdout)
    assert told["accuracy"] == result["test_accuracy"] and told["count"] == 30
    done = subprocess.run([*base, "--step", "5"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "it has 6" in done.stderr


def events(workdir):
    """{tag: summary values} of TensorBoard's event files."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in workdir.glob("events.out.tfevents.*"):
        records = TFRecordFile(str(path))
        for event in map(Event.FromString, records.__getitems__(range(len(records)))):
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value))
    return found


def test_tensorboard_has_config_images_and_histograms(tiny_config, tmp_path):
    tiny_config.augment.flip, tiny_config.histograms_every = "random", "1 epoch"
    result = train(tiny_config, tmp_path)
    found = events(tmp_path)
    assert found["test/accuracy"][0][1].simple_value == pytest.approx(result["test_accuracy"])
    (_, text), *_ = found["config/text_summary"]
    assert b"| optim.peak_lr | 0.01 |" in text.tensor.string_val[0]
    start = found["_hparams_/session_start_info"][0][1].metadata.plugin_data.content
    assert b"model.width" in start
    assert [step for step, _ in found["params/head/kernel"]] == [6, 12, 18]

    # The images of epochs 1 and 2 are those of the batch that the step trains on, augmented.
    assert [step for step, _ in found["train/images"]] == [1, 7]
    encoded = found["train/images"][0][1].image.encoded_image_string
    shown = np.asarray(Image.open(io.BytesIO(encoded)))
    shown = shown.reshape(4, 8, 4, 8, 3).swapaxes(1, 2).reshape(16, 8, 8, 3)
    run = setup(tiny_config)
    batch = run.train.images[np.asarray(run.order(0))[0, 0]]
    flipped = [
        (image == mirrored[:, ::-1]).all() for image, mirrored in zip(shown, batch, strict=True)
    ]
    same = [(image == plain).all() for image, plain in zip(shown, batch, strict=True)]
    assert all(np.logical_xor(flipped, same)) and 0 < sum(flipped) < 16


def test_weights_and_biases_offline(tiny_config, tmp_path, monkeypatch, require):
    require("wandb", importlib.util.find_spec("wandb"), "wandb is not installed")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    tiny_config.wandb, tiny_config.steps = "a-project", 2
    train(tiny_config, tmp_path)
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = record.read_bytes()
    for part in (b"a-project", b"test/accuracy", b"optim.peak_lr"):
        assert part in content


def test_weights_and_biases_missing_is_told_before_anything_is_written(
    tiny_config, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    tiny_config.wandb = "a-project"
    with pytest.raises(UserError, match=r"pip install 'vit-jax\[wandb\]'"):
        train(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_checkpoint_restores_with_orbax_alone_on_any_device_count(tiny_config, tmp_path):
    tiny_config.steps = 2
    train(tiny_config, tmp_path)
    code = (
        "import sys, jax, numpy as np, orbax.checkpoint as ocp\n"
        "params = ocp.StandardCheckpointer().restore(sys.argv[1])\n"
        "assert jax.device_count() == 3 and 'vit_jax' not in sys.modules\n"
        "print(sum(float(np.abs(p).sum()) for p in jax.tree.leaves(params)))"
    )
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "checkpoints" / "2" / "params")],
        env=os.environ | flags,
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    params = vit_jax.load(tmp_path)[1]
    expected = sum(float(np.abs(p).sum()) for p in jax.tree.leaves(params))
    assert float(done.stdout) == pytest.approx(expected, rel=1e-6)


def test_an_odd_image_in_a_folder_names_itself(tiny_config, tmp_path):
    folder = tmp_path / "data" / "a"
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "good.png")
    (folder / "bad.png").write_bytes(b"not an image")
    tiny_config.data.name = f"folder:{tmp_path / 'data'}"
    tiny_config.data.test_split = "train"
    with pytest.raises(UserError, match=r"bad\.png"):
        setup(tiny_config)


def test_the_notebooks_recipe_learns_real_cifar10(tmp_path):
    """The shipped recipe on the real data, shrunk to a width and a length that CI can pay."""
    place = os.environ.get("TFDS_DATA_DIR") or ROOT.parent / "shared" / "tfds"
    if not (pathlib.Path(place) / "cifar10").is_dir():
        pytest.skip("no prepared CIFAR-10 in TFDS_DATA_DIR")
    c = config_lib.from_file(ROOT / "configs" / "cifar10_vit.py")
    c.data.dir, c.data.test_split = str(place), "test[:2000]"
    c.steps, c.log_every = 150, "10 steps"
    c.model.width, c.model.depth, c.model.num_heads, c.model.mlp_dim = 64, 2, 4, 128
    c.model.patch_size = 8
    c.optim.peak_lr = 1e-3
    result = train(c, tmp_path)
    losses = [p["train/loss"] for p in lines(tmp_path, "train/")]
    assert np.mean(losses[-3:]) < 1.95 < np.mean(losses[:2])
    assert result["test_accuracy"] > 0.3  # chance is 10%
