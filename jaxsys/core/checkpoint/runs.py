"""Save and resume a run: any pytree of arrays, one directory a step, never half a checkpoint.

Layout of a store: ``<directory>/<step>/manifest.json`` says what was saved (names, shapes, dtypes,
the caller's metadata) and ``<directory>/<step>/state`` is an Orbax checkpoint of the arrays. A step
is written under another name and renamed, so a directory named by a number is always complete.
"""

import contextlib
import json
import logging
import math
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from jaxsys.core import report, tree
from jaxsys.core.errors import UserError

_MANIFEST = "manifest.json"
_UNFINISHED = ".unfinished"
_FORMAT = 1


@dataclass(frozen=True)
class RunStore:
    """Keep the last few states of a run in a directory.

    Leaves may be global `jax.Array`s (saved once, whatever their sharding), arrays local to a
    process (saved for every process, so that workers may differ), typed random keys, NumPy arrays
    and Python numbers (which must agree on all processes). With several processes every method is
    called by all of them.

    Attributes:
      directory: made at the first save; all processes must see the same file system.
      keep: how many of the newest steps stay.

    >>> import tempfile
    >>> store = RunStore(tempfile.mkdtemp(), keep=1)
    >>> store.save(7, {"w": jnp.arange(3.0)}, {"lr": 0.1})
    >>> state, meta = store.restore(store.latest(), {"w": jnp.zeros(3)})
    >>> state["w"].tolist(), meta
    ([0.0, 1.0, 2.0], {'lr': 0.1})
    """

    directory: str | Path
    keep: int = 2

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise UserError(f"keep is {self.keep}; at least 1 checkpoint must stay to resume from")

    def steps(self) -> tuple[int, ...]:
        """List the steps that can be restored, oldest first."""
        folder = Path(self.directory)
        if not folder.is_dir():
            return ()
        numbered = [p for p in folder.iterdir() if p.name.isdecimal()]
        return tuple(sorted(int(p.name) for p in numbered if (p / _MANIFEST).exists()))

    def latest(self) -> int | None:
        """Find the newest step that can be restored; None if there is none."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, meta: dict[str, Any] | None = None) -> None:
        """Save a state; a kill at any moment leaves the previous checkpoints as they were.

        Args:
          step: number of the step, at least 0; one saved before is replaced.
          state: the pytree.
          meta: what JSON can hold: configuration, plan, data position.

        Raises:
          UserError: for a negative step, a leaf that is no number, or metadata that is not JSON.
        """
        if step < 0:
            raise UserError(f"step is {step}; checkpoints are numbered from 0")
        folder = Path(self.directory).absolute()
        manifest = _to_manifest(state, meta or {})
        arrays = {
            str(i): _to_array(leaf)
            for i, leaf in enumerate(jax.tree.leaves(state))
            if _on_disk(leaf)
        }
        unfinished, final = folder / f"{step}{_UNFINISHED}", folder / str(step)
        primary = jax.process_index() == 0
        if primary:
            # Leavings of a killed run.
            for old in folder.glob(f"*{_UNFINISHED}*"):
                shutil.rmtree(old)
            unfinished.mkdir(parents=True)
        _barrier(f"{step} folder")
        if arrays:
            with _quiet() as orbax:
                orbax.save(unfinished / "state", arrays)
        if primary:
            report.atomic_write(unfinished / _MANIFEST, manifest)
            if final.exists():
                _remove(final)
            unfinished.rename(final)
            for old_step in self.steps()[: -self.keep]:
                _remove(folder / str(old_step))
        _barrier(f"{step} saved")

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Restore a state with the structure, devices and shardings of `like`.

        Args:
          step: one of `steps()`.
          like: a pytree such as the one saved; arrays may be `jax.ShapeDtypeStruct`s with
            shardings.

        Returns:
          The state and the metadata saved with it.

        Raises:
          UserError: if there is no such step, or its tree, a shape or a dtype differs from `like`;
            nothing is read in that case.
        """
        folder = Path(self.directory).absolute() / str(step)
        manifest = self._manifest(step)
        _check(folder, manifest, like)
        leaves, structure = jax.tree.flatten(like)
        wanted = {str(i): _to_spec(leaf) for i, leaf in enumerate(leaves) if _on_disk(leaf)}
        read: dict[str, Any] = {}
        if wanted:
            with _quiet() as orbax:
                read = orbax.load(folder / "state", wanted)
        restored = [
            _from_array(read.get(str(i)), leaf, record)
            for i, (leaf, record) in enumerate(zip(leaves, manifest["leaves"], strict=True))
        ]
        return jax.tree.unflatten(structure, restored), manifest["meta"]

    def contents(self, step: int) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, Any]]:
        """List what was saved, without reading it.

        Args:
          step: one of `steps()`.

        Returns:
          Path to shape and dtype of each array, numbers left out, and the metadata.

        Raises:
          UserError: if there is no such step.

        >>> import tempfile
        >>> store = RunStore(tempfile.mkdtemp())
        >>> store.save(0, {"w": jnp.zeros(3)})
        >>> store.contents(0)
        ({'w': ShapeDtypeStruct(shape=(3,), dtype=float32)}, {})
        """
        manifest = self._manifest(step)
        arrays = {
            record["name"]: jax.ShapeDtypeStruct(tuple(record["shape"]), jnp.dtype(record["dtype"]))
            for record in manifest["leaves"]
            if "shape" in record and "impl" not in record
        }
        return arrays, manifest["meta"]

    def _manifest(self, step: int) -> dict[str, Any]:
        path = Path(self.directory).absolute() / str(step) / _MANIFEST
        if not path.exists():
            had = ", ".join(map(str, self.steps())) or "none"
            raise UserError(f"{self.directory} has no checkpoint of step {step}; it has: {had}")
        return json.loads(path.read_text(encoding="utf-8"))


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, bool | int | float) and not isinstance(leaf, np.generic)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_local(leaf: Any) -> bool:
    """Tell whether every process has an array of its own under this name."""
    sharding = getattr(leaf, "sharding", None)
    own = sharding is None or sharding.is_fully_addressable
    return own and jax.process_count() > 1


def _on_disk(leaf: Any) -> bool:
    # Orbax refuses arrays without elements; their shape in the manifest says all.
    return not _is_number(leaf) and math.prod(leaf.shape) > 0


def _record(name: str, leaf: Any) -> dict[str, Any]:
    if _is_number(leaf):
        return {"name": name, "kind": type(leaf).__name__, "value": leaf}
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")) or leaf.dtype == object:
        raise UserError(
            f"{name} is a {type(leaf).__name__}; a checkpoint holds arrays, random keys and numbers"
        )
    kind = "local" if _is_local(leaf) else "array"
    record = {"name": name, "kind": kind, "shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    if isinstance(leaf, jax.Array) and _is_key(leaf):
        record["impl"] = str(jax.random.key_impl(leaf))
    return record


def _records(state: Any) -> list[dict[str, Any]]:
    pairs = zip(tree.paths(state), jax.tree.leaves(state), strict=True)
    return [_record(name, leaf) for name, leaf in pairs]


def _to_manifest(state: Any, meta: dict[str, Any]) -> str:
    document = {
        "format": _FORMAT,
        "processes": jax.process_count(),
        "meta": meta,
        "leaves": _records(state),
    }
    try:
        return json.dumps(document)
    except (TypeError, ValueError) as error:
        raise UserError(f"the metadata of the checkpoint is not JSON: {error}") from None


def _check(folder: Path, manifest: dict[str, Any], like: Any) -> None:
    """Refuse a checkpoint that does not fit, naming the first leaf that differs."""
    if manifest.get("format") != _FORMAT:
        raise UserError(f"{folder} has format {manifest.get('format')}; expected {_FORMAT}")
    saved, wanted = manifest["leaves"], _records(like)
    for a, b in zip(saved, wanted, strict=False):
        if any(a.get(field) != b.get(field) for field in ("name", "kind", "shape", "dtype")):
            raise UserError(
                f"{folder} was saved from another model or run: it holds {_describe(a)} where "
                f"{_describe(b)} is expected; choose another directory or the same settings"
            )
    if len(saved) != len(wanted):
        common = min(len(saved), len(wanted))
        who, extra = "the checkpoint lacks", wanted
        if len(saved) > common:
            who, extra = "only the checkpoint has", saved
        raise UserError(
            f"{folder} was saved from another model or run: {who} {_describe(extra[common])}; "
            "choose another directory or the same settings"
        )
    any_local = any(record["kind"] == "local" for record in saved)
    if any_local and manifest["processes"] != jax.process_count():
        raise UserError(
            f"{folder} holds arrays of {manifest['processes']} processes and this run has "
            f"{jax.process_count()}; start as many as saved it"
        )


def _describe(record: dict[str, Any]) -> str:
    if "shape" not in record:
        return f"{record['name']} ({record['kind']})"
    owner = ", one for each process" if record["kind"] == "local" else ""
    return f"{record['name']} ({record['dtype']}{record['shape']}{owner})"


def _process_sharding() -> NamedSharding:
    """Lay one leading index on the first device of each process."""
    first: dict[int, Any] = {}
    for device in jax.devices():
        first.setdefault(device.process_index, device)
    devices = np.array([first[i] for i in sorted(first)])
    mesh = Mesh(devices, ("process",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("process"))


def _data(leaf: Any) -> Any:
    """Take a leaf's plain array, which for a random key is its words."""
    if _is_key(leaf):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            words = jax.eval_shape(jax.random.key_data, leaf)
            return jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=leaf.sharding)
        return jax.random.key_data(leaf)
    return leaf


def _to_array(leaf: Any) -> Any:
    data = _data(leaf)
    if not _is_local(leaf):
        return data if isinstance(data, jax.Array) else np.asarray(data)
    # As bytes: on its way through a device a 64-bit NumPy array would lose half of its bits.
    row = np.frombuffer(np.asarray(data).tobytes(), np.uint8)[None]
    sharding = _process_sharding()
    here = jax.device_put(row, next(iter(sharding.addressable_devices)))
    shape = (jax.process_count(), row.size)
    return jax.make_array_from_single_device_arrays(shape, sharding, [here])


def _to_spec(leaf: Any) -> Any:
    """Say how Orbax is to lay out what it reads for this leaf."""
    data = _data(leaf)
    if _is_local(leaf):
        shape = (jax.process_count(), math.prod(data.shape) * data.dtype.itemsize)
        return jax.ShapeDtypeStruct(shape, np.uint8, sharding=_process_sharding())
    if isinstance(leaf, np.ndarray | np.generic):
        return np.empty(data.shape, data.dtype)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=data.sharding)


def _from_array(read: Any, like: Any, record: dict[str, Any]) -> Any:
    if _is_number(like):
        return record["value"]
    data = _data(like)
    if read is None:
        read = np.zeros(data.shape, data.dtype)
    elif _is_local(like):
        row = np.asarray(read.addressable_shards[0].data)[0]
        read = np.array(row).view(data.dtype).reshape(data.shape)
    if isinstance(like, np.ndarray | np.generic):
        return np.asarray(read)
    sharding: Sharding | None = like.sharding
    if isinstance(like, jax.Array) and not like.committed:
        # An array tied to no device must not come back tied to one.
        sharding, read = None, np.asarray(read)
    value = jnp.asarray(read)
    if _is_key(like):
        value = jax.random.wrap_key_data(value, impl=record["impl"])
    return value if sharding is None else jax.device_put(value, sharding)


def _remove(folder: Path) -> None:
    # Renamed first: a kill while files go must not leave a step that looks complete.
    doomed = folder.with_name(f"{folder.name}.removed{_UNFINISHED}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _barrier(name: str) -> None:
    """Wait for all processes without touching a device, so no collective can be out of order."""
    if jax.process_count() > 1:
        import asyncio

        from orbax.checkpoint import v1

        asyncio.run(v1.multihost.sync_global_processes(name, operation_id="jaxsys"))


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """Import Orbax and silence it: it warns of its own deprecations and logs every save."""
    logger = logging.getLogger("absl")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from orbax.checkpoint import v1

        logger.setLevel(logging.ERROR)
        try:
            yield v1
        finally:
            logger.setLevel(level)
