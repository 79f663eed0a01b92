"""A training run end to end on a small dataset: its results, resuming, and errors."""

import contextlib
import importlib.util
import io
import json
import os
import pathlib
import shutil
import signal
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from runs import command, command_after, files, finish, lines, start, train_shared

import vit_jax
from vit_jax import augment, main
from vit_jax import config as config_lib
from vit_jax.data.tfds import TFRecordFile
from vit_jax.errors import Stopped, UserError, run_command
from vit_jax.experiment import Experiment, make_experiment
from vit_jax.train import train
from vit_jax.workdir import restore_for_inference

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def finished(make_tiny_config, tmp_path_factory):
    """(config, workdir, result, printed lines) of a run of three epochs. Do not write to it."""
    c = make_tiny_config(depth=2)
    c.data.train_split, c.data.val_split = "train[:60]", "train[60:]"
    c.log_every = "1 step"
    c.augment.flip, c.optim.ema_decay = "random", 0.5
    workdir, output = tmp_path_factory.mktemp("finished") / "run", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        result = train_shared(c, workdir, command="a command")
    return c, workdir, result, output.getvalue().splitlines()


def test_run_learns_and_writes_its_workdir(finished):
    c, workdir, result, printed = finished
    assert result["test_accuracy"] > 0.9  # the class is the image's tint
    assert (result["steps"], result["epochs"], result["seed"]) == (12, 3, 0)
    assert json.loads((workdir / "result.json").read_text()) == result
    for name in ("config.json", "run.json", "metrics.jsonl", "checkpoints/12/params"):
        assert (workdir / name).exists()
    run = json.loads((workdir / "run.json").read_text())
    assert run["command"] == "a command" and run["versions"]["jax"] == jax.__version__
    assert printed[-1] == f"Test Accuracy: {100 * result['test_accuracy']:.2f}%"
    model, params, config = vit_jax.load(workdir)
    assert config_lib.difference(config, c) == []
    image = np.zeros((1, 8, 8, 3), np.float32) - 1
    image[..., 2] = 1
    classes = sorted(("red", "green", "blue"))
    assert model.apply({"params": params}, image).argmax() == classes.index("blue")


def test_epoch_loss_is_the_mean_of_every_batch_loss(finished):
    _, workdir, result, printed = finished
    losses = [p["train/loss"] for p in lines(workdir, "train/")]
    means = [p["epoch/loss"] for p in lines(workdir, "epoch/")]
    assert len(losses) == 12  # four batches per epoch, the last of 12 images
    np.testing.assert_allclose(np.reshape(losses, (3, 4)).mean(1), means, rtol=1e-6)
    assert result["train_loss"] == pytest.approx(means[-1])
    for i, mean in enumerate(means):
        assert f"Epoch {i + 1}, Loss: {mean:.4f}" in printed


def test_validation_split_is_evaluated_during_and_the_test_split_after_training(finished):
    c, workdir, result, printed = finished
    assert [p["step"] for p in lines(workdir, "val/")] == [4, 8, 12]
    assert [p["step"] for p in lines(workdir, "test/")] == [12]
    assert lines(workdir, "val/")[-1]["val/accuracy"] == result["val_accuracy"]
    assert f"Validation Accuracy: {100 * result['val_accuracy']:.2f}%" in printed
    # The EMA weights are evaluated, saved, and loaded.
    params, _, _ = restore_for_inference(workdir / "checkpoints")
    again = make_experiment(c).evaluate(params, "test")
    assert again["accuracy"] == result["test_accuracy"]
    assert again["loss"] == pytest.approx(result["test_loss"], rel=1e-6)


def test_complete_run_is_unchanged(finished, capsys):
    c, workdir, result, _ = finished
    before = files(workdir)
    assert train_shared(c, workdir) == result
    assert files(workdir) == before
    assert "Already complete. Test Accuracy" in capsys.readouterr().out


def test_finished_run_prints_the_next_commands(finished, capsys):
    c, workdir, _, _ = finished
    main.main(command(c, workdir)[3:])
    complete, *following = capsys.readouterr().out.splitlines()[-3:]
    assert complete.startswith("Already complete.")
    printed = main.next_commands(c, "cifar10_vit", workdir)
    assert following == [f"Next, {name}: {printed[name]}" for name in ("evaluate", "report")]


def test_broken_result_of_a_complete_run_is_reported(finished, tmp_path):
    c, workdir, result, _ = finished
    shutil.copytree(workdir, tmp_path / "run")
    for broken in ('{"test_acc', "[1]", "7", "{}", "[" * 100_000):
        (tmp_path / "run" / "result.json").write_text(broken)
        with pytest.raises(UserError, match=r"result.json is not a result .*: delete it, then re"):
            train_shared(c, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    assert train_shared(c, tmp_path / "run")["test_loss"] == result["test_loss"]


def events(workdir):
    """{tag: [(step, summary value)]} of TensorBoard's event files."""
    from tensorboardX.proto.event_pb2 import Event

    values = {}
    for path in workdir.glob("events.out.tfevents.*"):
        records = TFRecordFile(str(path))
        for event in map(Event.FromString, records):
            for value in event.summary.value:
                values.setdefault(value.tag, []).append((event.step, value))
    return values


def test_tensorboard_has_scalars_and_the_config(finished):
    _, workdir, result, _ = finished
    values = events(workdir)
    assert values["test/accuracy"][0][1].simple_value == pytest.approx(result["test_accuracy"])
    (_, text), *_ = values["config/text_summary"]
    assert b"| optim.peak_lr | 0.01 |" in text.tensor.string_val[0]


def test_checkpoint_of_another_config_is_not_resumed(finished, tmp_path):
    c, workdir, _, _ = finished
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    (tmp_path / "run" / "result.json").unlink()
    c = config_lib.from_dict(c.to_dict())
    c.optim.peak_lr = 0.5
    with pytest.raises(UserError, match=r"a different config \(optim\.peak_lr"):
        train_shared(c, tmp_path / "run")


def test_home_is_expanded_in_paths(finished, tmp_path, monkeypatch):
    c, workdir, _, _ = finished
    shutil.copytree(workdir, tmp_path / "run")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    c = config_lib.from_dict(c.to_dict())
    c.optim.peak_lr = 0.5
    with pytest.raises(UserError, match="a different config"):
        train_shared(c, "~/run")
    c.init_from, c.steps, c.tensorboard = "~/run", 1, False
    train(c, "~/tuned")
    assert vit_jax.load("~/tuned").step == 1
    assert not (tmp_path / "~").exists()


def test_validation_runs_once_on_the_final_weights(tiny_config, tmp_path, monkeypatch):
    c, validated = tiny_config, []
    c.data.train_split, c.data.val_split, c.data.test_split = "train[:60]", "train[60:]", ""
    c.epochs, c.tensorboard = 2, False

    def evaluate(self, params, split):
        validated.append(split)
        return {"accuracy": len(validated), "loss": 1.0}

    monkeypatch.setattr(Experiment, "evaluate", evaluate)
    assert train_shared(c, tmp_path)["val_accuracy"] == 2
    # Killed after the last save and before the result: the weights are validated again.
    (tmp_path / "result.json").unlink()
    assert train_shared(c, tmp_path)["val_accuracy"] == 3
    assert validated == ["val"] * 3


def test_run_ends_without_a_better_validation_accuracy(tiny_config, tmp_path, monkeypatch, capsys):
    c, accuracies = tiny_config, []
    c.data.train_split, c.data.val_split, c.data.test_split = "train[:60]", "train[60:]", ""
    c.epochs, c.tensorboard, c.stop_after = 9, False, "2 epochs"

    def evaluate(self, params, split):
        accuracy = accuracies.pop(0)
        if accuracy == "stop":
            signal.raise_signal(signal.SIGTERM)
            accuracy = 0.6
        return {"accuracy": accuracy, "loss": 1.0}

    monkeypatch.setattr(Experiment, "evaluate", evaluate)
    accuracies[:] = 0.5, 0.6, 0.6, 0.5
    result = train_shared(c, tmp_path / "run")
    assert (result["steps"], result["epochs"], result["val_accuracy"]) == (16, 4, 0.5)
    assert "No better validation accuracy in 2 epochs" in capsys.readouterr().out
    assert {"8", "16"} <= {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert train_shared(c, tmp_path / "run") == result
    (tmp_path / "run" / "result.json").unlink()  # killed after the last save
    accuracies[:] = [0.5]
    assert train_shared(c, tmp_path / "run") == result

    accuracies[:] = 0.5, 0.6, "stop", 0.5
    with pytest.raises(Stopped):
        train_shared(c, tmp_path / "stopped")
    assert train_shared(c, tmp_path / "stopped")["steps"] == 16
    a, b = (restore_for_inference(tmp_path / d / "checkpoints")[0] for d in ("run", "stopped"))
    assert jax.tree.all(jax.tree.map(np.array_equal, a, b)) and not accuracies


def copy_as_a_bucket(source, target):
    """Copies the files alone: no empty folders, no times, no permissions."""
    for path in filter(pathlib.Path.is_file, source.rglob("*")):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())


def test_copied_workdir_resumes(finished, tmp_path, monkeypatch):
    c, workdir, result, _ = finished
    evaluate = Experiment.evaluate

    def stop(self, params, split):  # at the end of the first epoch
        signal.raise_signal(signal.SIGTERM)
        return evaluate(self, params, split)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Experiment, "evaluate", stop)
        train_shared(c, tmp_path / "here")
    copy_as_a_bucket(tmp_path / "here", tmp_path / "bucket")
    shutil.rmtree(tmp_path / "here")
    copy_as_a_bucket(tmp_path / "bucket", tmp_path / "there" / "run")
    assert train_shared(c, tmp_path / "there" / "run")["test_loss"] == result["test_loss"]
    copy_as_a_bucket(tmp_path / "there" / "run", tmp_path / "home")
    params = ocp.StandardCheckpointer().restore(tmp_path / "home" / "checkpoints/12/params")
    expected = ocp.StandardCheckpointer().restore(workdir / "checkpoints/12/params")
    assert jax.tree.all(jax.tree.map(np.array_equal, params, expected))


@pytest.fixture
def traces(monkeypatch):
    """A list with an element for each time that a step has been traced."""
    traces, make_augment = [], augment.make_augment

    def counted(*args, **options):
        augment_fn = make_augment(*args, **options)
        return lambda *a, **k: traces.append(1) or augment_fn(*a, **k)

    monkeypatch.setattr(augment, "make_augment", counted)
    return traces


def test_steps_field_sets_the_length_of_any_recipe(tiny_config, tmp_path, capsys, traces):
    c = tiny_config
    c.steps, c.tensorboard = 2, False
    c.optim.warmup, c.augment.mix_off_last = "4 epochs", "2 epochs"  # longer than the run
    result = train(c, tmp_path)
    assert result["steps"] == 2 and (tmp_path / "checkpoints" / "2").is_dir()
    assert "(2 of its 6 steps)" in capsys.readouterr().out
    assert len(traces) == 1  # the check before the first write, for its errors, is the only one


class TestOtherData:
    """A run resumes only on its original data."""

    def test_resuming_on_other_data_is_rejected(
        self, tiny_config, tiny_folder, tmp_path, monkeypatch
    ):
        c, folder, workdir = tiny_config, tmp_path / "data", tmp_path / "run"
        shutil.copytree(tiny_folder, folder)
        c.data.name, c.tensorboard, c.steps = f"folder:{folder}", False, 2
        result = train(c, workdir)
        (workdir / "result.json").unlink()
        before = files(workdir)

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
        monkeypatch.setattr(Experiment, "check", lambda _: None)  # a trace that nothing needs
        for change, reason in changes.items():
            change()
            with pytest.raises(UserError, match=f"contains a run on other data .{reason}") as error:
                train(c, workdir)
            assert "\n" not in str(error.value) and files(workdir) == before
            shutil.rmtree(folder)
            shutil.copytree(original, folder)
        # The same images, streamed, are the same data. No step is left to train.
        c.data.streaming = True
        assert train(c, workdir)["test_loss"] == pytest.approx(result["test_loss"], rel=1e-6)


class TestErrors:
    """Invalid input ends in one line before anything is written."""

    def check(self, c, workdir, message):
        with pytest.raises(UserError) as error:
            train(c, workdir)
        assert message in str(error.value) and "\n" not in str(error.value)
        assert not workdir.exists()

    def test_setup(self, tiny_config, tmp_path):
        tiny_config.batch_size = 91
        self.check(tiny_config, tmp_path / "w", "batch_size=91 is larger than the 90 examples")

    def test_augmentation_unsuitable_for_the_images_is_rejected_before_the_first_write(
        self, tiny_config, tmp_path
    ):
        tiny_config.augment.crop, tiny_config.augment.crop_padding = "pad", 8
        self.check(tiny_config, tmp_path / "w", "crop_padding=8")

    def test_error_of_tracing_the_step_comes_before_the_first_write(
        self, tiny_config, tmp_path, monkeypatch
    ):
        def fail(*arguments, **options):
            raise UserError("found by tracing")

        monkeypatch.setattr(augment, "make_augment", lambda *a, **k: fail)
        self.check(tiny_config, tmp_path / "w", "found by tracing")

    def test_workdir_with_a_different_config(self, finished):
        c, workdir, _, _ = finished
        c = config_lib.from_dict(c.to_dict())
        c.optim.peak_lr = 0.5
        before = files(workdir)
        with pytest.raises(UserError, match=r"optim.peak_lr: 0.5, was 0.01"):
            train_shared(c, workdir)
        assert files(workdir) == before

    def test_workdir_that_cannot_be_written(self, tiny_config, tmp_path):
        (tmp_path / "file").write_text("")
        self.check(tiny_config, tmp_path / "file" / "w", f"cannot write {tmp_path / 'file' / 'w'}")

    def test_disk_that_fills_while_training(self, tiny_config, tmp_path):
        """A file-size limit simulates a full disk: the save fails in orbax's threads."""
        tiny_config.model.mlp_dim = 4096  # checkpoints of 3 MB
        code = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (500_000, 500_000))"
        arguments = command_after(code, tiny_config, tmp_path / "w")
        returncode, output = finish(start(arguments))
        assert returncode == 2, output
        line = output.splitlines()[-1]
        assert "cannot save to" in line and "nothing is saved yet; fix this, then rerun" in line

    def test_missing_wandb_is_reported_before_the_first_write(
        self, tiny_config, tmp_path, monkeypatch
    ):
        monkeypatch.setitem(sys.modules, "wandb", None)
        tiny_config.wandb = "a-project"
        self.check(tiny_config, tmp_path / "w", "pip install 'vit-jax[wandb]'")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--config.sed=1"], "did you mean seed?"),
            (["--cnfig", "x"], "unknown argument --cnfig"),
            (["--config", "none.py"], "none.py does not exist"),
            (["--config.data.name=folder:/none"], "/none"),
        ],
    )
    def test_command_ends_with_one_line_and_code_2(self, arguments, message, tmp_path, capsys):
        with pytest.raises(SystemExit) as end:
            run_command(main.main, ["--workdir", str(tmp_path / "w"), *arguments])
        assert end.value.code == 2
        line = capsys.readouterr().err
        assert message in line and line.count("\n") == 1
        assert not (tmp_path / "w").exists()


def test_weights_and_biases_offline(tiny_config, tmp_path, monkeypatch, require):
    require("wandb", importlib.util.find_spec("wandb"), "wandb is not installed")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    tiny_config.wandb, tiny_config.steps = "a-project", 2
    train(tiny_config, tmp_path)
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    # A separate wandb process writes the file, possibly later.
    parts, deadline = (b"a-project", b"test/accuracy", b"optim.peak_lr"), time.monotonic() + 30
    while missing := [part for part in parts if part not in record.read_bytes()]:
        assert time.monotonic() < deadline, missing
        time.sleep(0.05)


@pytest.mark.usefixtures("optimized")  # until the end of the module
def test_notebook_recipe_learns_real_cifar10(tmp_path):
    """The shipped recipe on the real data, narrower and shorter to fit CI."""
    place = os.environ.get("TFDS_DATA_DIR") or ROOT.parent / "shared" / "tfds"
    if not (pathlib.Path(place) / "cifar10").is_dir():
        pytest.skip("no prepared CIFAR-10 in TFDS_DATA_DIR")
    c = config_lib.from_file(ROOT / "configs" / "cifar10_vit.py")
    c.data.dir, c.data.test_split = str(place), "test[:2000]"
    c.data.streaming = True  # decodes only the images of these steps
    c.steps, c.log_every, c.tensorboard = 150, "10 steps", False
    c.model.width, c.model.depth, c.model.num_heads, c.model.mlp_dim = 64, 2, 4, 128
    c.model.patch_size = 8
    c.optim.peak_lr = 1e-3
    result = train(c, tmp_path)
    losses = [p["train/loss"] for p in lines(tmp_path, "train/")]
    assert np.mean(losses[-3:]) < 1.95 < np.mean(losses[:2])
    assert result["test_accuracy"] > 0.3  # chance is 10%
