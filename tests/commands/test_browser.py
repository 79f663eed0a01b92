"""The report and the demo in headless Chromium.

Skipped if Chromium or its driver is missing; with VIT_JAX_REQUIRE_BROWSER=1, as in CI, it fails.
"""

import json
import shutil
import threading

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from werkzeug.serving import make_server

import vit_jax
from vit_jax.commands import demo
from vit_jax.commands.report.build import write_report

FLAGS = (
    *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"),
    *("disable-background-networking", "disable-component-update", "disable-dev-shm-usage"),
)


@pytest.fixture(scope="module")
def browser(require, tmp_path_factory):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    require("browser", chromium and driver, "Chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()


def requests(browser):
    """URLs requested since the last call, without data URLs."""
    entries = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    sent = [e["params"] for e in entries if e["method"] == "Network.requestWillBeSent"]
    urls = [e["request"]["url"] for e in sent]
    return [url for url in urls if not url.startswith("data:")]


def show(browser, url, *, width, dark=False):
    """Opens a URL with a given screen width, in light or dark mode."""
    phone = width < 600
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": phone}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    requests(browser), browser.get_log("browser")
    browser.get(url)


@pytest.fixture(scope="module")
def page(tiny_run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("page") / "tiny"
    shutil.copytree(tiny_run, workdir)
    return write_report(workdir)


@pytest.mark.parametrize("width", [1280, 390])
def test_report_opens_from_disk_without_requests(browser, page, width):
    colors = {}
    for dark in (False, True):
        show(browser, page.as_uri(), width=width, dark=dark)
        assert requests(browser) == [page.as_uri()]
        assert browser.get_log("browser") == []
        drawings = browser.find_elements(By.CSS_SELECTOR, "figure img")
        shown = "return arguments[0].naturalWidth"
        assert len(drawings) > 8 and all(browser.execute_script(shown, d) for d in drawings)
        # No horizontal scrolling.
        overflow = "return document.documentElement.scrollWidth - window.innerWidth"
        assert browser.execute_script(overflow) <= 0
        style = "return getComputedStyle(document.querySelector(arguments[0])).backgroundColor"
        colors[dark] = [browser.execute_script(style, part) for part in ("body", "figure")]
    assert colors[False][0] != colors[True][0] and colors[False][1] != colors[True][1]


@pytest.fixture(scope="module")
def address(tiny_run):
    """The URL of the demo on a free local port."""
    trained = vit_jax.load(tiny_run)
    app = demo.make_app(trained, "127.0.0.1", demo.greet(trained, tiny_run))
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.port}/"
    server.shutdown()
    thread.join()


def upload(browser, path, until):
    """Chooses a file on the demo's page and waits for a condition."""
    browser.find_element(By.ID, "file").send_keys(str(path))
    WebDriverWait(browser, 20).until(lambda b: until(b))


def status(browser):
    return browser.find_element(By.ID, "status").text


def test_demo_classifies_an_upload(browser, address, tmp_path):
    """On a phone in dark mode; the next test opens the demo at both widths."""
    Image.new("RGB", (64, 48), (60, 60, 200)).save(tmp_path / "blue.png")
    show(browser, address, width=390, dark=True)
    upload(browser, tmp_path / "blue.png", lambda b: b.find_element(By.ID, "result").is_displayed())
    classes = browser.find_element(By.ID, "classes").text.split()
    assert classes[0] == "blue" and classes[1].endswith("%")
    heads = browser.find_elements(By.CSS_SELECTOR, "#layers img")
    shown = "return arguments[0].naturalWidth"
    assert [browser.execute_script(shown, head) for head in heads] == [128] * 4
    assert status(browser) == ""
    assert browser.get_log("browser") == []
    assert set(requests(browser)) == {address, f"{address}classify"}


@pytest.mark.parametrize("width", [1280, 390])
def test_demo_greets_with_images_to_click(browser, address, width):
    show(browser, address, width=width)
    assert browser.find_element(By.TAG_NAME, "h1").text == "tiny"
    buttons = browser.find_elements(By.CSS_SELECTOR, "#examples button")
    assert len(buttons) == 12
    overflow = "return document.documentElement.scrollWidth - window.innerWidth"
    assert browser.execute_script(overflow) <= 0
    for button in (buttons[0], next(b for b in buttons if b.text != buttons[0].text)):
        button.click()
        shown = lambda b: b.find_element(By.ID, "result").is_displayed()  # noqa: E731
        WebDriverWait(browser, 20).until(shown)
        assert browser.find_element(By.ID, "classes").text.startswith(button.text)
    assert browser.get_log("browser") == []
    assert set(requests(browser)) == {address, f"{address}classify"}


def test_demo_rejects_bad_files_and_continues(browser, address, tmp_path):
    (tmp_path / "huge.png").write_bytes(bytes(demo.MAX_BYTES + 1))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    Image.new("RGB", (64, 48), (200, 60, 60)).save(tmp_path / "red.png")
    show(browser, address, width=1280)
    upload(browser, tmp_path / "huge.png", lambda b: "larger than 10 MB" in status(b))
    assert browser.get_log("browser") == []
    upload(browser, tmp_path / "broken.png", lambda b: "cannot read this file" in status(b))
    # The browser logs responses with status 400 by itself.
    assert all("400" in entry["message"] for entry in browser.get_log("browser"))
    assert not browser.find_element(By.ID, "result").is_displayed()
    upload(browser, tmp_path / "red.png", lambda b: b.find_element(By.ID, "result").is_displayed())
    assert browser.find_element(By.ID, "classes").text.startswith("red")
