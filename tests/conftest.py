"""Fixtures that the tests share: a compilation cache, small datasets, and a small recipe."""

import os
import pathlib
import sys
import tempfile

# Before jax starts: the tests are the same on every machine.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Optimizing the small programs of most tests takes longer than running them; see `optimized`.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{tempfile.gettempdir()}/vit_jax_tests_xla"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
ROOT = pathlib.Path(__file__).parents[1]
# Python runs sitecustomize.py there at the start of every process that a test starts.
HOOK = ROOT / "tests" / "hook"
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(HOOK), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)
sys.path.append(str(HOOK))

import fetch_guard  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import quick_compile  # noqa: E402
from PIL import Image  # noqa: E402

quick_compile.install()


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=2, help="runs that tests/faults kills")


# The files that take longest, in this order: pytest-xdist starts files in the order of the tests.
LONG = [
    *("test_docs_run.py", "test_tutorial.py", "test_training.py", "test_kills.py", "test_train.py"),
    *("test_signals.py", "test_disk.py", "test_notebook_torch.py", "test_seeds.py", "test_site.py"),
]


def pytest_collection_modifyitems(items):
    order = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


@pytest.fixture(scope="session", autouse=True)
def _fetch_guard():
    """Every test, and every process that it starts, enforces the transfer guard as a GPU does."""
    undo = fetch_guard.install()
    yield
    undo()


@pytest.fixture(scope="module")
def optimized():
    """The programs of a module are compiled as a user's are, because their numbers are checked."""
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")
        yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A folder of class folders: 90 train and 30 test images of 8x8, three separable classes."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    rng = np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 10)):
        for label, name in enumerate(("red", "green", "blue")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 150, (8, 8, 3), dtype=np.uint8)
                image[..., label] += 80
                Image.fromarray(image).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def small_shapes10(tmp_path_factory):
    """A TFDS directory with 500 and 100 images of shapes10, and nothing else."""
    from vit_jax.data import shapes10

    folder = tmp_path_factory.mktemp("tfds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes10, "SPLIT_SIZES", {"train": 500, "test": 100})
        builder = shapes10.Shapes10(data_dir=folder, file_format="array_record")
        builder.download_and_prepare()
    return folder


@pytest.fixture(autouse=True)
def _caches(tmp_path_factory, monkeypatch):
    """No test writes into the user's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def require():
    """require(name, there, remedy): skips a test that lacks something to run with.

    With VIT_JAX_REQUIRE_NAME=1, as in CI, it fails instead.
    """

    def check(name, there, remedy):
        if there:
            return
        if os.environ.get(f"VIT_JAX_REQUIRE_{name.upper()}") == "1":
            pytest.fail(f"VIT_JAX_REQUIRE_{name.upper()}=1: {remedy}", pytrace=False)
        pytest.skip(remedy)

    return check


@pytest.fixture
def tiny_config(make_tiny_config):
    """The notebook's recipe, shrunk: width 16, one block, three epochs of 90 images, batch 16."""
    return make_tiny_config()


@pytest.fixture(scope="session")
def make_tiny_config(tiny_folder):
    return lambda depth=1: _tiny_config(tiny_folder, depth)


def _tiny_config(tiny_folder, depth):
    from vit_jax import config

    c = config.from_file(ROOT / "configs" / "cifar10_vit.py")
    c.data.name = f"folder:{tiny_folder}"
    c.batch_size = 16  # the last batch of an epoch holds 10
    c.eval_batch_size = 16
    c.epochs = 3
    c.log_every = "2 steps"
    c.model.patch_size, c.model.width, c.model.depth = 4, 16, depth
    c.model.num_heads, c.model.mlp_dim = 2, 32
    c.optim.peak_lr = 1e-2
    return c


@pytest.fixture(scope="session")
def tiny_run(make_tiny_config, tmp_path_factory):
    """The workdir of a finished run of two blocks, validated. Not to be written to."""
    from vit_jax.train import train

    c = make_tiny_config(depth=2)
    c.data.train_split, c.data.val_split = "train[:60]", "train[60:]"
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        train(c, workdir, command="python -m vit_jax.main --config configs/cifar10_vit.py")
    return workdir
