"""The site's pages that are not Markdown files in docs/, and its links to files outside docs/.

mkdocs.yml names this file. Links in the documents are relative paths in the repository, where they
work; here they are rewritten for the site.
"""

import os.path
import pathlib
import re

from mkdocs.structure.files import File
from nbconvert import MarkdownExporter

ROOT = pathlib.Path(__file__).parents[1]
# {file in the repository: its page in the site}.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "docs/tutorial.ipynb": "tutorial.md",
}
LINK = re.compile(r"\[([^\[\]]*)\]\(([^()#:\s]+)(#[^()\s]*)?\)")


def on_files(files, config):
    """Adds the PAGES that exist, and the notebook's images."""
    for path, page in PAGES.items():
        if path.endswith(".md"):
            files.append(File.generated(config, page, content=(ROOT / path).read_text()))
        elif (ROOT / path).exists():
            text, resources = MarkdownExporter().from_filename(ROOT / path)
            for name, content in {page: text, **resources["outputs"]}.items():
                files.append(File.generated(config, name, content=content))


def on_page_markdown(markdown, page, config, files):
    """Rewrites links to PAGES, into docs/, and out of it: to `extra.repository`, if it is set."""
    uri = page.file.src_uri
    source = {page: path for path, page in PAGES.items()}.get(uri, f"docs/{uri}")

    def rewrite(match):
        text, link, anchor = match[1], match[2], match[3] or ""
        path = os.path.normpath(os.path.join(os.path.dirname(source), link))
        if not (ROOT / path).exists():
            return match[0]  # mkdocs reports it
        if path in PAGES or path.startswith("docs/"):
            target = PAGES.get(path, path.removeprefix("docs/"))
            return f"[{text}]({os.path.relpath(target, os.path.dirname(uri) or '.')}{anchor})"
        repository = config.extra.get("repository")
        return f"[{text}]({repository}/blob/main/{path}{anchor})" if repository else text

    return LINK.sub(rewrite, markdown)
