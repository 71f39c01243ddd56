"""SNARE as a task, from where a user has its files.

Annotations: ``train.json``, ``val.json`` and ``test.json`` in ``amt/folds_adversarial`` of the
public repository snaredataset/snare. Features: ``shapenet-clipViT32-frames.json.gz`` and
``langfeat-512-clipViT32.json.gz``, linked from that repository's README. Pictures:
``models-screenshots.zip`` of ShapeNetSem, after accepting ShapeNet's terms. CLIP: any checkpoint
that `jaxsys.models.clip.load` reads, such as ViT-B/32 in transformers' or OpenAI's form. None of
them comes with jaxsys.

Axes: ``N`` objects, ``M`` texts, ``V`` views, ``D`` width, ``T`` words.

Reference: arXiv 2107.12514.
"""

import io
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.core.report import atomic_write
from jaxsys.ground.contract import text_ids
from jaxsys.ground.features import caption_tokens, vocabulary_of
from jaxsys.ground.pictures import screenshots
from jaxsys.ground.questions import Questions
from jaxsys.ground.snare import (
    VIEWS,
    Fold,
    TextFeatures,
    ViewFeatures,
    index_rows,
    load_rows,
    read_text_features,
    read_view_features,
)
from jaxsys.ground.tables import from_snare, snare_rows
from jaxsys.models import clip
from jaxsys.models.clip.towers import MEAN, STD
from jaxsys.models.pixels import prepare

_FOLDS = {"train": "train.json", "valid": "val.json", "test": "test.json"}
_BLOCK = 64  # pictures or texts encoded at a time
_RESIDENT_BYTES = 1 << 31  # pictures above this stay on the host


@dataclass(frozen=True, kw_only=True)
class SnareFiles:
    """Say where SNARE's files are.

    Attributes:
      folder: Holds train.json, val.json and, if it is there, test.json, itself or in
        amt/folds_adversarial, as the repository has them.
      images: shapenet-clipViT32-frames.json.gz; looked for in the folder by default.
      texts: langfeat-512-clipViT32.json.gz; looked for in the folder by default.
      width: Of the features in these two files.
      clip: CLIP checkpoint, instead of the two files; needs screenshots.
      screenshots: What ShapeNetSem's models-screenshots.zip unpacks to.
      lone: Rows that name one object: drop them, or seed a distractor.
      seed: Of these distractors.

    >>> SnareFiles(folder=Path("snare")).lone
    'drop'
    """

    folder: Path
    images: Path | None = None
    texts: Path | None = None
    width: int = 512
    clip: Path | None = None
    screenshots: Path | None = None
    lone: Literal["drop", "seed"] = "drop"
    seed: int = 0


def open_snare(
    files: SnareFiles,
    *,
    cache: Path | None = None,
    pixels: bool = False,
    words: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Questions:
    """Read SNARE, from its two feature files or from pictures and CLIP.

    Args:
        files: where they are.
        cache: folder in which what CLIP computes is kept; None computes it anew.
        pixels: keep the pictures, for an encoder that is adapted.
        words: make features of single words, for MAGiC.
        progress: called with objects encoded and their number.

    Returns:
        Folds ``train``, ``valid`` and, if its file is there, ``test``; groups visual and blind.

    Raises:
        UserError: for files that are missing, saying which and where they are had from; a row that
            names an unknown object or one object twice; features of another width.

    Reference: arXiv 2107.12514.

    >>> open_snare(SnareFiles(folder=Path("nowhere")))
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: nowhere has no train.json; ...
    """
    if (files.clip is None) != (files.screenshots is None):
        lacking = "screenshots" if files.clip else "clip"
        raise UserError(
            f"{lacking} is missing: CLIP's weights and the screenshots go together; expected both, "
            "or neither where the two feature files are read; name it"
        )
    if files.clip is None and (pixels or words):
        raise UserError(
            f"{'an adapted encoder reads pictures' if pixels else 'magic reads words'}, and the "
            "two feature files hold neither; expected CLIP's weights and the screenshots; give "
            "--clip and --screenshots, or choose another grounder (or --domain residual)"
        )
    folds = {
        name: load_rows(path, lone=files.lone, seed=files.seed)
        for name, path in _fold_files(files.folder).items()
    }
    ids = sorted({one for fold in folds.values() for row in fold.rows for one in row.objects})
    texts = list(dict.fromkeys(row.annotation for f in folds.values() for row in f.rows))
    if files.clip is None:
        return _questions(files, folds, *_read(files, ids, texts))
    return _with_clip(files, folds, ids, texts, cache, pixels, words, progress)


def _fold_files(folder: Path) -> dict[str, Path]:
    inner = folder / "amt" / "folds_adversarial"
    place = folder if (folder / "train.json").is_file() else inner
    found = {name: place / file for name, file in _FOLDS.items() if (place / file).is_file()}
    for name in ("train", "valid"):
        if name not in found:
            raise UserError(
                f"{folder} has no {_FOLDS[name]}; expected the annotations of the repository "
                "snaredataset/snare, from its amt/folds_adversarial; name that folder"
            )
    return found


def _read(files: SnareFiles, ids: Sequence[str], texts: Sequence[str]) -> Any:
    images = files.images or files.folder / "shapenet-clipViT32-frames.json.gz"
    said = files.texts or files.folder / "langfeat-512-clipViT32.json.gz"
    for file in (images, said):
        if not file.is_file():
            raise UserError(
                f"{file} is not there; expected SNARE's CLIP features, which the README of the "
                "repository snaredataset/snare links; name the file (--images, --texts), or give "
                "--clip and --screenshots"
            )
    return (
        read_view_features(images, width=files.width, ids=ids),
        read_text_features(said, width=files.width, texts=texts),
    )


def _questions(
    files: SnareFiles, folds: dict[str, Fold], images: ViewFeatures, texts: TextFeatures
) -> Questions:
    indices = {name: index_rows(fold.rows, images, texts) for name, fold in folds.items()}
    known = vocabulary_of([row.annotation for row in folds["train"].rows])
    tokens, real = caption_tokens(texts.texts, known)
    tables = from_snare(images, texts)._replace(tokens=tokens, token_mask=real)
    groups = {
        name: {"visual": one.visual, "blind": ~one.visual} if name != "test" else {}
        for name, one in indices.items()
    }
    shown = files.screenshots
    return Questions(
        tables,
        {name: snare_rows(one) for name, one in indices.items()},
        groups,
        names=images.ids,
        texts=texts.texts,
        pictures=None if shown is None else lambda i: _views(shown, images.ids[i]),
        rows={name: fold.rows for name, fold in folds.items()},
    )


def _views(folder: Path, object_id: str) -> list[Any]:
    """Read an object's eight views; None where one is missing."""
    there = [(folder / object_id / f"{object_id}-{view}.png").is_file() for view in VIEWS]
    read = screenshots(folder, object_id, [v for v, ok in zip(VIEWS, there, strict=True) if ok])
    left = iter(read)
    return [next(left) if ok else None for ok in there]


def _with_clip(
    files: SnareFiles,
    folds: dict[str, Fold],
    ids: Sequence[str],
    texts: Sequence[str],
    cache: Path | None,
    pixels: bool,
    words: bool,
    progress: Callable[[int, int], None],
) -> Questions:
    assert files.clip is not None
    params, config = clip.load(files.clip)
    folder = files.clip if files.clip.is_dir() else files.clip.parent
    has_own = any((folder / name).is_file() for name in ("tokenizer.json", "merges.txt"))
    tokenizer = clip.load_tokenizer(folder if has_own else None)
    vision = {name: params[name] for name in ("vision_model", "visual_projection")}
    kept = _encode_pictures(files, ids, vision, config, cache, pixels, progress)
    vectors, states, real = _encode_texts(params, config, tokenizer, texts, words)
    found = _questions(files, folds, kept[0], TextFeatures(tuple(texts), vectors))
    tables = found.tables._replace(words=states, word_mask=real, pixels=kept[1])
    return found._replace(
        tables=tables._replace(text_ids=text_ids(texts)),
        vision=vision,
        encode=partial(_see, config),
        patterns=("*q_proj.weight", "*v_proj.weight"),
        resident=kept[1] is None or kept[1].nbytes <= _RESIDENT_BYTES,
    )


def _see(config: clip.ClipConfig, vision: Any, pixels: Any) -> Any:
    """Encode bytes as `clip.preprocess` and `clip.encode_image` would."""
    mean, std = (jnp.asarray(x, jnp.float32)[None, None, None] for x in (MEAN, STD))
    return clip.encode_image(vision, config, (pixels / jnp.float32(255) - mean) / std).features


def _encode_pictures(
    files: SnareFiles,
    ids: Sequence[str],
    vision: Any,
    config: clip.ClipConfig,
    cache: Path | None,
    pixels: bool,
    progress: Callable[[int, int], None],
) -> tuple[ViewFeatures, Any]:
    """Compute f_v of every view, and keep the pictures as bytes where they are wanted."""
    assert files.screenshots is not None
    side, n, v = config.image_size, len(ids), len(VIEWS)
    source = f"{files.clip} {files.screenshots} {side} {zlib.crc32(' '.join(ids).encode())}"
    stem = None if cache is None else cache / f"process-{jax.process_index()}"
    kept = _kept(stem, source, pixels)
    if kept is not None:
        return ViewFeatures(tuple(ids), *kept[:2]), kept[2]
    run = jax.jit(partial(_see, config))
    features = np.zeros((n, v, config.projection_width), np.float32)
    mask, held = np.zeros((n, v), bool), None
    if pixels and stem is not None:
        stem.parent.mkdir(parents=True, exist_ok=True)
        stem.with_suffix(".npz").unlink(missing_ok=True)  # it vouches for what is written over
        path, shape = stem.with_suffix(".npy"), (n, v, side, side, 3)
        held = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    elif pixels:
        held = np.zeros((n, v, side, side, 3), np.uint8)
    for i, name in enumerate(ids):
        seen = _views(files.screenshots, name)
        mask[i] = [picture is not None for picture in seen]
        square = prepare([p for p in seen if p is not None], side, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        whole = np.zeros((v, side, side, 3), np.uint8)
        whole[mask[i]] = np.round(255 * square)
        features[i] = np.where(mask[i][:, None], np.asarray(run(vision, whole)), 0)
        if held is not None:
            held[i] = whole
        progress(i + 1, n)
    if stem is not None:
        written = io.BytesIO()
        np.savez(written, features=features, mask=mask, source=np.array(f"{source} {pixels}"))
        atomic_write(stem.with_suffix(".npz"), written.getvalue())
    return ViewFeatures(tuple(ids), features, mask), held


def _kept(stem: Path | None, source: str, pixels: bool) -> tuple[Any, Any, Any] | None:
    """Read what a run before this one computed of the same pictures, if it did."""
    if stem is None or not stem.with_suffix(".npz").is_file():
        return None
    with np.load(stem.with_suffix(".npz")) as found:
        if str(found["source"]) not in (f"{source} {pixels}", f"{source} True"):
            return None
        features, mask = found["features"], found["mask"]
    if not pixels:
        return features, mask, None
    path = stem.with_suffix(".npy")
    return (features, mask, np.load(path, mmap_mode="r")) if path.is_file() else None


def _encode_texts(
    params: Any, config: clip.ClipConfig, tokenizer: Any, texts: Sequence[str], words: bool
) -> tuple[Any, Any, Any]:
    """Compute f_l of every text and, where wanted, the states of its tokens."""
    ids = tokenizer.encode(list(texts), config.max_positions, truncate=True)
    end = np.argmax(ids == tokenizer.end_id, 1)
    length = int(end.max()) + 1
    run = jax.jit(lambda params, ids: clip.encode_text(params, config, ids))
    vectors, states = [], []
    for start in range(0, len(texts), _BLOCK):
        at = np.arange(start, start + _BLOCK) % len(texts)
        found = run(params, ids[at, :length])
        vectors.append(np.asarray(found.features))
        if words:
            states.append(np.asarray(found.tokens))
    real = np.arange(length)[None] <= end[:, None]
    whole = np.concatenate(vectors)[: len(texts)]
    return whole, np.concatenate(states)[: len(texts)] if words else None, real if words else None
