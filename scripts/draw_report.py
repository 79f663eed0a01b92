"""Draws the image of a report that README.md shows, with Chromium.

python scripts/draw_report.py --report WORKDIR/report/index.html --out docs/report.png
"""

import argparse
import base64
import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

WIDTH, SHOWN = 1265, 900
# The parts of the page that are drawn: first element, height in pixels, and color scheme.
PARTS = (("html", 1030, "light"), ("#evaluation", 580, "light"), ("#attention", 800, "dark"))
FLAGS = ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "no-first-run")


def draw(address):
    """Returns the parts of the page, stacked vertically, as a PIL image."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome")
    for flag in (*FLAGS, f"user-data-dir={tempfile.mkdtemp()}"):
        options.add_argument(f"--{flag}")
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    screen = {"width": WIDTH, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page, y = Image.new("RGB", (WIDTH, sum(height for _, height, _ in PARTS))), 0
    try:
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        browser.get(address)
        for start, height, scheme in PARTS:
            feature = {"name": "prefers-color-scheme", "value": scheme}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
            top = "return document.querySelector(arguments[0]).getBoundingClientRect().top"
            top = max(0, browser.execute_script(top, start) - 14)
            clip = {"x": 0, "y": top, "width": WIDTH, "height": height, "scale": 1}
            options = {"captureBeyondViewport": True, "clip": clip}
            png = browser.execute_cdp_cmd("Page.captureScreenshot", options)["data"]
            page.paste(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), (0, y))
            y += height
    finally:
        browser.quit()
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
