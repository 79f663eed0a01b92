"""The report's page: collects sections and notices, then writes one HTML file."""

import contextlib
import string
from html import escape
from pathlib import Path

from vit_jax.commands.report import figures
from vit_jax.errors import UserError, make_folder
from vit_jax.workdir import write_text

_TEMPLATE = Path(__file__).with_name("page.html")


class Page:
    """A page in a folder, built from top to bottom."""

    def __init__(self, folder):
        self._folder = Path(folder)
        self._titles, self._parts, self._notices = [], [], []

    def prepare_folder(self):
        """Creates the folder. Raises UserError if it, or a file in it, is a symbolic link.

        The author of an untrusted workdir could otherwise redirect the report's writes.
        """
        make_folder(self._folder)
        for path in (self._folder, *self._folder.iterdir()):
            if path.is_symlink():
                raise UserError(
                    f"{path} is a symbolic link: remove it so that a report can go there"
                )

    def notice(self, text):
        """Adds a sentence above the first section."""
        self._notices.append(text)

    def section(self, title, note_html=""):
        """Starts a section, with an optional note below its title."""
        self._end_section()
        self._titles.append(title)
        note = f"<p class=note>{note_html}</p>" if note_html else ""
        self.html(f'<section id="{_anchor(title)}"><h2>{title}</h2>{note}<div class=grid>')

    def html(self, part):
        """Adds HTML to the open section."""
        self._parts.append(part)

    def figure(self, name, title, figure, caption, *, wide=False):
        """Adds a figure and writes it as NAME.png and NAME.svg."""
        with self._writing():
            drawing = figures.save(figure, self._folder, name)
        self.html(
            f"<figure{' class=wide' if wide else ''}><h3>{escape(title)}</h3>"
            f"<div class=drawing>{drawing}</div><figcaption>{escape(caption)} "
            f'<span class=files><a href="{name}.png">PNG</a> <a href="{name}.svg">SVG</a></span>'
            "</figcaption></figure>"
        )

    def table(self, title, head, rows):
        """Adds a table whose first column names the rows. An empty `head` omits the header."""
        cells = "".join(f"<th scope=col>{escape(str(c))}</th>" for c in head)
        body = "".join(
            f"<tr><th scope=row>{escape(str(name))}</th>"
            + "".join(f"<td>{escape(str(c))}</td>" for c in rest)
            + "</tr>"
            for name, *rest in rows
        )
        head = f"<thead><tr>{cells}</tr></thead>" if head else ""
        self.html(
            f"<figure class=wide><h3>{escape(title)}</h3><div class=scroll>"
            f"<table>{head}<tbody>{body}</tbody></table></div></figure>"
        )

    def render(self, name, about, cards):
        """Returns the page's HTML, all ASCII so that it is valid in every locale.

        Args:
          name: the title.
          about: the line below it.
          cards: a list of (value, label) shown at the top.
        """
        self._end_section()
        page = string.Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
            name=escape(name),
            about=escape(about),
            notices="".join(f"<p class=notice>{escape(text)}</p>" for text in self._notices),
            cards="".join(
                f"<div><b>{escape(b)}</b><span>{escape(s)}</span></div>" for b, s in cards
            ),
            links="".join(f'<a href="#{_anchor(title)}">{title}</a>' for title in self._titles),
            sections="".join(self._parts),
        )
        return page.encode("ascii", "xmlcharrefreplace").decode()

    def write(self, name, about, cards):
        """Writes index.html atomically and returns its path; arguments as in `render`."""
        path = self._folder / "index.html"
        with self._writing():
            write_text(path, self.render(name, about, cards))
        return path

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except OSError as e:
            where = e.filename or self._folder
            raise UserError(f"cannot write the report: {where}: {e.strerror}") from e

    def _end_section(self):
        if self._titles:
            self.html("</div></section>")


def _anchor(title):
    return title.lower().replace(" ", "-")
