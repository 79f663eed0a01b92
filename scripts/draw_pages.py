"""Draws docs/pages.png: pages on a desktop's and a phone's screen, in light and dark mode.

python -m vit_jax demo --workdir WORKDIR &
python scripts/draw_pages.py --out docs/pages.png file://WORKDIR/report/index.html#curves \
    http://127.0.0.1:8000 file://SITE/index.html
"""

import argparse
from pathlib import Path

from draw_report import chromium, screenshot, set_scheme, set_screen
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

SCREENS = ((1280, "light"), (390, "dark"), (1280, "dark"), (390, "light"))  # width, color scheme
SCREEN_HEIGHT, ROW_HEIGHT, GAP = 900, 300, 10


def shots(address):
    """Yields an image of a page for each of SCREENS. The demo classifies its first image."""
    for width, scheme in SCREENS:
        with chromium() as browser:  # a new one, since the site remembers its color scheme
            set_screen(browser, width, SCREEN_HEIGHT)
            set_scheme(browser, scheme)
            browser.get(address)
            if buttons := browser.find_elements(By.CSS_SELECTOR, "#examples button"):
                buttons[0].click()
                result = browser.find_element(By.ID, "result")
                WebDriverWait(browser, 60).until(lambda _, result=result: result.is_displayed())
            yield screenshot(browser)


def main():
    """Writes the image: one row per page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("addresses", nargs="+", metavar="URL", help="a page")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    args = parser.parse_args()
    widths = [round(width * ROW_HEIGHT / SCREEN_HEIGHT) for width, _ in SCREENS]
    size = sum(widths) + GAP * (len(widths) + 1), GAP + (ROW_HEIGHT + GAP) * len(args.addresses)
    sheet = Image.new("RGB", size, "#8a94a0")
    for row, address in enumerate(args.addresses):
        x, y = GAP, GAP + row * (ROW_HEIGHT + GAP)
        for width, shot in zip(widths, shots(address), strict=True):
            sheet.paste(shot.resize((width, ROW_HEIGHT), Image.Resampling.LANCZOS), (x, y))
            x += width + GAP
    sheet.quantize(256).save(args.out, optimize=True)
    print(f"{args.out}: {sheet.width} x {sheet.height}, {args.out.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
