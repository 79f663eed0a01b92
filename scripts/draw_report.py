"""Draws the image of a report that README.md shows, with Chromium.

python scripts/draw_report.py --report WORKDIR/report/index.html --out docs/report.png
"""

import argparse
import base64
import contextlib
import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

WIDTH, SHOWN, MARGIN = 1265, 900, 14
# The parts of the page that are drawn: first and last element, and color scheme.
PARTS = (
    ("h1", "#results figure", "light"),
    ("#curves", "#curves", "light"),
    ("#evaluation", "#evaluation figure", "light"),
    ("#attention", "#attention", "dark"),
)
FLAGS = ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "no-first-run")


@contextlib.contextmanager
def chromium():
    """Yields a headless Chromium with its own profile."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"user-data-dir={profile}"):
            options.add_argument(f"--{flag}")
        browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            yield browser
        finally:
            browser.quit()


def set_screen(browser, width, height):
    """Sets the size of the screen in pixels."""
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)


def set_scheme(browser, scheme):
    """Sets the color scheme, "light" or "dark"."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def screenshot(browser, **options):
    """Returns what the browser shows as an RGB image; options as in Page.captureScreenshot."""
    png = browser.execute_cdp_cmd("Page.captureScreenshot", options)["data"]
    return Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")


def draw(address):
    """Returns the parts of the page, stacked vertically, as a PIL image."""
    parts = []
    with chromium() as browser:
        set_screen(browser, WIDTH, 900)
        browser.get(address)
        for first, last, scheme in PARTS:
            set_scheme(browser, scheme)
            box = "return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()"
            top, bottom = (browser.execute_script(box, e) for e in (first, last))
            top, bottom = round(top["top"]) - MARGIN, round(bottom["bottom"]) + MARGIN
            clip = {"x": 0, "y": top, "width": WIDTH, "height": bottom - top, "scale": 1}
            parts.append(screenshot(browser, captureBeyondViewport=True, clip=clip))
    page, y = Image.new("RGB", (WIDTH, sum(part.height for part in parts))), 0
    for part in parts:
        page.paste(part, (0, y))
        y += part.height
    return page


def main():
    """Writes the image."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", type=Path, required=True, help="index.html of the report")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    args = parser.parse_args()
    page = draw(args.report.resolve().as_uri())
    page = page.resize((SHOWN, round(SHOWN * page.height / WIDTH)), Image.Resampling.LANCZOS)
    # A palette makes the file a third of the size.
    page.quantize(128).save(args.out, optimize=True)
    print(f"{args.out}: {page.width} x {page.height}, {args.out.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
