"""Prepare a folder for the reference game: objects drawn once, and what encoders make of them.

    OUT/catalogue.jsonl           objects with their creators and licences
    OUT/views/<key>.png           V views side by side
    OUT/features_<encoder>/<key>.npz   features [V, D], activations where asked for
    OUT/texts/<encoder>-<digest>.npz   vectors of a game's texts
    OUT/refused.jsonl             models that could not be read, and why
    OUT/prepared.json             settings, versions, counts, a digest of the catalogue

Every object has its own files, each written whole or not at all, so a run that was killed goes on
with what is missing.

Axes: ``N`` objects, ``V`` views, ``Y`` and ``X`` pixels, ``D`` width of a feature.
"""

import hashlib
import io
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

import jaxsys
from jaxsys.core.errors import UserError
from jaxsys.core.report import atomic_write, to_json, write_jsonl
from jaxsys.ground.catalogue import Catalogue, Object, read_catalogue, write_catalogue
from jaxsys.ground.features import ImageEncoder, encoder_slug, text_vectors
from jaxsys.ground.game import Prepared, TextVectors
from jaxsys.ground.mesh import read_mesh
from jaxsys.ground.render import RenderConfig, render
from jaxsys.ground.sh3f import DROPPED, Model, Neighbours, open_libraries, read_member

Progress = Callable[[int, int], Any]
_MOST_VIEWS_BYTES = 1 << 28


@dataclass(frozen=True)
class PrepareConfig:
    """Say what is drawn and how.

    Attributes:
        render: the views.
        dropped: categories that are left out.
        most: of the objects of each library the first so many; None takes all.

    Raises:
        UserError: for fewer than one object.

    >>> PrepareConfig().render.views
    8
    """

    render: RenderConfig = field(default_factory=RenderConfig)
    dropped: tuple[str, ...] = DROPPED
    most: int | None = None

    def __post_init__(self) -> None:
        if self.most is not None and self.most < 1:
            raise UserError(f"most is {self.most}; expected at least 1 object a library; raise it")


class Refused(NamedTuple):
    """Name a model that was left out.

    Attributes:
        key: of the object.
        library: where it is from.
        why: in words.

    >>> Refused("k", "l", "the model has no faces").why
    'the model has no faces'
    """

    key: str
    library: str
    why: str


class Done(NamedTuple):
    """Hold what `prepare_views` did.

    Attributes:
        catalogue: the objects that were drawn.
        refused: those that could not be.
        drawn: how many were drawn now; the others were there.

    >>> Done(Catalogue(()), (), 0).drawn
    0
    """

    catalogue: Catalogue
    refused: tuple[Refused, ...]
    drawn: int


def prepare_views(
    libraries: Sequence[str | Path],
    out: str | Path,
    config: PrepareConfig | None = None,
    *,
    progress: Progress | None = None,
) -> Done:
    """Draw every object of some furniture libraries, leaving out those that are there already.

    Models that cannot be read are left out, listed in ``refused.jsonl`` and counted.

    Args:
        libraries: see `jaxsys.ground.sh3f.open_libraries`.
        out: the folder; it may hold part of the work already.
        config: what and how; None is the default.
        progress: called with how many objects are done, and of how many.

    Raises:
        UserError: for libraries that cannot be read, a folder that was prepared with other
            settings, or libraries without a single usable model.

    >>> prepare_views([], "nowhere")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: no furniture library is given; ...
    """
    config, out = config or PrepareConfig(), Path(out)
    opened = open_libraries(libraries)
    _check_settings(out, config)
    listed: list[tuple[Any, Model]] = []
    refused: list[Refused] = []
    for library in opened:
        kept = [m for m in library.models if m.thing.category not in config.dropped]
        listed += [(library.archive, model) for model in kept[: config.most]]
        refused += [Refused(key, library.name, why) for key, why in library.unusable]
    drawn, objects = 0, []
    for i, (archive, model) in enumerate(listed):
        thing, file = model.thing, out / "views" / f"{model.thing.key}.png"
        try:
            if not file.is_file():
                mesh = read_mesh(read_member(archive, model.path), Neighbours(archive, model.path))
                views = render(mesh, config.render, size_cm=thing.size_cm, rotation=model.rotation)
                atomic_write(file, _png(views))
                drawn += 1
            objects.append(thing)
        except ValueError as error:
            if "jaxsys[ground]" in str(error):  # nothing can be read without the extra
                raise
            refused.append(Refused(thing.key, thing.library, str(error).split(";")[0]))
        if progress is not None:
            progress(i + 1, len(listed))
    write_jsonl(out / "refused.jsonl", (one._asdict() for one in refused))
    if not objects:
        raise UserError(
            f"none of {len(listed)} models could be drawn ("
            f"{refused[0].why if refused else 'all categories are dropped'}); expected at least "
            "one; fetch the libraries again"
        )
    write_catalogue(out / "catalogue.jsonl", Catalogue(tuple(objects)))
    _describe(out, config, [library.name for library in opened], len(objects), len(refused))
    return Done(Catalogue(tuple(objects)), tuple(refused), drawn)


def _settings(config: PrepareConfig) -> dict[str, Any]:
    return json.loads(to_json(asdict(config)))


def _check_settings(out: Path, config: PrepareConfig) -> None:
    """Note the settings first, so that a run with others does not mix its pictures in."""
    file = out / "prepared.json"
    if not file.is_file():
        atomic_write(file, to_json({"settings": _settings(config)}) + "\n")
        return
    found = _read_description(file).get("settings")
    if found != _settings(config):
        other = [k for k, v in _settings(config).items() if (found or {}).get(k) != v]
        raise UserError(
            f"{out} was prepared with another setting of {', '.join(other) or 'something'}; "
            "expected the same; use another folder, or the settings in its prepared.json"
        )


def _read_description(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{file} cannot be read ({error}); expected what `jaxsys ground prepare` wrote; run it "
            "into this folder"
        ) from None
    return found


def _describe(out: Path, config: PrepareConfig, names: list[str], n: int, refused: int) -> None:
    digest = hashlib.sha256((out / "catalogue.jsonl").read_bytes())
    for line in sorted((out / "views").glob("*.png")):
        digest.update(hashlib.sha256(line.read_bytes()).digest())
    versions = {name: metadata.version(name) for name in ("numpy", "pillow", "trimesh", "embreex")}
    described = {
        "settings": _settings(config),
        "libraries": names,
        "objects": n,
        "refused": refused,
        "sha256": digest.hexdigest(),
        "versions": {"jaxsys": jaxsys.__version__, "python": platform.python_version()} | versions,
    }
    atomic_write(out / "prepared.json", to_json(described) + "\n")


def _png(views: UInt8[np.ndarray, "V Y X 3"]) -> bytes:
    from PIL import Image

    packed = io.BytesIO()
    Image.fromarray(np.concatenate(list(views), 1)).save(packed, "PNG", compress_level=6)
    return packed.getvalue()


def read_views(folder: str | Path, key: str) -> UInt8[np.ndarray, "V Y X 3"]:
    """Read an object's views from a prepared folder.

    Args:
        folder: that `prepare_views` wrote.
        key: of the object.

    Raises:
        UserError: if they are not there or are no row of squares.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> atomic_write(folder / "views" / "k.png", _png(np.zeros((3, 8, 8, 3), np.uint8)))
    >>> read_views(folder, "k").shape
    (3, 8, 8, 3)
    """
    from PIL import Image

    file = Path(folder) / "views" / f"{key}.png"
    try:
        with Image.open(file) as image:
            if image.width * image.height * 3 > _MOST_VIEWS_BYTES or image.width % image.height:
                raise ValueError(f"{image.width} x {image.height} pixels")
            row = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{file} cannot be read ({error}); expected square views side by side; remove it and "
            "run `jaxsys ground prepare` again"
        ) from None
    return np.stack(np.split(row, row.shape[1] // row.shape[0], 1))


def prepare_features(
    folder: str | Path,
    encoder: ImageEncoder,
    *,
    activations: bool = False,
    progress: Progress | None = None,
) -> int:
    """Encode the views of every object, leaving out those that are there already.

    Args:
        folder: that `prepare_views` wrote.
        encoder: see `jaxsys.ground.features`.
        activations: also keep what its adaptable part reads, in half precision.
        progress: called with how many objects are done, and of how many.

    Returns:
        How many objects were encoded now.

    Raises:
        UserError: for a folder that is not prepared.

    >>> from jaxsys.ground.features import mean_colour
    >>> prepare_features("nowhere", mean_colour())
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: nowhere/catalogue.jsonl cannot be read ...
    """
    folder = Path(folder)
    objects = read_catalogue(folder / "catalogue.jsonl").objects
    place = folder / f"features_{encoder_slug(encoder.name)}"
    done = 0
    for i, thing in enumerate(objects):
        file = place / f"{thing.key}.npz"
        if not _has(file, activations):
            kept = encoder.keep(read_views(folder, thing.key))
            parts: dict[str, Any] = {
                "features": np.asarray(encoder.encode(encoder.params, kept), np.float32)
            }
            if activations:
                parts["activations"] = np.asarray(kept, np.float16)
            packed = io.BytesIO()
            np.savez(packed, **parts)
            atomic_write(file, packed.getvalue())
            done += 1
        if progress is not None:
            progress(i + 1, len(objects))
    return done


def cached_text_vectors(
    folder: str | Path, texts: Sequence[str], encoder: str = "minilm"
) -> TextVectors:
    """Encode texts, or read their vectors where this folder has them.

    Args:
        folder: such as a prepared one.
        texts: S of them.
        encoder: see `jaxsys.ground.features.text_vectors`.

    Raises:
        UserError: as `text_vectors` does.

    >>> cached_text_vectors(".", [])
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: there are zero texts ...
    """
    named = hashlib.sha256(to_json([encoder, *texts]).encode()).hexdigest()[:16]
    file = Path(folder) / "texts" / f"{encoder_slug(encoder)}-{named}.npz"
    if file.is_file():
        try:
            with np.load(file, allow_pickle=False) as found:
                return TextVectors(**{name: found[name] for name in found.files})
        except (OSError, ValueError, TypeError, EOFError):
            pass  # damaged, so it is made again
    made = text_vectors(texts, encoder)
    packed = io.BytesIO()
    np.savez(packed, **{name: x for name, x in made._asdict().items() if x is not None})
    atomic_write(file, packed.getvalue())
    return made


def _has(file: Path, activations: bool) -> bool:
    if not file.is_file():
        return False
    with np.load(file) as found:
        return not activations or "activations" in found.files


def read_prepared(
    folder: str | Path,
    encoder: str = "efficientnet-lite0",
    *,
    activations: bool = False,
    views: Sequence[int] | None = None,
) -> Prepared:
    """Read the catalogue and the features of a prepared folder.

    Args:
        folder: that `prepare_views` and `prepare_features` wrote.
        encoder: whose features.
        activations: also read what its adaptable part reads, as `Prepared.pixels` (float16).
        views: places of the views that are kept; None keeps all.

    Raises:
        UserError: for features that are absent, or differ in shape or number from each other.

    >>> read_prepared("nowhere")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: nowhere/catalogue.jsonl cannot be read ...
    """
    folder = Path(folder)
    catalogue = read_catalogue(folder / "catalogue.jsonl")
    place = folder / f"features_{encoder_slug(encoder)}"
    features, pixels = [], []
    for thing in catalogue.objects:
        found = _read_features(place / f"{thing.key}.npz", thing, activations)
        features.append(found["features"])
        if activations:
            pixels.append(found["activations"])
    shapes = sorted({one.shape for one in features})
    if len(shapes) != 1 or len({one.shape for one in pixels}) > 1:
        raise UserError(
            f"the features in {place} have the shapes {shapes[:3]}; expected one; remove the "
            "folder and run `jaxsys ground prepare` again"
        )
    chosen = slice(None) if views is None else np.asarray(views, int)
    stacked = np.stack(features)[:, chosen]
    if not stacked.shape[1]:
        raise UserError(f"zero views are chosen of {folder}; expected at least one; name some")
    mask = np.ones(stacked.shape[:2], bool)
    return Prepared(
        catalogue, folder, stacked, mask, np.stack(pixels)[:, chosen] if pixels else None
    )


def _read_features(file: Path, thing: Object, activations: bool) -> dict[str, np.ndarray]:
    names = ("features", "activations") if activations else ("features",)
    try:
        with np.load(file, allow_pickle=False) as found:
            parts = {name: found[name] for name in names}
        if parts["features"].ndim != 2 or not np.isfinite(parts["features"]).all():
            raise ValueError(f"features of shape {parts['features'].shape}, or not finite")
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(
            f"{file} lacks the {' and '.join(names)} of {thing.key} ({error}); expected what "
            "`jaxsys ground prepare` wrote; run it again with the same folder"
            + (" and --activations" if activations else "")
        ) from None
    return parts
