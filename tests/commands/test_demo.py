"""The demo's server: answers, rejected uploads, and rejected origins."""

import base64
import io
import json
import re
import shutil
import zlib

import numpy as np
import pytest
from PIL import Image

import vit_jax
from vit_jax.commands import demo
from vit_jax.inference.attention import TILE
from vit_jax.inference.classify import load_examples


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def serve(run, host):
    trained = vit_jax.load(run)
    return demo.make_app(trained, host, demo.greet(trained, run)).test_client()


@pytest.fixture
def serve_page(tiny_run, monkeypatch):
    """Like `serve`, but without a classifier, so nothing is compiled."""
    monkeypatch.setattr(demo, "make_classify", lambda *_, **__: lambda images: None)
    return lambda host: serve(tiny_run, host)


@pytest.fixture(scope="module")
def client(tiny_run):
    return serve(tiny_run, "localhost")


def test_an_image_gets_classes_and_one_picture_per_head(client):
    answer = client.post("/classify", data=encoded(Image.new("RGB", (90, 60), (60, 200, 60))))
    assert answer.status_code == 200
    classes = answer.json["classes"]
    assert classes[0]["class"] == "green"
    assert sum(c["probability"] for c in classes) == pytest.approx(1, abs=1e-5)
    assert [len(heads) for heads in answer.json["heads"]] == [2, 2]
    for png in (answer.json["image"], answer.json["rollout"], answer.json["heads"][1][1]):
        head, _, data = png.partition(",")
        assert head == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (TILE, TILE)


def test_the_page_loads_nothing_from_elsewhere(client):
    page = client.get("/")
    assert page.status_code == 200 and f'data-max-bytes="{demo.MAX_BYTES}"' in page.text
    assert "http" not in page.text
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]


def test_the_page_greets_with_the_run_and_a_dozen_of_its_images(client, tiny_run):
    page = client.get("/").text
    accuracy = json.loads((tiny_run / "result.json").read_text())["test_accuracy"]
    assert "<h1>tiny</h1>" in page and "3 classes:\nblue, green, red." in page
    assert f"<b>{100 * accuracy:.2f}%</b>" in page
    found = re.findall(r'src="data:image/png;base64,(.+?)" alt="">(\w+)</button>', page)
    examples, _ = load_examples(vit_jax.load(tiny_run))
    for (png, name), row in zip(found, np.linspace(0, 29, 12).astype(int), strict=True):
        assert name == examples.class_names[examples.labels[row]]
        content = base64.b64decode(png)
        pixels = np.asarray(Image.open(io.BytesIO(content)))
        np.testing.assert_array_equal(pixels, examples.images[row])  # not resized or recompressed
        classes = client.post("/classify", data=content).json["classes"]
        assert classes[0]["class"] == name


def test_without_its_data_and_result_a_run_is_served_as_before(tiny_run, tmp_path, capsys):
    run = tmp_path / "<b>run"
    shutil.copytree(tiny_run, run)
    (run / "result.json").unlink()
    trained = vit_jax.load(run)
    trained.config.data.name = f"folder:{tmp_path / 'gone'}"
    client = demo.make_app(trained, "localhost", demo.greet(trained, run)).test_client()
    page = client.get("/").text
    assert "<h1>&lt;b&gt;run</h1>" in page and "test accuracy" not in page
    assert "data is not available here" in page and "<button" not in page
    assert "gone" in capsys.readouterr().err and "gone" not in page
    image = encoded(Image.new("RGB", (8, 8), (60, 200, 60)))
    assert client.post("/classify", data=image).json["classes"][0]["class"] == "green"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot read this file"),
        (b"not an image", "upload a complete JPEG, PNG, BMP, GIF, WebP, TIFF, or PPM image"),
        (encoded(Image.fromarray(np.zeros((64, 64, 3), np.uint8)))[:60], "upload a complete"),
        (encoded(Image.new("RGB", (8, 8)), "ICO"), "cannot read this file"),
    ],
)
def test_uploads_that_are_not_images_are_rejected(client, content, says):
    answer = client.post("/classify", data=content)
    assert answer.status_code == 400 and says in answer.json["error"]


def test_uploads_are_opened_only_as_the_seven_formats(client, monkeypatch):
    """Not even the header of another format, such as EPS, is parsed."""
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda f, **k: opened.append(k["formats"]) or real(f, **k))
    client.post("/classify", data=b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert opened and all(
        set(f) == {"JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM"} for f in opened
    )


def test_uploads_with_too_many_bytes_are_rejected(client):
    answer = client.post("/classify", data=b"x" * (demo.MAX_BYTES + 1))
    assert answer.status_code == 413 and "larger than 10 MB" in answer.json["error"]


@pytest.mark.parametrize("side", [10_001, 60_000])
def test_uploads_with_too_many_pixels_are_rejected_before_decoding(client, side):
    # A few bytes whose header declares too many pixels.
    content = bytearray(encoded(Image.new("1", (1, 1))))
    content[16:24] = side.to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    answer = client.post("/classify", data=bytes(content))
    assert answer.status_code == 400
    assert "at most 100 million pixels" in answer.json["error"]


def test_requests_from_other_sites_are_rejected(client):
    image = encoded(Image.new("RGB", (8, 8)))
    evil = client.post("/classify", data=image, headers={"Sec-Fetch-Site": "cross-site"})
    assert evil.status_code == 403
    # Another name that resolves to this address (DNS rebinding).
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400


@pytest.mark.parametrize(
    ("host", "url"),
    [("::1", "[::1]"), ("127.0.0.1", "127.0.0.1"), ("Box", "box")],
)
def test_the_demo_accepts_the_host_it_listens_on(serve_page, host, url):
    client = serve_page(host)
    assert demo.url_host(host) == url
    for name in (url, f"{url}:8000", "localhost:8000"):
        assert client.get("/", headers={"Host": name}).status_code == 200, name
    for name in ("evil.example", f"{url}.evil.example", "[::2]:8000", ""):
        assert client.get("/", headers={"Host": name}).status_code == 400, name


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_listening_on_all_addresses_accepts_any_host(serve_page, host):
    client = serve_page(host)
    assert client.get("/", headers={"Host": "box.example"}).status_code == 200
