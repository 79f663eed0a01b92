"""The site of the docs, built strictly: MkDocs fails if a link, an anchor, or a page is missing.

Skipped without the extra `site`; with VIT_JAX_REQUIRE_SITE=1, as in CI, it fails.
"""

import ast
import html
import importlib.util
import pathlib
import re
import subprocess
import sys
import types

import pytest

ROOT = pathlib.Path(__file__).parents[1]
HOOK = ROOT / "scripts" / "mkdocs_hook.py"


@pytest.fixture(scope="module")
def site(require, tmp_path_factory):
    """The folder of the built site."""
    extra = ("mkdocs", "mkdocs_awesome_nav", "material", "mkdocstrings", "nbconvert")
    there = all(importlib.util.find_spec(name) for name in extra)
    require("site", there, "the site's packages are missing: pip install -e '.[site]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def hook(site):
    """The module that mkdocs.yml names, importable if the site can be built."""
    spec = importlib.util.spec_from_file_location("mkdocs_hook", HOOK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def articles(site):
    """{page: the HTML of its text, without code and tables of contents}."""
    found = {}
    for path in site.rglob("*.html"):
        article = re.search(r"<article.*?</article>", path.read_text(), re.S)[0]
        article = re.sub(r"<(details|pre|code)\b.*?</\1>", "", article, flags=re.S)
        found[path.relative_to(site).as_posix()] = article
    return found


def test_every_document_is_a_page(site, hook):
    documents = [ROOT / path for path in hook.PAGES if (ROOT / path).exists()]
    pages = [hook.PAGES[path.relative_to(ROOT).as_posix()] for path in documents]
    pages += [path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")]
    missing = [page for page in pages if not (site / page).with_suffix(".html").exists()]
    assert len(pages) >= 20 and not missing


def test_first_page_is_the_readme(site):
    page = (site / "index.html").read_text()
    title = re.search(r"^# (.+)$", (ROOT / "README.md").read_text(), re.M)[1]
    assert f">{title}<" in page
    assert '<a href="port.html">docs/port.md</a>' in page
    assert 'src="report.png"' in page and (site / "report.png").exists()
    assert 'href="docs/' not in page and 'src="docs/' not in page


@pytest.mark.parametrize("package", ["augment", "data", "weights"])
def test_api_pages_contain_what_the_packages_export(site, package):
    page = (site / "api" / f"{package}.html").read_text()
    page += (site / "api" / "vit_jax.html").read_text()
    for node in ast.parse((ROOT / "vit_jax" / package / "__init__.py").read_text()).body:
        for name in [alias.name for alias in getattr(node, "names", ())]:
            ids = (f'id="vit_jax.{package}.{name}"', f'id="{node.module}.{name}"')
            assert any(id in page for id in ids), name


def test_api_page_has_signatures_and_docstrings(site):
    page = html.unescape(re.sub("<[^>]*>", "", (site / "api" / "experiment.html").read_text()))
    assert re.search(r"make_experiment\(\s*config: ConfigDict,", page)
    assert "Builds the Experiment of a config on a list of devices" in page


def test_no_page_loads_anything_from_another_host(site):
    remote = r"(?:https?:)?//"
    loads = rf"<(?!a\b)[^>]*\b(?:src|href|srcset|data|poster)=[\"']?{remote}[^>]*>"
    for path in site.rglob("*.html"):
        found = re.findall(loads, path.read_text())
        assert not found, f"{path.name}: {found}"
    for path in site.rglob("*.css"):
        found = re.findall(rf"(?:url\(|@import)\s*[\"']?{remote}[^)]*", path.read_text())
        assert not found, f"{path.name}: {found}"


def test_no_markup_is_left_as_text_or_made_of_text(site):
    # Python-Markdown requires an empty line before a list or table; GitHub does not.
    for page, article in articles(site).items():
        for paragraph in re.findall(r"<p>.*?</p>", article, re.S):
            assert not re.search(r"^(- |\* |\d+\. |\||#)", paragraph[3:], re.M), (page, paragraph)
        if page.startswith("api/"):  # `*.png and *.jpg` without backticks
            assert not re.search(r"<p>[^<]*<(em|strong)>", article), page


@pytest.mark.parametrize(
    ("page", "link", "path"),
    [
        ("port.md", "../configs/cifar10_vit.py", "configs/cifar10_vit.py"),
        ("log/cuts.md", "../../vit_jax/optim.py#L1", "vit_jax/optim.py#L1"),
        ("index.md", "configs/cifar10_vit.py", "configs/cifar10_vit.py"),
    ],
)
def test_links_out_of_docs_lead_to_the_repository_or_are_text(hook, page, link, path):
    page = types.SimpleNamespace(file=types.SimpleNamespace(src_uri=page))
    config = types.SimpleNamespace(extra={})
    text = f"See [the code]({link})."
    assert hook.on_page_markdown(text, page, config, None) == "See the code."
    config.extra["repository"] = "https://example.org/vit_jax"
    linked = f"See [the code](https://example.org/vit_jax/blob/main/{path})."
    assert hook.on_page_markdown(text, page, config, None) == linked


@pytest.mark.parametrize(
    ("page", "link", "rewritten"),
    [
        ("index.md", "docs/log/cuts.md#a", "log/cuts.md#a"),
        ("log/cuts.md", "../results.md", "../results.md"),
        ("log/cuts.md", "../../README.md", "../index.md"),
        ("port.md", "../missing.py", "../missing.py"),  # MkDocs reports it
        ("port.md", "#traps", "#traps"),
        ("port.md", "https://example.org", "https://example.org"),
    ],
)
def test_links_between_pages(hook, page, link, rewritten):
    page = types.SimpleNamespace(file=types.SimpleNamespace(src_uri=page))
    config = types.SimpleNamespace(extra={})
    assert hook.on_page_markdown(f"[a]({link})", page, config, None) == f"[a]({rewritten})"
