"""The rules of the package: imports, private names, sizes, annotations, tests, light imports."""

import ast
import pathlib
import re
import subprocess
import sys
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "vit_jax"
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
# These may import anything, and nothing imports them.
ENTRIES = ("__init__", "__main__", "main")
# Modules without a test file of their own, and the tests that cover them.
COVERED_BY = {
    "__main__": "commands/test_cli",
    "commands/benchmark/measure": "commands/test_benchmark",
    "commands/benchmark/notebook_torch": "parity/test_benchmark_torch",
    "commands/benchmark/torch_side": "parity/test_benchmark_torch",
    "commands/describe/describe": "commands/test_describe",
    "commands/describe/estimate": "commands/test_gpu_estimate",
    "commands/describe/program": "commands/test_gpu_estimate",
    "commands/report/build": "commands/test_report",
    "commands/report/figures": "commands/test_report",
    "commands/report/page": "commands/test_report",
    "commands/report/records": "commands/test_report",
    "commands/report/sections": "commands/test_report",
    "data/source": "data/test_open",
    "main": "commands/test_cli",
}


def imports(path):
    """Yields (module, name or None) for every import of the package's own modules in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vit_jax":
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            names = (alias.name for alias in node.names)
            yield from ((name, None) for name in names if name.startswith("vit_jax."))


def top(module, name):
    """The root module or package that an import reaches."""
    return module.split(".")[1] if "." in module else name


def import_list():
    """{module or package: its line} of the list in docs/architecture.md, counted from the top."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    block = re.search(r"^## Imports$.*?^```text\n(.*?)^```", text, re.M | re.S)[1]
    return {name: i for i, line in enumerate(block.splitlines()) for name in line.split()}


def test_imports_go_down_the_list_and_not_within_a_line():
    lines = import_list()
    for name, path in FILES.items():
        importer = name.split("/")[0].removesuffix(".py")
        if importer in ENTRIES:
            continue
        assert importer in lines, f"{importer} is not in the list of docs/architecture.md"
        for imported in {top(*pair) for pair in imports(path)} - {importer}:
            assert imported in lines, f"{name} imports {imported}"
            assert lines[imported] > lines[importer], f"{name} imports {imported}"


def test_private_names_stay_in_their_file():
    private = re.compile(r"_(?!_)")
    for path in [*FILES.values(), *(ROOT / "scripts").glob("*.py")]:
        tree, modules = ast.parse(path.read_text()), set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vit_jax"):
                for alias in node.names:
                    assert not private.match(alias.name), f"{path.name} imports {alias.name}"
                    modules.add(alias.asname or alias.name)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                uses = f"{path.name} uses {node.value.id}.{node.attr}"
                assert not (node.value.id in modules and private.match(node.attr)), uses


def test_the_root_has_at_most_14_files_and_functions_at_most_60_lines():
    assert len(list(PACKAGE.glob("*.py"))) <= 14
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                assert length <= 60, f"{name}: {node.name} has {length} lines"


def test_public_functions_of_the_core_are_annotated():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    core = tuple(settings["tool"]["pyrefly"]["project-includes"])

    def functions(body):
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from functions(node.body)
            elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                yield node

    for name, path in FILES.items():
        if f"vit_jax/{name}".startswith(core):
            for function in functions(ast.parse(path.read_text()).body):
                arguments = [*function.args.args, *function.args.kwonlyargs]
                free = [a.arg for a in arguments if a.annotation is None]
                assert function.returns, f"{name}: {function.name} has no return annotation"
                assert set(free) <= {"self", "cls"}, f"{name}: {function.name}: {free}"


def test_tests_mirror_the_package():
    def test_file(module):
        folder, _, name = module.rpartition("/")
        return pathlib.Path("tests", folder, f"test_{name}.py")

    modules = {name.removesuffix(".py") for name in FILES if not name.endswith("/__init__.py")}
    modules -= {"__init__"}
    assert set(COVERED_BY) <= modules, "COVERED_BY names a module that does not exist"
    for module in modules:
        path = test_file(module)
        if module in COVERED_BY:
            folder, _, name = COVERED_BY[module].rpartition("/")
            assert not (ROOT / path).exists(), f"{module} has {path}: remove it from COVERED_BY"
            path = pathlib.Path("tests", folder, f"{name}.py")
        assert (ROOT / path).exists(), f"{path} does not exist: add it, or name it in COVERED_BY"


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.strip()


def test_importing_the_package_is_lightweight():
    code = "import sys, vit_jax; print(*(m for m in ('jax', 'numpy', 'orbax') if m in sys.modules))"
    assert run(code) == ""


def test_training_imports_no_other_framework_and_starts_no_accelerator():
    heavy = ("tensorflow", "torch", "matplotlib", "tensorflow_datasets", "flask", "wandb")
    code = (
        "import sys, vit_jax.train, vit_jax.main\n"
        "from jax._src import xla_bridge\n"
        f"print(*(m for m in {heavy} if m in sys.modules), *xla_bridge._backends)\n"
        "vit_jax.workdir.metrics._import_tensorboardx()  # of TensorBoard's events\n"
        "print(*(name in sys.modules for name in ('tensorboardX', 'torch')))"
    )
    assert run(code) == "True False"
