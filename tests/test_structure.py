"""The import rule of the package, and what an import may not cost."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "vit_jax"

# A file imports only files of a lower level; files of one level never each other.
LEVELS = {
    0: {"errors", "durations", "scores", "attention", "notebook_torch", "peaks"},
    1: {"config"},
    2: {"model", "augment", "data", "optim", "mesh", "checkpoint", "metrics"}
    | {"distributed", "stopping", "figures"},
    3: {"classify"},
    4: {"step", "loading", "weights"},
    5: {"evaluate", "export", "predict", "demo"},
    6: {"run", "sweep"},
    7: {"train", "explain"},
    8: {"main", "benchmark", "benchmark_torch"},
    9: {"report"},
}
LEVEL = {name: level for level, names in LEVELS.items() for name in names}


def imported(path):
    """Names of the package's own modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "vit_jax":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vit_jax."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("vit_jax."))


def test_files_import_only_lower_levels():
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name == "__init__":
            continue
        assert name in LEVEL, f"{name} has no level: add it to LEVELS"
        for other in imported(path):
            if other == name:  # within a package
                continue
            assert LEVEL[other] < LEVEL[name], f"{path.name} imports {other}"


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    ).stdout.strip()


def test_importing_the_package_is_light():
    code = "import sys, vit_jax; print(*(m for m in ('jax', 'numpy', 'orbax') if m in sys.modules))"
    assert run(code) == ""


@pytest.mark.parametrize("module", ["vit_jax.train", "vit_jax.main"])
def test_training_imports_no_other_framework(module):
    heavy = ("tensorflow", "torch", "matplotlib", "tensorflow_datasets", "flask", "wandb")
    code = f"import sys, {module}; print(*(m for m in {heavy} if m in sys.modules))"
    assert run(code) == ""


def test_importing_everything_starts_no_accelerator():
    code = (
        "import vit_jax.train, vit_jax.main\n"
        "from jax._src import xla_bridge\n"
        "print(xla_bridge._backends)"
    )
    assert run(code) == "{}"
