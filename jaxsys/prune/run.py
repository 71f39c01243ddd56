"""Prune a checkpoint on disk: one block in memory at a time, resumed where it was stopped."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Integer

from jaxsys.core.checkpoint import read_header, read_safetensors, write_safetensors
from jaxsys.core.errors import UserError
from jaxsys.core.processes import spread
from jaxsys.core.report import atomic_write, to_json
from jaxsys.core.tree import unflatten
from jaxsys.models import lm
from jaxsys.prune.blocks import lm_blocks
from jaxsys.prune.methods import Method
from jaxsys.prune.patterns import Pattern
from jaxsys.prune.plan import PrunedBlock, layers_matching, memory_bytes
from jaxsys.prune.protocol import sequential
from jaxsys.prune.storage import pack_bits, read_pruned, unpack_bits, write_pruned

PARTS = "unfinished"
Form = Literal["dense", "packed", "nm"]


class Done(NamedTuple):
    """Say what a run wrote.

    Attributes:
        files: the checkpoint.
        rows: for each layer its name, sparsity and seconds; those of an earlier run too.
        sparsity: removed share of the pruned matrices together.
        bytes: of the checkpoint's tensors on disk.
        dense_bytes: of the same tensors without pruning.

    >>> Done((), (), 0.5, 1, 2).sparsity
    0.5
    """

    files: tuple[Path, ...]
    rows: tuple[dict[str, Any], ...]
    sparsity: float
    bytes: int
    dense_bytes: int


def prune_checkpoint(
    source: str | Path,
    out: str | Path,
    tokens: Integer[np.ndarray, "N T"],
    method: Method,
    pattern: Pattern,
    *,
    form: Form = "dense",
    layers: tuple[str, ...] = ("*",),
    dtype: Any = None,
    batch: int = 1,
    on_memory: Callable[[Mapping[str, int]], None] = lambda need: None,
    on_block: Callable[[int, int, PrunedBlock | None], None] = lambda i, n, found: None,
) -> Done | None:
    """Prune a model of `jaxsys.models.lm` from disk to disk, block after block.

    Every finished block is written to ``out/unfinished`` at once. A run that was stopped goes on
    after its last block, with the same result, if it is started again with the same arguments. The
    processes of a job share the layers of a block, and the first of them writes.

    Args:
        source: what `models.lm.load` takes.
        out: folder for the checkpoint; ``config.json`` and safetensors under the checkpoint's own
            names (``dense``), or the smaller forms of `jaxsys.prune.storage`.
        tokens: calibration sequences.
        method: what to do.
        pattern: how much and in which form.
        form: ``dense`` keeps zeros; ``packed`` stores bit masks and values; ``nm`` stores an N:M
            pattern as values and places.
        layers: globs over the paths of the layers to prune.
        dtype: of the written tensors; None keeps each one's.
        batch: calibration sequences at a time.
        on_memory: told the estimate of `plan.memory_bytes` before anything is loaded.
        on_block: told (blocks done, blocks in all, the block, or None if an earlier run did it).

    Returns:
        What was written; None in all processes of a job but the first.

    Raises:
        UserError: for what does not fit; for a folder with another run's unfinished blocks, or one
            that the processes of a job do not share.

    >>> import tempfile
    >>> config = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> a, b = tempfile.mkdtemp(), tempfile.mkdtemp()
    >>> _ = lm.save(a, lm.init(jax.random.key(0), config), config)
    >>> tokens = np.arange(32).reshape(2, 16)
    >>> prune_checkpoint(a, b, tokens, Method("magnitude"), Pattern(0.5)).sparsity
    0.5
    """
    out = Path(out)
    config, tensors = lm.open_tensors(source)
    blocks = layers_matching(lm_blocks(config), layers)
    if form == "nm" and pattern.nm is None:
        raise UserError(
            f"the form nm stores N:M patterns and the pattern is {pattern}; choose a pattern such "
            "as 2:4, or the form packed"
        )
    if Path(source).resolve() == out.resolve():
        raise UserError(f"{out} holds the model itself; name another folder to write into")
    on_memory(memory_bytes(blocks, lm.shapes(config), method, *tokens.shape, batch=batch))
    parts = out / PARTS
    _claim(parts, source, tokens, method, pattern, layers)
    finished = _agreed(parts, blocks.count)

    def done(i: int) -> dict[str, Any] | None:
        found = _read_part(parts, i) if finished[i] else None
        if found is None:
            return None
        on_block(i + 1, blocks.count, None)
        return {name: jnp.asarray(leaf) for name, leaf in found.items() if ":" not in name}

    first = jax.process_index() == 0
    for found in sequential(blocks, tensors, tokens, method, pattern, batch=batch, done=done):
        if first:
            _write_part(parts, found)
        on_block(found.index + 1, blocks.count, found)
    whole = None
    if first:
        whole = _assemble(out, config, tensors, blocks, pattern, form, dtype, method)
    spread(["written"], lambda part: np.zeros(1), lambda part: np.zeros(1))  # others wait for it
    return whole


def _agreed(parts: Path, count: int) -> list[bool]:
    """List the blocks that earlier runs finished; all processes must see the same."""
    seen = np.array([(_part(parts, i) / "model.safetensors").is_file() for i in range(count)])
    names = [str(p) for p in range(jax.process_count())]
    for name, other in spread(names, lambda part: seen, lambda part: seen).items():
        if not np.array_equal(seen, other):
            raise UserError(
                f"process {name} of the job sees {int(other.sum())} finished blocks in {parts} and "
                f"this one {int(seen.sum())}; expected one folder that all share; name such a one"
            )
    return seen.tolist()


def _claim(
    parts: Path, source: Any, tokens: np.ndarray, method: Method, pattern: Pattern, layers: Any
) -> None:
    """Make the folder of finished blocks this run's, or find that it is another's."""
    mine = json.loads(
        to_json(
            {
                "source": str(Path(source).resolve()),
                "tokens": hashlib.blake2b(
                    np.ascontiguousarray(tokens, np.int32).tobytes(), digest_size=8
                ).hexdigest(),
                "method": dataclasses.asdict(method),
                "pattern": dataclasses.asdict(pattern),
                "layers": list(layers),
            }
        )
    )
    file = parts / "run.json"
    if not file.is_file():
        if jax.process_index() == 0:
            atomic_write(file, to_json(mine) + "\n")
        return
    try:
        found = json.loads(file.read_text())
    except ValueError:
        found = {}
    if found != mine:
        differs = next((key for key in mine if found.get(key) != mine[key]), "source")
        raise UserError(
            f"{parts} holds finished blocks of a run with another {differs}; start that run again "
            "to finish it, choose another folder, or delete this one"
        )


def _part(parts: Path, i: int) -> Path:
    return parts / f"{i:05d}"


def _write_part(parts: Path, found: PrunedBlock) -> None:
    arrays = {name: np.asarray(leaf) for name, leaf in found.tensors.items()}
    arrays |= {f"mask:{n}": pack_bits(np.asarray(m), 1) for n, m in found.masks.items()}
    arrays |= {f"permutation:{name}": p for name, p in found.permutations.items()}
    rows = {"rows": to_json(list(found.rows))}
    write_safetensors(_part(parts, found.index), arrays, arrays.__getitem__, metadata=rows)


def _read_part(parts: Path, i: int) -> dict[str, np.ndarray] | None:
    folder = _part(parts, i)
    # The file has its name only when it is complete.
    return read_safetensors(folder) if (folder / "model.safetensors").is_file() else None


def _assemble(
    out: Path,
    config: lm.LMConfig,
    tensors: Mapping[str, Any],
    blocks: Any,
    pattern: Pattern,
    form: Form,
    dtype: Any,
    method: Method,
) -> Done:

    kinds = getattr(tensors, "dtypes", None)
    shapes = lm.shapes(config)
    whole = _Overlay(tensors, out / PARTS, blocks.count)
    named = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, np.dtype(dtype or (kinds[name] if kinds else tensors[name].dtype))
        )
        for name, leaf in shapes.items()
    }
    kept = sum(int(mask.sum()) for mask in map(whole.mask, whole.pruned))
    total = sum(int(np.prod(shapes[name].shape)) for name in whole.pruned)
    if form == "dense":
        files = lm.write_folder(
            out, config, named, lambda n: np.asarray(whole[n]).astype(named[n].dtype, copy=False)
        )
    else:
        lazy = {name: _Lazy(whole, name, leaf) for name, leaf in named.items()}
        masks = {name: _LazyMask(whole, name) for name in whole.pruned}
        files = write_pruned(
            out,
            lazy,
            masks,
            nm=pattern.nm if form == "nm" else None,
            permutations=whole.permutations(),
            in_out=blocks.in_out,
            dtype=dtype,
        )
        fields = lm.config_to_hf(config)
        atomic_write(out / "config.json", json.dumps(fields, indent=2) + "\n")
        files = [out / "config.json", *files]
    rows = [row for i in range(blocks.count) for row in _rows(out / PARTS, i)]
    sparsity = 1 - kept / total
    about = {"method": dataclasses.asdict(method), "pattern": str(pattern), "form": form}
    atomic_write(out / "prune.json", to_json(about | {"sparsity": sparsity, "rows": rows}) + "\n")
    shutil.rmtree(out / PARTS)
    written = sum(file.stat().st_size for file in files if file.suffix == ".safetensors")
    dense = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in named.values())
    return Done(tuple(files), tuple(rows), sparsity, written, dense)


def _rows(parts: Path, i: int) -> list[dict[str, Any]]:

    return json.loads(read_header(_part(parts, i)).metadata["rows"])


class _Overlay:
    """Read a model with finished blocks laid over it, one tensor at a time."""

    def __init__(self, tensors: Mapping[str, Any], parts: Path, count: int):
        self.tensors = tensors
        self.parts: dict[str, np.ndarray] = {}
        for i in range(count):
            self.parts |= _read_part(parts, i) or {}
        self.pruned = [name for name in self.parts if ":" not in name]

    def __getitem__(self, name: str) -> Any:
        return self.parts[name] if name in self.parts else self.tensors[name]

    def mask(self, name: str) -> np.ndarray:
        shape = self.parts[name].shape
        bits = unpack_bits(self.parts[f"mask:{name}"], 1, int(np.prod(shape)))
        return bits.reshape(shape).astype(bool)

    def permutations(self) -> dict[str, np.ndarray]:
        mark = "permutation:"
        return {n[len(mark) :]: p for n, p in self.parts.items() if n.startswith(mark)}


class _Lazy:
    """Stand for a tensor that is read when its array is asked for."""

    def __init__(self, whole: _Overlay, name: str, leaf: Any):
        self.whole, self.name = whole, name
        self.shape, self.dtype = leaf.shape, leaf.dtype

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        del copy
        return np.asarray(self.whole[self.name], dtype)


class _LazyMask:
    """Stand for a mask that is unpacked when its array is asked for."""

    def __init__(self, whole: _Overlay, name: str):
        self.whole, self.name = whole, name

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        del copy
        return np.asarray(self.whole.mask(self.name), dtype)


def load_pruned(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray], lm.LMConfig]:
    """Load a folder in one of the smaller forms.

    Args:
        path: the folder.

    Returns:
        The model's tree, dense; the masks by path; and the configuration.

    Raises:
        UserError: for a damaged folder.

    >>> load_pruned("nowhere")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: ...
    """
    tensors, masks = read_pruned(path)
    config = lm.load_config(path)
    expected = {name: leaf.shape for name, leaf in lm.shapes(config).items()}
    found = {name: leaf.shape for name, leaf in tensors.items()}
    if found != expected:
        wrong = next(n for n in {**expected, **found} if found.get(n) != expected.get(n))
        raise UserError(
            f"{path} does not fit its configuration at {wrong}; use the config.json that belongs "
            "to the weights"
        )
    tree = unflatten({name: jnp.asarray(tensors[name]) for name in expected})
    return tree, masks, config
