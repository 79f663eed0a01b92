"""The demo's server: what it answers, what it refuses, and whom."""

import base64
import io
import zlib

import numpy as np
import pytest
from PIL import Image

import vit_jax
from vit_jax import demo
from vit_jax.attention import TILE


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def client(tiny_run):
    return demo.make_app(vit_jax.load(tiny_run), ["localhost"]).test_client()


def test_an_image_gets_classes_and_a_picture_a_head(client):
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


def test_the_page_may_load_nothing_from_elsewhere(client):
    page = client.get("/")
    assert page.status_code == 200 and f'data-max-bytes="{demo.MAX_BYTES}"' in page.text
    assert "http" not in page.text
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no image file"),
        (b"not an image", "no image file"),
        (encoded(Image.fromarray(np.zeros((64, 64, 3), np.uint8)))[:60], "damaged"),
    ],
)
def test_what_is_no_image_is_refused(client, content, says):
    answer = client.post("/classify", data=content)
    assert answer.status_code == 400 and says in answer.json["error"]


def test_too_many_bytes_are_refused(client):
    answer = client.post("/classify", data=b"x" * (demo.MAX_BYTES + 1))
    assert answer.status_code == 413 and "larger than 10 MB" in answer.json["error"]


@pytest.mark.parametrize("side", [7_000, 60_000])
def test_too_many_pixels_are_refused_before_they_are_decoded(client, side):
    # A few bytes that say so many pixels.
    content = bytearray(encoded(Image.new("1", (1, 1))))
    content[16:24] = side.to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    answer = client.post("/classify", data=bytes(content))
    assert answer.status_code == 400
    assert "more than 40,000,000 pixels" in answer.json["error"]


def test_other_sites_are_refused(client):
    image = encoded(Image.new("RGB", (8, 8)))
    evil = client.post("/classify", data=image, headers={"Sec-Fetch-Site": "cross-site"})
    assert evil.status_code == 403
    # Another name for this address: DNS rebinding.
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400
