"""From the bytes of one image to the pixels that a network sees: decoded to RGB, cropped and scaled by Pillow.

Training takes a random part of the image (the augmentation of C. Szegedy et al., *Going Deeper with Convolutions*, 2015,
arXiv:1409.4842, §6), evaluation its centre. Scaling is bilinear with antialiasing: Pillow widens the filter by the factor that
it shrinks an image by.
"""

import io
import math
import random
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

AREA = (0.08, 1.0)
"""Share of the image's area that a random part has."""
RATIO = (3 / 4, 4 / 3)
"""Width by height of a random part."""
ATTEMPTS = 10
REDUCING_GAP = 3.0
"""A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size if the part is still this many times as large as the result."""


def random_part(data: bytes, size: int, flip: bool, rng: random.Random) -> NDArray[np.uint8]:
    """Return a random part of an image, scaled to a square: RGB, uint8, ``(size, size, 3)``.

    Args:
        data: the encoded image.
        size: pixels.
        flip: mirror it left to right, half of the time.
        rng: of the part and the mirroring.

    Raises:
        Exception: whatever Pillow raises if it cannot read the image.
    """
    from PIL.Image import Resampling, Transpose, open

    image: Image = open(io.BytesIO(data))
    mirrored = rng.random() < 0.5 and flip
    left, top, width, height = random_box(*image.size, rng)
    full_width, full_height = image.size
    gap = REDUCING_GAP * size
    if min(width, height) >= 2 * gap:
        image.draft(None, (math.ceil(full_width * gap / width), math.ceil(full_height * gap / height)))
    if image.size == (full_width, full_height):
        part = rgb(image).crop((left, top, left + width, top + height)).resize((size, size), Resampling.BILINEAR)
    else:  # decoded smaller, where the part begins and ends between pixels
        across, down = image.width / full_width, image.height / full_height
        box = (left * across, top * down, (left + width) * across, (top + height) * down)
        part = rgb(image).resize((size, size), Resampling.BILINEAR, box)
    return np.asarray(part.transpose(Transpose.FLIP_LEFT_RIGHT) if mirrored else part)


def random_box(width: int, height: int, rng: random.Random) -> tuple[int, int, int, int]:
    """Return left, top, width and height of a random part of an image of ``width`` by ``height`` pixels.

    Area uniform in :data:`AREA`, the logarithm of the ratio uniform in :data:`RATIO`, both drawn again until the part fits; after
    :data:`ATTEMPTS` the largest central part with a ratio within the limits.
    """
    for _ in range(ATTEMPTS):
        area = width * height * (AREA[0] + (AREA[1] - AREA[0]) * rng.random())
        low, high = math.log(RATIO[0]), math.log(RATIO[1])
        ratio = math.exp(low + (high - low) * rng.random())
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            return int(rng.random() * (width - across + 1)), int(rng.random() * (height - down + 1)), across, down
    across, down = min(width, max(1, round(height * RATIO[1]))), min(height, max(1, round(width / RATIO[0])))
    return (width - across) // 2, (height - down) // 2, across, down


def centre(data: bytes, size: int, resize: int) -> NDArray[np.uint8]:
    """Return the centre of an image whose shorter side is scaled to ``resize``: RGB, uint8, ``(size, size, 3)``.

    Args:
        data: the encoded image.
        size: pixels, at most ``resize``.
        resize: pixels.

    Raises:
        Exception: whatever Pillow raises if it cannot read the image.
    """
    from PIL.Image import Resampling, open

    image = rgb(open(io.BytesIO(data)))
    shorter = min(image.size)
    width, height = (int(resize * side / shorter) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.resize((width, height), Resampling.BILINEAR).crop((left, top, left + size, top + size)))


def rgb(image: "Image") -> "Image":
    """Return an image of any mode as RGB; what is transparent keeps its colour."""
    image = eight_bit(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def eight_bit(image: "Image") -> "Image":
    """Return an image of 16 bits a pixel as one of 8, the upper half of each: Pillow's own conversion clips at 255."""
    from PIL.Image import fromarray

    if not image.mode.startswith("I"):
        return image
    pixels: NDArray[Any] = np.asarray(image)
    if image.mode == "I" and pixels.max(initial=0) <= 255:
        return image
    return fromarray((pixels.astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
