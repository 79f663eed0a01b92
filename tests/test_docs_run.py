"""The documentation runs: the blocks of each page, in order, one test per page.

Each page runs in a folder like a checkout, in which `./launch.sh COMMAND` uses the interpreter of
the tests instead of an environment of its own. Blocks of Python share a namespace, a block of bash
stops at the first error, and a diff is applied. Other languages are not run, nor is a block after a
line `<!-- not run: REASON -->`.

python tests/test_docs_run.py PAGE runs a page in the current folder.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("docs/howto/*.md"))]
RUN = ("bash", "python", "diff")
BLOCK = re.compile(r"^(<!-- not run: [^\n]+ -->\n)?```(\w+)\n(.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    """A fenced block that runs: the line of its fence, its language, and its code."""

    line: int
    language: str
    code: str


def blocks(text):
    """The Blocks of a page, without those marked as not run."""
    for found in BLOCK.finditer(text):
        reason, language, code = found.groups()
        if language in RUN and not reason:
            yield Block(text.count("\n", 0, found.start()) + 1, language, code)


def run(page):
    """Runs the blocks of a page in the current folder; an exception or exit code ends it."""
    namespace = {"__name__": "__main__"}
    for line, language, code in blocks(pathlib.Path(page).read_text()):
        print(f"{page}:{line}: {language}", flush=True)
        if language == "python":
            exec(compile("\n" * line + code, page, "exec"), namespace)
        elif language == "bash":
            subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=True)
        else:
            subprocess.run(["git", "apply", "-"], input=code, text=True, check=True)


# Several pages start with the same run, which is trained once.
LAUNCH = """#!/bin/sh
[ "$*" = "python -m vit_jax.main --workdir workdirs/short --config.steps=20" ] &&
    [ -e workdirs/short/result.json ] && exit
exec "$@"
"""


@pytest.fixture
def checkout(tmp_path, tmp_path_factory):
    """A folder with what the pages use of a checkout; launch.sh is replaced.

    The default recipe has one block and smaller batches. The pages share `workdirs`: a run that
    several of them start with is trained once, and described models have two blocks.
    """
    for name in ("configs", "docs", "scripts", "vit_jax"):
        shutil.copytree(ROOT / name, tmp_path / name)
    recipe = tmp_path / "configs" / "shapes10_vit.py"
    text = recipe.read_text().replace("batch_size = 100", "batch_size = 20")
    recipe.write_text(text.replace("depth = 4", "depth = 1"))
    page = tmp_path / "docs" / "howto" / "own_model.md"
    page.write_text(page.read_text().replace("--config.model.depth=6", "--config.model.depth=2"))
    (tmp_path / "launch.sh").write_text(LAUNCH)
    (tmp_path / "launch.sh").chmod(0o755)
    workdirs = tmp_path_factory.getbasetemp() / "workdirs"
    workdirs.mkdir(exist_ok=True)
    (tmp_path / "workdirs").symlink_to(workdirs)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_has_a_language(page):
    text = page.read_text()
    fences = re.findall(r"^ *```.*$", text, re.M)
    known = len(BLOCK.findall(text))
    assert len(fences) == 2 * known, f"a block without a language, or indented: {fences}"


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(blocks(p.read_text()))], ids=lambda page: page.stem
)
def test_page_runs(page, checkout, small_shapes10):
    paths = {"PATH": pathlib.Path(sys.executable).parent, "PYTHONPATH": checkout}
    environment = {name: f"{path}{os.pathsep}{os.environ[name]}" for name, path in paths.items()}
    environment["TFDS_DATA_DIR"] = str(small_shapes10)
    done = subprocess.run(
        [sys.executable, __file__, page.relative_to(ROOT)],
        cwd=checkout,
        env=os.environ | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout


def test_marked_blocks_and_other_languages_do_not_run():
    text = "```text\nfalse\n```\n\n<!-- not run: slow -->\n```bash\nfalse\n```\n\n```bash\nb\n```\n"
    assert list(blocks(text)) == [Block(10, "bash", "b\n")]


@pytest.mark.parametrize("block", ["bash\nfalse\ntrue", "python\n1 / 0", "diff\n--- a/x\n+++ b/x"])
def test_failing_block_fails_the_page(block, tmp_path):
    (tmp_path / "page.md").write_text(f"```{block}\n```\n")
    with pytest.raises((subprocess.CalledProcessError, ZeroDivisionError)):
        run(tmp_path / "page.md")


if __name__ == "__main__":
    run(sys.argv[1])
