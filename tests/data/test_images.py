"""Decoding: which image files are accepted, and the size limit."""

import contextlib
import struct
import zlib

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from data_helpers import picture, user_error
from PIL import Image

from vit_jax.data import images, open_split
from vit_jax.errors import UserError


def test_folder_image_kinds(tmp_path):
    (tmp_path / "kinds" / "one").mkdir(parents=True)
    flat = np.full((8, 8, 3), (200, 40, 90), np.uint8)
    image = Image.fromarray(flat)
    image.convert("RGBA").save(tmp_path / "kinds" / "one" / "alpha.png")
    image.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "kinds" / "one" / "p.gif")
    image.convert("CMYK").save(tmp_path / "kinds" / "one" / "cmyk.JPG", quality=100)
    pixels = open_split(f"folder:{tmp_path / 'kinds'}", "train").images
    assert pixels.shape == (3, 8, 8, 3) and np.abs(pixels.astype(int) - flat).max() < 6
    Image.fromarray(picture(0)[..., 0]).save(tmp_path / "kinds" / "one" / "gray.png")
    pixels = open_split(f"folder:{tmp_path / 'kinds'}", "train").images
    gray = np.repeat(picture(0)[..., :1], 3, -1)
    assert any((image == gray).all() for image in pixels)


def test_folder_images_are_rotated_by_exif_and_resized(tmp_path):
    (tmp_path / "turned" / "one").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees clockwise
    Image.fromarray(picture(0, 8, 12)).save(tmp_path / "turned" / "one" / "a.png", exif=exif)
    name = f"folder:{tmp_path / 'turned'}"
    np.testing.assert_array_equal(
        open_split(name, "train").images[0], np.rot90(picture(0, 8, 12), -1)
    )
    square = np.rot90(picture(0, 8, 12), -1)[2:10]
    np.testing.assert_array_equal(open_split(name, "train", image_size=8).images[0], square)


def test_other_formats_and_more_than_8_bits_are_rejected(tmp_path):
    wide = tmp_path / "wide.png"
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(wide)
    color = tmp_path / "color.png"  # Pillow opens it with 8 bits
    cv2.imwrite(str(color), np.full((8, 8, 3), 300, np.uint16))
    floats = tmp_path / "floats.tiff"
    Image.fromarray(np.ones((8, 8), np.float32)).save(floats)
    script = tmp_path / "script.png"  # Pillow would pass it to Ghostscript
    script.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    for path, says in (
        (wide, "mode I;16"),
        (color, "16 bits"),
        (floats, "mode F"),
        (script, "not a file of"),
    ):
        with pytest.raises(UserError, match=f"{path} is not a usable image .*{says}"):
            images.read_image(path)


def bomb(side):
    """A PNG of a few kilobytes whose header declares side x side pixels."""
    chunk = lambda kind, of: (  # noqa: E731
        struct.pack(">I", len(of)) + kind + of + struct.pack(">I", zlib.crc32(kind + of))
    )
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return png + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "side", [10_001, 20_000]
)  # Pillow warns about the first and rejects the second
def test_size_limit_is_checked_in_the_header_before_decoding(side, tmp_path, monkeypatch):
    def decode(*args):
        raise AssertionError("decoded")

    (tmp_path / "bomb.png").write_bytes(bomb(side))
    monkeypatch.setattr(Image.Image, "load", decode)
    monkeypatch.setattr(cv2, "imdecode", decode)
    with pytest.warns() if side == 10_001 else contextlib.nullcontext():
        with pytest.raises(UserError, match=r"bomb.png is not a usable image .*pixels"):
            images.read_image(tmp_path / "bomb.png")
        with pytest.raises(UserError, match=r"a record .*pixels"):
            images.decode_image(bomb(side), 3, "a record")


def test_stored_image_size_is_a_no_op(tiny):
    plain, sized = (open_split("tiny", "test", data_dir=tiny, image_size=s) for s in (None, 8))
    np.testing.assert_array_equal(plain.images, sized.images)


def test_images_of_varying_sizes(tmp_path):
    user_error("mixed", "test", data_dir=tmp_path, says=["differ", "config.data.image_size"])
    down = open_split("mixed", "test", data_dir=tmp_path, image_size=2)
    up = open_split("mixed", "test", data_dir=tmp_path, image_size=20)
    assert down.images.shape == (8, 2, 2, 3) and up.images.shape == (8, 20, 20, 3)
    originals = list(tfds.builder("mixed", data_dir=tmp_path).as_data_source("test"))
    (i,) = (i for i, example in enumerate(originals) if example["number"] == 3)
    square = originals[i]["image"][:, 2:10]  # 8 x 13 pixels: the central 8 of its columns
    expected = square.reshape(2, 4, 2, 4, 3).mean((1, 3))
    assert np.abs(down.images[i] - expected).max() <= 0.5
    assert np.abs(up.images[i] - cv2.resize(square, (20, 20), interpolation=2)).max() == 0
