"""docs/tutorial.ipynb runs from top to bottom, and its stored outputs are a complete run's.

The tests train for 20 steps. python tests/test_tutorial.py runs the notebook at full length and
rewrites its outputs; it needs PyTorch, and CIFAR-10 in TFDS_DATA_DIR.
"""

import importlib.util
import os
import pathlib
import re

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = pathlib.Path(__file__).parents[1] / "docs" / "tutorial.ipynb"
# Upper bounds of the printed differences between PyTorch and JAX, as in tests/parity.
BOUNDS = {
    "patch embedding": 3e-6,
    "block": 1e-5,
    "logits": 1e-5,
    "loss before the step": 1e-5,
    "loss after the step": 1e-5,
}
# The test's models have fewer blocks, and batches are smaller.
SMALLER = {
    'from_file("cifar10_vit")\n': 'from_file("cifar10_vit")\nrecipe.model.depth = 2\n',
    "embed_dim=256, depth=6, num_heads=8": "embed_dim=256, depth=2, num_heads=8",
    "= STEPS\n": "= STEPS\nrecipe.batch_size, recipe.model.depth = 20, 1\n",
}
WRONG_DEFAULTS = ("with epsilon 1e-6", "with the tanh GELU")
SKIPPED = "Skipped: PyTorch is not installed."


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook):
    """Everything that the code cells print to stdout."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")


def assert_matches_pytorch(text):
    """The differences that a run has printed are within their bounds."""
    found = dict(re.findall(r"^(.+): (?:largest )?difference (\S+)$", text, re.M))
    differences = {name: float(value) for name, value in found.items()}
    assert differences.keys() == {*BOUNDS, *WRONG_DEFAULTS}
    for name, bound in BOUNDS.items():
        assert differences[name] < bound, name
    for name in WRONG_DEFAULTS:
        assert differences[name] > 2 * differences["block"], name
    bounds = re.findall(r"^largest initial (.+): PyTorch (\S+), JAX (\S+)$", text, re.M)
    assert len(bounds) == 8
    for name, theirs, ours in bounds:
        assert float(ours) == pytest.approx(float(theirs), rel=0.02), name


def assert_works(text):
    """What holds with and without PyTorch: the losses repeat, checkpoints are restored."""
    names = dict(re.findall(r"^(.+): (True|False)$", text, re.M))
    expected = {"same losses", "the loop's weights bit-equal", "the run's weights bit-equal"}
    assert expected <= names.keys()
    assert set(names.values()) == {"True"}


def run(notebook, folder, tfds_dir):
    """Executes a notebook in a folder, and returns what it prints. Raises if a cell fails."""
    environment = {
        "VIT_JAX_TUTORIAL_STEPS": "20",
        "TFDS_DATA_DIR": str(tfds_dir),
        "TMPDIR": str(folder),
        "OMP_WAIT_POLICY": "PASSIVE",  # PyTorch's threads do not spin while JAX computes
    }
    for text, smaller in SMALLER.items():
        (cell,) = (cell for cell in code_cells(notebook) if text in cell.source)
        cell.source = cell.source.replace(text, smaller)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    client.execute(env=os.environ | environment)
    return printed(notebook)


def test_tutorial_runs(tmp_path, small_shapes10, optimized):
    """With PyTorch its cells are compared with JAX's; without it they are skipped."""
    notebook = read()
    text = run(notebook, tmp_path, small_shapes10)
    assert "Skipped: CIFAR-10 is not in" in text
    assert_works(text)
    cells = [cell for cell in code_cells(notebook) if cell.source.startswith("%%pytorch")]
    assert len(cells) >= 10
    if importlib.util.find_spec("torch"):
        assert SKIPPED not in text
        assert_matches_pytorch(text)
    else:
        assert text.count(SKIPPED) == len(cells)


def test_stored_outputs_are_a_complete_run():
    notebook, cells = read(), code_cells(read())
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert kinds == {"stream", "display_data"}
    text = printed(notebook)
    assert "Skipped" not in text
    assert_matches_pytorch(text)
    assert_works(text)
    assert float(re.search(r"^Test Accuracy: (\S+)%$", text, re.M)[1]) > 90
    assert NOTEBOOK.stat().st_size < 300_000


def test_linked_pages_exist():
    text = "".join(cell.source for cell in read().cells if cell.cell_type == "markdown")
    targets = set(re.findall(r"\]\(([^)#:]+)\)", text))
    assert {"port.md", "recipes.md"} <= targets
    for target in targets:
        assert (NOTEBOOK.parent / target).exists(), target


if __name__ == "__main__":
    complete = read()
    NotebookClient(complete, record_timing=False, timeout=None).execute()
    nbformat.write(complete, NOTEBOOK)
