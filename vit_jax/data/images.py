"""Decoding of image files and TFDS records to uint8 pixels, and the center crop."""

import io

import numpy as np

from vit_jax.data.source import PREPARE_AGAIN, guarded, one_line
from vit_jax.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
MAX_PIXELS = 100_000_000  # per image: a few kilobytes can decode to more than fits in memory
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
# Modes of at most 8 bits per sample. Samples of 16 or 32 bits would be clipped; LAB and HSV have no
# conversion to RGB here.
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")


def read_image(file, where=None) -> np.ndarray:
    """Decodes an image file to uint8[H, W, 3], RGB, rotated by its EXIF orientation.

    Gray, palette, CMYK, and bilevel images are converted. An alpha channel is dropped. A file with
    several frames yields the first.

    Args:
      file: a path or an open binary file.
      where: the name of `file` in errors.

    Raises:
      UserError: the file is corrupted, its format is not one of JPEG, PNG, BMP, GIF, WebP, TIFF,
        and PPM, its samples have more than 8 bits, or it has more than MAX_PIXELS pixels.
    """
    from PIL import ImageOps

    try:
        with _open_image(file) as image:
            if image.mode not in _MODES:
                raise ValueError(f"mode {image.mode}, not 8 bits per sample")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:  # Pillow raises many types, including SyntaxError
        raise UserError(
            f"{where or file} is not a usable image ({one_line(error)}): fix or remove it, or"
            " train with --config.data.on_bad_image=skip to skip such images"
        ) from error


def decode_image(encoded: bytes, channels: int, where: str) -> np.ndarray:
    """Decodes a TFDS image to uint8[H, W, channels] as TFDS does, ignoring the EXIF orientation.

    Raises UserError, naming `where`, for bytes that are not an image of at most MAX_PIXELS pixels.
    """
    import cv2

    guarded(where, _open_image, io.BytesIO(encoded))  # OpenCV's own limit is fixed at its import
    flags = {1: cv2.IMREAD_GRAYSCALE, 3: cv2.IMREAD_COLOR}
    flag = flags[channels] | cv2.IMREAD_IGNORE_ORIENTATION if channels in flags else -1
    image = guarded(where, cv2.imdecode, np.frombuffer(encoded, np.uint8), flag)
    if image is None:
        raise UserError(f"{where} does not contain a decodable image: {PREPARE_AGAIN}")
    if image.ndim == 2:
        return image[..., None]
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB if image.shape[2] == 3 else cv2.COLOR_BGRA2RGBA)


def _open_image(file):
    """Opens a Pillow image, of which only the header is read. Raises for more than MAX_PIXELS."""
    from PIL import Image, UnidentifiedImageError

    try:
        # Restrict the formats: Pillow would start Ghostscript for an EPS named .png.
        image = Image.open(file, formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(f"not a file of {', '.join(_FORMATS)}") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise ValueError(f"{width}x{height} pixels, more than {MAX_PIXELS:,}")
    return image


def center_crop_resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Crops the largest central part of the target's aspect ratio and resizes it.

    uint8[H, W, C] -> uint8[height, width, C]. An image that already has this shape is unchanged.
    """
    import cv2

    H, W, channels = image.shape
    # For a square target, exactly the shorter side.
    rows, columns = min(H, max(1, W * height // width)), min(W, max(1, H * width // height))
    top, left = (H - rows) // 2, (W - columns) // 2
    image = image[top : top + rows, left : left + columns]
    if (rows, columns) == (height, width):
        return image
    method = cv2.INTER_AREA if height < rows else cv2.INTER_CUBIC
    return cv2.resize(image, (width, height), interpolation=method).reshape(height, width, channels)
