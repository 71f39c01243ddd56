"""Second moments of the keys, C_l = E[k kᵀ]: what a layer's matrix multiplies in ordinary text."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from jaxsys.core.checkpoint import read_safetensors, write_safetensors
from jaxsys.core.checkpoint.safetensors import read_header
from jaxsys.core.errors import UserError
from jaxsys.core.mesh import replica_mesh
from jaxsys.core.tree import fingerprint
from jaxsys.edit.contract import Editable
from jaxsys.edit.editable import down_name
from jaxsys.edit.solves import factorise
from jaxsys.models import lm

FLUSH = 32  # batches summed in float32 before they are added in float64


@dataclass(frozen=True, eq=False)
class Statistics:
    """Hold the uncentred second moments of the keys of some layers.

    Attributes:
      moments: layer to C, [F, F] float32.
      tokens: how many were averaged.
      model: fingerprint of the parameters they were taken with, see `model_fingerprint`.
      data: hash of the token ids.

    >>> Statistics({3: np.eye(2, dtype=np.float32)}, 10).moment(3).shape
    (2, 2)
    """

    moments: dict[int, Any]
    tokens: int
    model: str = ""
    data: str = ""
    # What is derived from the moments alone, kept because it is dear; it changes no result.
    _derived: dict[Any, Any] = field(default_factory=dict, repr=False)

    def moment(self, layer: int) -> Float[np.ndarray, "F F"]:
        """Give C of a layer.

        Raises:
          UserError: if it was not taken.
        """
        if layer not in self.moments:
            known = ", ".join(str(i) for i in sorted(self.moments)) or "none"
            raise UserError(
                f"the statistics hold layers {known}, and layer {layer} is edited; make them with "
                f"jaxsys edit stats MODEL --layers {layer} --text FILE"
            )
        return np.asarray(self.moments[layer])

    def factor(self, layer: int) -> Any:
        """Give the factor of C that `solves.solve` takes, computed once."""
        return self.derive(("factor", layer), lambda: factorise(self.moment(layer)))

    def derive(self, key: Any, make: Callable[[], Any]) -> Any:
        """Compute something from the moments once.

        Args:
          key: says what; the same key must always mean the same.
          make: computes it.
        """
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]


def need(stats: Statistics | None, method: str, layers: Sequence[int]) -> Statistics:
    """Refuse to go on without the statistics that a method needs.

    Raises:
      UserError: saying how to make them.

    >>> need(None, "MEMIT", (3, 4))
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: MEMIT got no statistics of the keys of layers 3 4; make them ...
    """
    if stats is None:
        wanted = " ".join(str(i) for i in layers)
        raise UserError(
            f"{method} got no statistics of the keys of layers {wanted}; make them with "
            f"jaxsys edit stats MODEL --layers {wanted} --text FILE"
        )
    for layer in layers:
        stats.moment(layer)
    return stats


def model_fingerprint(params: Any) -> str:
    """Hash all parameters, to know whether statistics belong to a model.

    >>> model_fingerprint({"w": np.zeros(2)}) == model_fingerprint({"w": np.ones(2)})
    False
    """
    text = json.dumps(fingerprint(params), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def check_model(stats: Statistics, params: Any) -> None:
    """Refuse statistics of another model; call it with the parameters before any edit.

    Raises:
      UserError: naming both fingerprints.

    >>> check_model(Statistics({}, 1, model_fingerprint({"w": np.ones(1)})), {"w": np.ones(1)})
    """
    found = model_fingerprint(params)
    if stats.model and stats.model != found:
        raise UserError(
            f"the statistics are those of a model with fingerprint {stats.model}, and this one's "
            f"is {found}; make new ones with jaxsys edit stats MODEL --text FILE"
        )


def windows(tokens: Sequence[int] | np.ndarray, rows: int, length: int) -> Iterable[np.ndarray]:
    """Cut a text into batches [rows, length], leaving out what does not fill a row.

    A last batch that is not full is padded with rows of -1, which count for nothing.

    >>> [batch.tolist() for batch in windows(range(7), 2, 2)]
    [[[0, 1], [2, 3]], [[4, 5], [-1, -1]]]
    """
    ids = np.asarray(tokens, np.int32)
    whole = ids[: ids.size // length * length].reshape(-1, length)
    for first in range(0, len(whole), rows):
        batch = whole[first : first + rows]
        missing = rows - len(batch)
        yield np.concatenate([batch, np.full((missing, length), -1, np.int32)])


def collect(
    model: Editable,
    params: Any,
    batches: Iterable[np.ndarray],
    layers: Sequence[int],
    *,
    mesh: Mesh | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Statistics:
    """Average k kᵀ over the tokens of a text, over all devices of a mesh and all its hosts.

    Only the blocks up to the highest layer run. Sums are taken in float32 within a batch and over
    `FLUSH` batches, in float64 beyond.

    Args:
      model: the model; its configuration is used.
      params: its parameters.
      batches: token ids [B, T], -1 for padding on the right of a row; on several hosts each gives
        its own part of the text, as many batches of one shape, B divisible by its devices.
      layers: whose keys are wanted.
      mesh: with one axis; all devices by default. Parameters are copied to each.
      on_batch: called with the number of tokens so far.

    Returns:
      `Statistics`, the same on every host.

    Raises:
      UserError: without a token or a layer.

    >>> config = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> params = lm.init(jax.random.key(0), config)
    >>> batch, mesh = np.ones((2, 8), np.int32), replica_mesh(jax.devices()[:1])
    >>> collect(Editable(config, None), params, [batch], (0,), mesh=mesh).moment(0).shape
    (48, 48)
    """
    layers = tuple(sorted(set(layers)))
    if not layers:
        raise UserError("no layer is named; expected those whose keys are wanted; name some")
    names = tuple(f"{down_name(model.config, layer)}:in" for layer in layers)
    mesh = replica_mesh() if mesh is None else mesh
    params = _everywhere(params, mesh)
    add = _adder(model.config, layers, names, mesh)
    sums, count, totals = None, 0, None
    digest = hashlib.blake2b(digest_size=8)
    for number, batch in enumerate(batches):
        digest.update(np.ascontiguousarray(batch, np.int32).tobytes())
        rows = jax.make_array_from_process_local_data(
            NamedSharding(mesh, P(mesh.axis_names[0])), np.asarray(batch, np.int32)
        )
        sums = add(params, rows) if sums is None else add(params, rows, sums)
        if number % FLUSH == FLUSH - 1:
            totals, sums = _flush(totals, sums), None
        count += int(np.sum(np.asarray(batch) >= 0)) * jax.process_count()
        if on_batch:
            on_batch(count)
    if sums is not None:
        totals = _flush(totals, sums)
    if totals is None or not totals[1]:
        raise UserError("the text has no token; expected some; give a longer text")
    moments = {
        layer: (total / totals[1]).astype(np.float32)
        for layer, total in zip(layers, totals[0], strict=True)
    }
    return Statistics(
        moments, int(totals[1]), model_fingerprint(_local(params)), digest.hexdigest()
    )


def _everywhere(params: Any, mesh: Mesh) -> Any:
    sharding = NamedSharding(mesh, P())
    if jax.process_count() == 1:
        return jax.device_put(params, sharding)
    put = partial(jax.make_array_from_process_local_data, sharding)
    return jax.tree.map(lambda x: put(np.asarray(x)), params)


def _local(params: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x.addressable_shards[0].data), params)


def _flush(totals, sums):
    own = [np.asarray(x.addressable_shards[0].data, np.float64) for x in sums[0]]
    count = float(np.asarray(sums[1].addressable_shards[0].data))
    if totals is None:
        return own, count
    return [a + b for a, b in zip(totals[0], own, strict=True)], totals[1] + count


def _adder(config: Any, layers: tuple[int, ...], names: tuple[str, ...], mesh: Mesh):
    axis = mesh.axis_names[0]

    def one(params: Any, rows: jax.Array, *before: Any) -> Any:
        real = rows >= 0
        x = lm.embed(params, config, jnp.maximum(rows, 0))
        moments = []
        for i in range(layers[-1] + 1):
            taps = (names[layers.index(i)],) if i in layers else ()
            x, _, found = lm.block(lm.layer(params, config, i), config, i, x, taps=taps)
            if taps:
                k = found[taps[0]].astype(jnp.float32) * real[..., None]
                k = k.reshape(-1, k.shape[-1])
                moments.append(jnp.einsum("ni,nj->ij", k, k, precision=jax.lax.Precision.HIGHEST))
        new = jax.lax.psum((moments, jnp.sum(real, dtype=jnp.float32)), axis)
        return jax.tree.map(jnp.add, before[0], new) if before else new

    def add(params: Any, rows: jax.Array, *before: Any) -> Any:
        specs = (P(), P(axis), *([P()] * len(before)))
        mapped = jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
        return mapped(params, rows, *before)

    return jax.jit(add)


def null_space(
    moment: Float[np.ndarray, "F F"], threshold: float | int = 0.02, *, relative: bool = False
) -> Float[np.ndarray, "F Q"]:
    """Find the directions that the keys of ordinary text hardly have; P = U Uᵀ projects on them.

    Args:
      moment: C.
      threshold: eigenvectors whose eigenvalue is below it are taken (0.02 as AlphaEdit does).
      relative: it is a share of the mean eigenvalue, for models whose keys are of another size.

    Returns:
      U, orthonormal columns.

    Raises:
      UserError: if no direction is left.

    Reference:
      arXiv 2410.02355, section 3.2 and appendix.

    >>> null_space(np.diag([1.0, 0.001]).astype(np.float32))
    array([[0.],
           [1.]], dtype=float32)
    """
    values, vectors = np.linalg.eigh(np.asarray(moment, np.float64))
    most = threshold * values.mean() if relative else threshold
    u = vectors[:, values < most]
    if not u.shape[1]:
        raise UserError(
            f"no eigenvalue of the keys' second moment is below {most:.3g}, the least being "
            f"{values[0]:.3g}; AlphaEdit would change nothing; raise the threshold"
        )
    return u.astype(np.float32)


def save(path: str | Path, stats: Statistics) -> list[Path]:
    """Write statistics as safetensors in a folder.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> _ = save(folder, Statistics({3: np.eye(2, dtype=np.float32)}, 10, "m", "d"))
    >>> load(folder).tokens
    10
    """
    arrays = {f"moment.{layer}": np.asarray(c) for layer, c in stats.moments.items()}
    metadata = {"tokens": str(stats.tokens), "model": stats.model, "data": stats.data}
    return write_safetensors(path, arrays, arrays.__getitem__, metadata=metadata)


def load(path: str | Path) -> Statistics:
    """Read statistics that `save` wrote.

    Args:
      path: the folder or the file in it.

    Raises:
      UserError: for what holds none.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> _ = save(folder, Statistics({3: np.eye(2, dtype=np.float32)}, 10))
    >>> sorted(load(folder).moments)
    [3]
    """
    tensors = read_safetensors(path)
    path = Path(path)
    fields = read_header(path / "model.safetensors" if path.is_dir() else path).metadata
    layers = {name.removeprefix("moment."): tensor for name, tensor in tensors.items()}
    square = all(t.ndim == 2 and t.shape[0] == t.shape[1] for t in tensors.values())
    if not square or not all(i.isdigit() for i in layers) or not fields.get("tokens", "").isdigit():
        raise UserError(
            f"{path} holds no statistics of keys; expected a folder that jaxsys edit stats wrote; "
            "correct the path or make them"
        )
    moments = {int(i): tensor for i, tensor in layers.items()}
    return Statistics(
        moments, int(fields["tokens"]), fields.get("model", ""), fields.get("data", "")
    )
