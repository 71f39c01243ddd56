"""Merge checkpoints of any size from files to files, one tensor in memory at a time.

Models are mapped, never loaded: while a tensor is merged slice by slice the next one is read ahead,
and a thread writes what is finished. The leaf functions and slices are those of
`jaxsys.merge.in_memory.merge_tree`, so the result is the same to the last bit.
"""

import contextlib
import dataclasses
import hashlib
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsys.core import report
from jaxsys.core.checkpoint import Filling, advise
from jaxsys.core.errors import UserError
from jaxsys.core.tree import path_key
from jaxsys.merge.blockwise import merge_slices
from jaxsys.merge.budget import Budget, check_budget, predict
from jaxsys.merge.plan import Leaf, MergePlan, plan_merge
from jaxsys.merge.recipe import Recipe
from jaxsys.merge.tokenizers import write_tokenizer
from jaxsys.merge.vocabulary import reorder_rows

# What stands beside the weights of a model and is taken over from the base.
_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
_AHEAD = 8  # finished slices that wait for the disk


class Merged(NamedTuple):
    """Say what a merge wrote.

    Attributes:
      files: all files of the result.
      budget: what was predicted.
      seconds: from the first tensor to the last byte on the disk.
      resumed: tensors that an earlier, killed run had written.

    >>> Merged((), Budget(0, 0, 0, "", 0, 1), 0.0, 0).resumed
    0
    """

    files: tuple[Path, ...]
    budget: Budget
    seconds: float
    resumed: int


def plan_files(recipe: Recipe) -> tuple[MergePlan, Budget]:
    """Plan a merge over files and predict what it costs, reading headers only.

    Args:
      recipe: what to merge.

    Raises:
      UserError: as `jaxsys.merge.plan.plan_merge`.

    >>> plan_files(Recipe("tiez", ()))
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: 'tiez' is no merge method; ...
    """
    plan = plan_merge(recipe)
    config = next((leaf.config for leaf in plan.leaves if leaf.config is not None), None)
    passes = 1 + 2 * (getattr(config, "trim", "") == "global")
    passes += getattr(config, "zero_sign", "") == "majority"
    return plan, predict(plan, passes)


def merge_files(
    recipe: Recipe,
    out: str | Path,
    *,
    key: jax.Array | None = None,
    shard_bytes: int = 5 << 30,
    progress: Callable[[int, int], None] | None = None,
    tell: Callable[[Budget], None] | None = None,
) -> Merged:
    """Merge the models of a recipe into a folder.

    A run that was killed goes on with the tensor at which it was, if recipe, key and models are the
    same; the files get their names at the end.

    Args:
      recipe: what to merge.
      out: folder of the result.
      key: random key; ``jax.random.key(0)`` by default.
      shard_bytes: most data in one file.
      progress: called with bytes written and bytes in all.
      tell: called with the prediction before anything is read.

    Returns:
      What was written.

    Raises:
      UserError: before anything is written, for models that do not fit, options that do not exist,
        and for too little memory or disk.

    >>> import tempfile
    >>> from jaxsys.core.checkpoint import read_safetensors, write_safetensors
    >>> from jaxsys.merge.recipe import Input, Recipe, Slice
    >>> folders = [tempfile.mkdtemp() for _ in range(3)]
    >>> for i, folder in enumerate(folders[:2]):
    ...     arrays = {"w": np.full(3, i, np.float32)}
    ...     _ = write_safetensors(folder, arrays, arrays.get)
    >>> recipe = Recipe("linear", (Slice((Input(folders[0]), Input(folders[1]))),),
    ...                 parameters={"weight": 1.0})
    >>> _ = merge_files(recipe, folders[2])
    >>> read_safetensors(folders[2])["w"].tolist()
    [0.5, 0.5, 0.5]
    """
    plan, budget = plan_files(recipe)
    folder = Path(out)
    _refuse_own_input(plan, folder)
    if tell is not None:
        tell(budget)
    left = sum(f.stat().st_size for f in folder.glob(".*.unfinished")) if folder.is_dir() else 0
    check_budget(budget, folder, left)
    key = jax.random.key(0) if key is None else key
    started = time.perf_counter()
    shapes = {leaf.name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in plan.leaves}
    identity = _identity(recipe, plan, key, shapes)
    filling = Filling(folder, shapes, identity, shard_bytes=shard_bytes)
    resumed = len(filling.done)
    try:
        plan = _first_pass(plan)
        with _writer(filling) as put:
            _merge_all(plan, key, filling.done, put, progress, budget.write_bytes)
        files = filling.finish()
    finally:
        filling.close()
    files += _other_files(plan, folder)
    return Merged(tuple(files), budget, time.perf_counter() - started, resumed)


def _merge_all(
    plan: MergePlan,
    key: jax.Array,
    done: frozenset[str],
    put: Callable[[str, np.ndarray], None],
    progress: Callable[[int, int], None] | None,
    total: int,
) -> None:
    todo = [leaf for leaf in plan.leaves if leaf.name not in done]
    written = total - sum(_bytes(leaf) for leaf in todo)
    for i, leaf in enumerate(todo):
        if i + 1 < len(todo):
            for view in _views(plan, todo[i + 1]):
                advise(view, need=True)
        for piece in _pieces(plan, leaf, key):
            put(leaf.name, piece)
            written += piece.nbytes
            if progress is not None:
                progress(written, total)
        for view in _views(plan, leaf):
            advise(view, need=False)


def _bytes(leaf: Leaf) -> int:
    return int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize


def _views(plan: MergePlan, leaf: Leaf) -> Iterator[np.ndarray]:
    """Give the mapped arrays of a leaf's inputs; adapted tensors are made only when merged."""
    for number, name in [*leaf.inputs, *([leaf.base] if leaf.base else [])]:
        tensors = plan.sources[number].tensors
        if isinstance(tensors, dict):
            yield tensors[name]


def _arrays(plan: MergePlan, leaf: Leaf) -> tuple[np.ndarray | None, list[np.ndarray]]:
    """Read base and models of a leaf, rows of tokens in the plan's order."""
    names = dict(leaf.inputs) | (dict([leaf.base]) if leaf.base else {})
    if not leaf.rows or plan.rows is None:
        base = None if leaf.base is None else plan.sources[leaf.base[0]].tensors[leaf.base[1]]
        return base, [plan.sources[n].tensors[name] for n, name in leaf.inputs]
    whole = [s.tensors[names.get(i, leaf.name)] for i, s in enumerate(plan.sources)]
    moved = reorder_rows(plan.rows, whole)
    base = None if leaf.base is None else moved[leaf.base[0]]
    return base, [moved[number] for number, _ in leaf.inputs]


def _pieces(plan: MergePlan, leaf: Leaf, key: jax.Array) -> Iterator[np.ndarray]:
    base, models = _arrays(plan, leaf)
    if leaf.config is None:
        yield models[0].astype(leaf.dtype, copy=False).reshape(-1)
        return
    yield from merge_slices(
        plan.method,
        leaf.config,
        base,
        models,
        leaf.weights,
        path_key(key, leaf.name),
        leaf.dtype,
    )


def _first_pass(plan: MergePlan) -> MergePlan:
    """Run the method's pass over all tensors, where its options ask for one."""
    merged = [leaf for leaf in plan.leaves if leaf.config is not None]
    if plan.method.pass_ is None or not merged:
        return plan

    def leaves() -> Iterator[tuple[str, Any, list[Any]]]:
        for leaf in merged:
            yield leaf.name, *_arrays(plan, leaf)
            for view in _views(plan, leaf):
                advise(view, need=False)

    config = plan.method.pass_(merged[0].config, leaves)
    if config == merged[0].config:
        return plan
    fields = ("trim", "zero_sign", "density")
    for leaf in merged:
        if any(getattr(leaf.config, f) != getattr(config, f) for f in fields):
            raise UserError(
                f"{leaf.name} has other options than {merged[0].name}, and a ranking over all "
                "tensors needs one density; give one value, or trim each tensor by itself"
            )
    found = {"thresholds": config.thresholds, "majority": config.majority}
    return plan._replace(
        leaves=tuple(
            leaf
            if leaf.config is None
            else leaf._replace(config=dataclasses.replace(leaf.config, **found))
            for leaf in plan.leaves
        )
    )


@contextlib.contextmanager
def _writer(filling: Filling) -> Iterator[Callable[[str, np.ndarray], None]]:
    """Write pieces in a thread, behind the computation."""
    pieces: queue.Queue[tuple[str, np.ndarray] | None] = queue.Queue(_AHEAD)
    failed: list[BaseException] = []

    def run() -> None:
        while (piece := pieces.get()) is not None:
            if not failed:
                try:
                    filling.write(*piece)
                except BaseException as error:  # told to the caller at its next piece
                    failed.append(error)

    def put(name: str, piece: np.ndarray) -> None:
        if failed:
            raise failed[0]
        pieces.put((name, piece))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield put
    finally:
        pieces.put(None)
        thread.join()
    if failed:
        raise failed[0]


def _refuse_own_input(plan: MergePlan, out: Path) -> None:
    for source in plan.sources:
        if source.folder is not None and source.folder.resolve() == out.resolve():
            raise UserError(
                f"the result would take the place of {source.name}, which is being merged; name "
                "another folder"
            )


def _identity(recipe: Recipe, plan: MergePlan, key: jax.Array, shapes: dict[str, Any]) -> str:
    """Hash what decides the result: recipe, key, shapes, and size and time of the models' files."""
    words = np.asarray(jax.random.key_data(key)).tolist()
    told = [repr(recipe), repr(words), repr(shapes)]
    for source in plan.sources:
        place = Path(source.name) if source.folder is None else source.folder
        files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
        for file in files:
            if file.exists():
                stat = os.stat(file)
                told.append(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.blake2b("\n".join(told).encode(), digest_size=16).hexdigest()


def _other_files(plan: MergePlan, folder: Path) -> list[Path]:
    """Write config.json and the tokenizer, and copy what else the base has."""
    files = []
    donor = plan.sources[plan.donor].folder
    for name in _COPIED:
        if donor is not None and (donor / name).is_file():
            shutil.copyfile(donor / name, folder / name)
            files.append(folder / name)
    if plan.rows is not None and plan.rows.file is not None:
        files += [file for file in write_tokenizer(folder, plan.rows.file) if file not in files]
    if plan.config_json is not None:
        report.atomic_write(folder / "config.json", plan.config_json)
        files.append(folder / "config.json")
    return files
