"""The documentation: the commands, paths, links, and config fields that it names exist.

python tests/test_docs.py rewrites docs/config.md.
"""

import pathlib
import re

import pytest

from vit_jax import config
from vit_jax.__main__ import COMMANDS

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("docs/howto/*.md"),
    *ROOT.glob("configs/*.py"),
]
PAGE = ROOT / "docs" / "config.md"


INTRODUCTION = """# Config fields

Every field with its default, meaning, and choices, as `python -m vit_jax.main --help_config`
prints it. A duration is a number of steps, epochs, examples, or percent of the run, such as
`"500 steps"`, `"5 epochs"`, or `"15%"`; empty means never. On the command line the space may be
left out: `--config.optim.warmup=5epochs`. This page is written by `python tests/test_docs.py`.
"""


def config_page():
    fields = "\n".join(config.field_help()).strip()
    return f"{INTRODUCTION}\n```text\n{fields}\n```\n"


def test_config_page_is_current():
    assert PAGE.read_text() == config_page(), "run: python tests/test_docs.py"


def sections(path):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_named_commands_paths_links_and_fields_exist(path):
    text = path.read_text()
    for command in re.findall(r"(?:python -m vit_jax|`vit-jax) ([a-z]+)", text):
        assert command in COMMANDS, command
    modules = {name.replace(".", "/") for name in re.findall(r"-m vit_jax((?:\.\w+)+)", text)}
    assert modules <= {"/main"}, modules
    for name in re.findall(
        r"(?<![\w/])(?:vit_jax|configs|tests|scripts|docs)/[\w/]*(?:\.\w+)?", text
    ):
        # Google's repository has a file of this name.
        assert (ROOT / name).exists() or name == "vit_jax/models_vit.py", name
    for target, section in re.findall(r"\]\(([^)#:]+)(?:#([\w-]+))?\)", text):
        assert (path.parent / target).exists(), target
        assert not section or section in sections(path.parent / target), f"{target}#{section}"
    if path.name != "CHANGELOG.md":
        added = re.findall(r'^\+ +"([\w.]+)": ', text, re.M)  # by a diff on the page
        for field in re.findall(r"--config\.([\w.]+\w)", text):
            assert field in [*config.FIELDS, *added], field


def test_links_in_the_log_exist():
    for path in ROOT.glob("docs/log/*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


if __name__ == "__main__":
    PAGE.write_text(config_page())
