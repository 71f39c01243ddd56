"""Pictures made ready for an encoder: short side resized, centre cut out, channels normalised."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxsys.core.errors import UserError

_MOST_SIDE = 1 << 14


def prepare(
    images: Sequence[Any],
    size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Float[np.ndarray, "B {size} {size} 3"]:
    """Resize, cut and normalise pictures: (x / 255 - mean) / std of the middle square.

    The short side becomes `size` by Pillow's bicubic filter, the long side in proportion (rounded
    down), and the middle is cut out (rounded towards the upper left), as transformers does it.

    Args:
        images: files, Pillow images, or uint8 arrays [rows, columns] or [rows, columns, 3].
        size: of the square, in pixels.
        mean: of each channel, on the scale of 0 to 1.
        std: of each channel, on the same scale.

    Returns:
        float32, channels last; [0, size, size, 3] for no pictures.

    Raises:
        UserError: for a file that is no picture, an array of other shape or type, or a size or
            picture beyond reason.

    >>> grey = np.full((6, 4), 255, np.uint8)
    >>> prepare([grey], 2, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))[0, 0, 0].tolist()
    [1.0, 1.0, 1.0]
    """
    if not 1 <= size <= _MOST_SIDE:
        raise UserError(f"size is {size}; expected 1 to {_MOST_SIDE} pixels; change it")
    if isinstance(images, str | Path):
        raise UserError(f"images is {str(images)!r}; expected a list of pictures; give [picture]")
    squares = [_square(_open(image), size) for image in images]
    if not squares:
        return np.zeros((0, size, size, 3), np.float32)
    scaled = np.stack(squares).astype(np.float32) / np.float32(255)
    return (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def _open(image: Any) -> Any:
    from PIL import Image

    if isinstance(image, str | Path):
        try:
            with Image.open(image) as file:
                return file.convert("RGB")
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(
                f"{image} is no readable picture ({reason}); expected a PNG, JPEG or the like; "
                "correct the path"
            ) from None
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    array = np.asarray(image)
    grey = array.ndim == 2
    if array.dtype != np.uint8 or not (grey or (array.ndim == 3 and array.shape[2] == 3)):
        raise UserError(
            f"a picture is an array {array.dtype}{list(array.shape)}; expected uint8 of "
            "[rows, columns] or [rows, columns, 3]; convert it"
        )
    return Image.fromarray(array).convert("RGB")


def _square(image: Any, size: int) -> np.ndarray:
    from PIL import Image

    width, height = image.size
    short, long = min(width, height), max(width, height)
    if short == 0:
        raise UserError(f"a picture has {width} x {height} pixels; expected some; leave it out")
    longer = size * long // short
    if longer > _MOST_SIDE:
        raise UserError(
            f"a picture of {width} x {height} pixels would become {longer} long with a short side "
            f"of {size}, over {_MOST_SIDE}; cut it before"
        )
    shape = (size, longer) if width <= height else (longer, size)
    resized = np.asarray(image.resize(shape, Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return resized[top : top + size, left : left + size]
