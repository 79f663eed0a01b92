"""The benchmark: timing of the training step and feed, and its output."""

import copy
import json

import jax
import pytest

from vit_jax import config
from vit_jax.commands.benchmark import measure as benchmark
from vit_jax.commands.benchmark import torch_side
from vit_jax.errors import UserError
from vit_jax.experiment import make_experiment
from vit_jax.model import make_model


class Rival:
    """Claims a tenth of a second per step, and counts its steps."""

    count = 0

    def time_steps(self, n):
        self.count += n
        return 0.1 * n


@pytest.fixture(autouse=True)
def _compilation_cache():
    """The command turns the cache off, which other tests use."""
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.fixture(scope="module")
def rival():
    return Rival()


@pytest.fixture(scope="module")
def experiment(tiny_folder):
    c = config.from_file("cifar10_vit")
    c.data.name = f"folder:{tiny_folder}"
    c.batch_size = 16
    c.model.update({"width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 64})
    return make_experiment(c)


@pytest.fixture(scope="module")
def result(experiment, rival):
    return benchmark.measure(experiment, {"slow": rival}, rounds=3, round_seconds=0.2)


def test_rates_follow_from_the_seconds_per_step(experiment, result):
    s = result["seconds_per_step"]
    assert 0 < s["min"] <= s["median"] <= s["max"]
    assert result["images_per_second"] == pytest.approx(16 / s["median"])
    assert result["seconds_per_epoch"] == pytest.approx(6 * s["median"])
    rate = 16 / s["median"] * experiment.flops_per_image
    assert result["tflops_per_second"] == pytest.approx(rate / 1e12)
    assert result["mfu"] is None  # the peak of a CPU is unknown
    assert result["memory_estimated_bytes"] > 0 and result["memory_peak_bytes"] > 0
    assert result["compile_seconds"] > 0


def test_mfu_is_the_fraction_of_the_peak(experiment, monkeypatch):
    monkeypatch.setattr(benchmark.targets, "peak_flops", lambda kind: 1e12)
    result = benchmark.measure(experiment, {}, rounds=1, round_seconds=0.01)
    assert result["mfu"] == pytest.approx(result["tflops_per_second"])


def test_rival_alternates_and_is_compared(result, rival):
    assert rival.count == 2 + 2 + 3 * (1 + 2)  # warm-up, then rounds of 0.2 s of 0.1 s steps
    ratio = result["rivals"]["slow"]["speedup"]
    assert ratio == pytest.approx(0.1 / result["seconds_per_step"]["median"])


@pytest.mark.parametrize(
    ("field", "value"),
    [("model.pool", "gap"), ("augment.flip", "random"), ("optim.name", "sgd"), ("num_seeds", 2)],
)
def test_recipe_that_the_notebook_cannot_train_is_rejected(experiment, field, value):
    c = config.from_dict(experiment.config.to_dict())
    config.set_field(c, field, value)
    other = copy.copy(experiment)
    other.config, other.model = c, make_model(c.model, num_classes=3)
    with pytest.raises(UserError, match=rf"{field}="):
        torch_side.notebook_arguments(other)


def test_vit_jax_is_measured_if_every_rival_fails(experiment, monkeypatch, capsys):
    class Failing:
        def __init__(self, variant, experiment):
            pass

        def time_steps(self, n):
            raise UserError("no GPU")

    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(benchmark, "make_experiment", lambda config: experiment)
    monkeypatch.setattr(torch_side, "TorchSide", Failing)
    monkeypatch.setattr(benchmark, "measure", lambda experiment, rivals, rounds: {"rivals": rivals})
    benchmark.main(["--config", "cifar10_vit", "--against", "torch", "--json"])
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["rivals"] == {}
    assert result["environment"]["command"].startswith("python -m vit_jax benchmark --config")
    for variant in ("written", "eager", "compiled"):
        assert f"PyTorch {variant} is not measured: no GPU" in printed.err


def test_missing_pytorch_is_reported_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--against torch needs PyTorch, which is not installed"):
        benchmark.main(["--config", "cifar10_vit", "--against", "torch"])


def test_invalid_arguments_are_rejected():
    with pytest.raises(UserError, match="--rounds 0"):
        benchmark.main(["--config", "cifar10_vit", "--rounds", "0"])
