"""Decoding of image files and TFDS records to uint8 pixels, and the center crop."""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vit_jax.data.source import user_errors

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
MAX_PIXELS = 100_000_000  # per image: a few kilobytes can decode to more than fits in memory
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
# Samples of more than 8 bits would be clipped; LAB and HSV have no conversion to RGB here.
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")


def read_image(file, where=None) -> np.ndarray:
    """Decodes an image file to uint8[H, W, 3], RGB, rotated by its EXIF orientation.

    `file` is a path or an open binary file, and `where` its name in errors. Alpha is dropped. The
    first of several frames is used. Raises UserError for a file that is corrupted or of another
    format, or has more than 8 bits per sample or MAX_PIXELS pixels.
    """
    problem = f"{where or file} is not a usable image"
    with user_errors(problem, "fix or remove it"), _open_image(file) as image:
        if image.mode not in _MODES:
            raise ValueError(f"mode {image.mode} is not supported")
        if image.format in ("PNG", "TIFF") and any(";16" in str(tile[3]) for tile in image.tile):
            raise ValueError("16 bits per sample are not supported")  # Pillow would drop 8 of them
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def decode_image(encoded: bytes, channels: int, where: str) -> np.ndarray:
    """Decodes a TFDS image to uint8[H, W, channels] as TFDS does, ignoring the EXIF orientation.

    Raises UserError, naming `where`, for other bytes or more than MAX_PIXELS pixels.
    """
    import cv2

    flags = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR
    flags |= cv2.IMREAD_IGNORE_ORIENTATION
    with user_errors(f"{where} cannot be read"):
        _open_image(io.BytesIO(encoded))  # OpenCV's own limit is fixed at its import
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
        if image is None:
            raise ValueError("not a decodable image")
    return image[..., None] if channels == 1 else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _open_image(file):
    """Opens an image, reading only its header. Raises for more than MAX_PIXELS."""
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
    rows, columns = min(H, max(1, W * height // width)), min(W, max(1, H * width // height))
    top, left = (H - rows) // 2, (W - columns) // 2
    image = image[top : top + rows, left : left + columns]
    if (rows, columns) == (height, width):
        return image
    method = cv2.INTER_AREA if height < rows else cv2.INTER_CUBIC
    return cv2.resize(image, (width, height), interpolation=method).reshape(height, width, channels)
