"""Read ShapeNetSem's screenshots, the pictures that SNARE shows."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from jaxsys.core.errors import UserError
from jaxsys.ground.snare import VIEWS


def screenshots(
    folder: str | os.PathLike[str], object_id: str, views: Sequence[int] = VIEWS
) -> list[UInt8[np.ndarray, "Y X 3"]]:
    """Read an object's screenshots ``FOLDER/<id>/<id>-<view>.png`` in RGB, on white.

    Args:
        folder: what ShapeNetSem's ``models-screenshots.zip`` unpacks to.
        object_id: the object.
        views: which; a view whose file is missing is left out.

    Returns:
        One image per view that is there, in the order of `views`; sizes may differ.

    Raises:
        UserError: if none of the views is there, an id that is no plain name, or a file that is no
            image.

    >>> import tempfile
    >>> from PIL import Image
    >>> folder = Path(tempfile.mkdtemp()); (folder / "a").mkdir()
    >>> Image.new("RGBA", (2, 1)).save(folder / "a" / "a-6.png")
    >>> screenshots(folder, "a")[0].tolist()
    [[[255, 255, 255], [255, 255, 255]]]
    """
    from PIL import Image

    if Path(object_id).name != object_id or object_id in ("", ".", ".."):
        raise UserError(f"object id {object_id!r} is no plain name; expected one; mend the row")
    files = [Path(folder) / object_id / f"{object_id}-{view}.png" for view in views]
    images = []
    for file in filter(Path.is_file, files):
        try:
            with Image.open(file) as opened:
                image = opened.convert("RGBA")
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(
                f"{file} cannot be read as an image ({error}); expected a PNG; unpack it again"
            ) from error
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        images.append(np.asarray(Image.alpha_composite(white, image).convert("RGB")))
    if not images:
        raise UserError(
            f"{Path(folder) / object_id} has zero of the views {tuple(views)}; expected at least "
            f"one file like {object_id}-{next(iter(views), 6)}.png; name the folder of screenshots"
        )
    return images
