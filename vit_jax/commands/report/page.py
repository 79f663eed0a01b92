"""The parts of the report's page: functions that return HTML. Text arguments are escaped."""

import base64
import io
import string
from html import escape
from pathlib import Path

from PIL import Image

_TEMPLATE = Path(__file__).with_name("page.html")


def render(name, parts):
    """Returns the page, all ASCII so that it is valid in every locale."""
    template = string.Template(_TEMPLATE.read_text(encoding="utf-8"))
    html = template.substitute(name=escape(name), sections="".join(parts))
    return html.encode("ascii", "xmlcharrefreplace").decode()


def section(title, *parts):
    """Returns a section with the given HTML parts, or "" if there are none."""
    grid = f"<div class=grid>{''.join(parts)}</div>"
    return f"<section id={title.lower()}><h2>{title}</h2>{grid}</section>" if parts else ""


def note(text, kind="note"):
    """Returns a paragraph as wide as the page."""
    return f'<p class="wide {kind}">{escape(text)}</p>'


def notice(text):
    """Returns a highlighted paragraph: a problem of the run or of the report."""
    return note(text, "notice")


def figure(title, content, caption="", *, wide=False):
    """Returns HTML content with a title and a caption."""
    return (
        f"<figure{' class=wide' if wide else ''}><h3>{escape(title)}</h3>"
        f"<div class=scroll>{content}</div><figcaption>{escape(caption)}</figcaption></figure>"
    )


def plot(drawing):
    """Returns a matplotlib Figure as an SVG image."""
    file = io.BytesIO()
    drawing.savefig(file, format="svg")
    return _image("svg+xml", file)


def picture(pixels):
    """Returns uint8[H, W, C] pixels, gray, RGB, or RGBA, as a PNG image."""
    file = io.BytesIO()
    pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    Image.fromarray(pixels).save(file, "PNG")
    return _image("png", file)


def _image(kind, file):
    content = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="" src="data:image/{kind};base64,{content}">'


def gallery(images, captions):
    """Returns uint8[H, W, C] images side by side, each above its caption."""
    pairs = zip(images, captions, strict=True)
    tiles = (f"<div>{picture(image)}{escape(caption)}</div>" for image, caption in pairs)
    return f"<div class=gallery>{''.join(tiles)}</div>"


def table(title, head, rows):
    """Returns a table whose first column names the rows, or "" if there are no rows."""
    if not rows:
        return ""
    columns, body = "".join(f"<th scope=col>{escape(name)}</th>" for name in head), ""
    for name, *values in rows:
        cells = "".join(f"<td>{escape(str(value))}</td>" for value in values)
        body += f"<tr><th scope=row>{escape(name)}</th>{cells}</tr>"
    content = f"<table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table>"
    return figure(title, content, wide=True)
