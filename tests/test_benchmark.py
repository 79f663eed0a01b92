"""The benchmark: it drives what training runs, and says what it found."""

import dataclasses
import json
import pathlib
import sys

import pytest

from vit_jax import benchmark, config
from vit_jax.errors import UserError
from vit_jax.model import make_model
from vit_jax.run import setup

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "cifar10_vit.py"


class Rival:
    """Takes a tenth of a second a step, by its own word, and counts its steps."""

    made = 0

    def steps(self, n):
        self.made += n
        return 0.1 * n


@pytest.fixture(scope="module")
def rival():
    return Rival()


@pytest.fixture(scope="module")
def run(tiny_folder):
    c = config.from_file(CONFIG)
    c.data.name = f"folder:{tiny_folder}"
    c.batch_size = 16
    c.model.update({"width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 64})
    return setup(c)


@pytest.fixture(scope="module")
def result(run, rival):
    return benchmark.measure(run, rounds=3, round_seconds=0.2, rivals={"slow": rival})


def test_rates_follow_from_the_seconds_of_a_step(run, result):
    s = result["seconds_per_step"]
    assert 0 < s["min"] <= s["median"] <= s["max"]
    assert result["images_per_second"] == pytest.approx(16 / s["median"])
    assert result["seconds_per_epoch"] == pytest.approx(6 * s["median"])
    rate = 16 / s["median"] * run.flops_per_image
    assert result["tflops_per_second"] == pytest.approx(rate / 1e12)
    assert 0 < result["mfu_of_measured"] < 1


def test_a_rival_takes_turns_and_is_compared(result, rival):
    assert rival.made == 2 + 2 + 3 * (1 + 2)  # warm-up, then rounds of .2 s of .1 s steps
    ratio = result["rivals"]["slow"]["ours_times_theirs"]
    assert ratio == pytest.approx(0.1 / result["seconds_per_step"]["median"])


def test_traffic_is_the_order_of_an_epoch_and_the_metrics(result):
    assert result["bytes_to_device_per_step"] == 16 * 4
    # Four float32 and the flag of a bad step, of one seed.
    assert result["bytes_to_host_per_logged_step"] == 4 * 4 + 1


def test_a_full_cache_spares_the_compiler(result):
    assert 0 < result["compile_seconds"]["cached"] < result["compile_seconds"]["cold"]


def test_table_and_json_tell_the_same(result):
    environment = {"command": "c", "commit": None, "date": "2026-11-22", "devices": ["cpu"]}
    full = result | {"environment": environment | {"versions": {"jax": "0"}}}
    lines = "\n".join(benchmark.table(json.loads(json.dumps(full))))
    assert f"| images/s | {result['images_per_second']:,.1f} |" in lines
    assert "slow" in lines and "cold" in lines


@pytest.mark.parametrize(
    ("field", "value"),
    [("model.pool", "gap"), ("augment.flip", "random"), ("optim.name", "sgd"), ("num_seeds", 2)],
)
def test_what_the_notebook_cannot_be_is_not_compared(run, field, value):
    c = config.from_dict(run.config.to_dict())
    config.set_field(c, field, value)
    model = make_model(c.model, num_classes=3)
    with pytest.raises(UserError, match="differs"):
        benchmark.model_of_the_notebook(dataclasses.replace(run, config=c, model=model))


def test_ours_is_measured_where_every_rival_fails(run, monkeypatch, capsys):
    def torch(variant, run):
        raise UserError("PyTorch's side ended: no GPU")

    measured = {"seconds_per_step": {}, "rivals": {}}
    argv = ["x", "--config", str(CONFIG), "--against", "torch", "--no_start", "--json"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr("vit_jax.run.setup", lambda config: run)
    monkeypatch.setattr(benchmark, "Torch", torch)
    monkeypatch.setattr(benchmark, "measure", lambda run, rivals, **_: measured)
    benchmark.main()
    printed = capsys.readouterr()
    failed = {"failed": "PyTorch's side ended: no GPU"}
    assert json.loads(printed.out)["rivals"] == {
        f"PyTorch {variant}": failed for variant in benchmark.VARIANTS
    }
    assert "PyTorch eager failed: PyTorch's side ended: no GPU" in printed.err


def test_missing_pytorch_is_reported_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--config", str(CONFIG), "--against", "torch"])
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--against torch needs PyTorch, which is not installed"):
        benchmark.main()


def test_wrong_arguments_are_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--config", "configs/cifar10_vit.py", "--rounds", "0"])
    with pytest.raises(UserError, match="--rounds"):
        benchmark.main()
