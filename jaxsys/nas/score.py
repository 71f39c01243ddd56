"""Score many architectures with many proxies in one compiled program, resumable.

Architectures are data: `lax.map` (one after the other, each running only its own operations; right
on a CPU) or `vmap` (all at once, right on an accelerator), in blocks that bound memory, spread over
the devices of this process and over processes. Each block is written as it is done, so a killed run
goes on.
"""

import io
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxsys.core.errors import UserError
from jaxsys.core.mesh import on_cpu, replica_mesh
from jaxsys.core.report import atomic_write
from jaxsys.nas import proxies, proxies_activation
from jaxsys.nas.model import Model
from jaxsys.nas.proxies import Score

# Each entry may give several proxies that share their work.
GROUPS: dict[str, tuple[str, ...]] = {
    "gradient_scores": ("grad_norm", "snip", "plain"),
    "az_parts": ("az_expressivity", "az_progressivity", "az_trainability"),
}
_SINGLE = {
    "params": proxies.params,
    "flops": proxies.flops,
    "l2_norm": proxies.l2_norm,
    "grasp": proxies.grasp,
    "fisher": proxies.fisher,
    "synflow": proxies.synflow,
    "zico": proxies.zico,
    "jacob_cov": proxies_activation.jacob_cov,
    "epe_nas": proxies_activation.epe_nas,
    "naswot": proxies_activation.naswot,
    "zen": proxies_activation.zen,
    "meco": proxies_activation.meco,
}
PROXIES = (*_SINGLE, *GROUPS["gradient_scores"], *GROUPS["az_parts"])


@dataclass(frozen=True)
class ScoreConfig:
    """Say what is computed.

    Attributes:
      proxies: names out of `PROXIES`.
      seeds: numbers of the initialisations; every architecture starts from the same ones.

    >>> ScoreConfig(("snip",)).seeds
    (0,)
    """

    proxies: tuple[str, ...] = ("synflow", "snip", "grad_norm")
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        unknown = [name for name in self.proxies if name not in PROXIES]
        if unknown or not self.proxies or not self.seeds:
            what = repr(unknown[0]) if unknown else "an empty list of proxies or seeds"
            raise UserError(
                f"{what} was asked for; expected proxies out of {', '.join(PROXIES)} and at least "
                "one seed; correct the list"
            )


class Scores(NamedTuple):
    """Proxies of N architectures with K seeds.

    Attributes:
      totals: name -> `[N, K]`.
      nodes: name -> `[N, K, S]`; proxies without parts are missing.

    >>> Scores({"snip": np.ones((3, 1))}, {}).totals["snip"].shape
    (3, 1)
    """

    totals: dict[str, np.ndarray]
    nodes: dict[str, np.ndarray]


def score(
    model: Model, theta: Any, images: Any, labels: Any, key: Any, names: Sequence[str]
) -> dict[str, Score]:
    """Score one network.

    Args:
      model: the network.
      theta: its parameters.
      images: `[B, Y, X, C]`.
      labels: `[B]`.
      key: for proxies that draw their own input.
      names: out of `PROXIES`.

    Returns:
      Name -> score.

    >>> from jaxsys.nas.model import any_model
    >>> m = any_model(lambda k: jnp.ones((3, 2)), lambda p, x: x @ p)
    >>> list(score(m, jnp.ones((3, 2)), None, None, None, ["params", "l2_norm"]))
    ['params', 'l2_norm']
    """
    arguments = (model, theta, images, labels, key)
    found: dict[str, Score] = {}
    for group, members in GROUPS.items():
        if set(members) & set(names):
            source = proxies if group == "gradient_scores" else proxies_activation
            found |= getattr(source, group)(*arguments)
    return {n: found[n] if n in found else _SINGLE[n](*arguments) for n in names}


def score_block(
    make: Callable[[Any], Model],
    config: ScoreConfig,
    batching: Literal["map", "vmap"] | None = None,
) -> Callable[..., Any]:
    """Compile the scoring of a block of architectures.

    Args:
      make: architecture (traced) -> model.
      config: what is computed.
      batching: how architectures are batched; by the backend if left out.

    Returns:
      `(archs [N, ...], images, labels) -> {name: (total [N, K], nodes [N, K, S])}`. N must be a
      multiple of the local devices.

    >>> from functools import partial
    >>> from jaxsys.nas.model import cell_model
    >>> from jaxsys.nas.network import NetworkConfig
    >>> make = partial(cell_model, config=NetworkConfig(4, 1))
    >>> fn = score_block(make, ScoreConfig(("params",)))
    >>> archs, images = jnp.zeros((8, 6), jnp.int32), jnp.ones((1, 8, 8, 3))
    >>> total, nodes = fn(archs, images, jnp.zeros(1, int))["params"]
    >>> total.shape, nodes.shape
    ((8, 1), (8, 1, 26))
    """
    batching = batching or ("map" if on_cpu() else "vmap")

    def one(arch: Any, images: Any, labels: Any, seed: Any) -> Any:
        model, key = make(arch), jax.random.key(seed)
        found = score(model, model.init(key), images, labels, key, config.proxies)
        none = jnp.zeros(0)
        return {n: (s.total, none if s.nodes is None else s.nodes) for n, s in found.items()}

    def many(archs: Any, images: Any, labels: Any) -> Any:
        seeds = jnp.array(config.seeds, jnp.uint32)
        per_arch = jax.vmap(one, (None, None, None, 0))
        if batching == "vmap":
            return jax.vmap(per_arch, (0, None, None, None))(archs, images, labels, seeds)

        def over_seeds(arch: Any) -> Any:
            return jax.lax.map(lambda s: one(arch, images, labels, s), seeds)

        return jax.lax.map(over_seeds, archs)

    mesh = replica_mesh(jax.local_devices(), "arch")
    spread = jax.shard_map(
        many, mesh=mesh, in_specs=(P("arch"), P(), P()), out_specs=P("arch"), check_vma=False
    )
    return jax.jit(spread)


def score_all(
    make: Callable[[Any], Model],
    archs: np.ndarray,
    images: np.ndarray,
    labels: np.ndarray,
    config: ScoreConfig,
    *,
    block: int = 64,
    folder: Path | str | None = None,
    batching: Literal["map", "vmap"] | None = None,
    stop: Callable[[int, int], bool] = lambda done, total: False,
) -> Scores | None:
    """Score all architectures block by block; a run that was stopped goes on where it was.

    With several processes each takes every n-th block; they need a folder that all of them see.

    Args:
      make: architecture (traced) -> model.
      archs: `[N, ...]`.
      images: `[B, Y, X, C]`.
      labels: `[B]`.
      config: what is computed.
      block: architectures in one call; bounds memory.
      folder: where blocks are kept until all are done; none are if left out.
      batching: see `score_block`.
      stop: called with the blocks done and their number after each; True ends this run.

    Returns:
      The scores; None if the run was stopped, or other processes are not done yet.

    Raises:
      UserError: if the folder belongs to a run with other settings.

    >>> from functools import partial
    >>> from jaxsys.nas.model import cell_model
    >>> from jaxsys.nas.network import NetworkConfig
    >>> make, x = partial(cell_model, config=NetworkConfig(4, 1)), np.ones((1, 8, 8, 3), np.float32)
    >>> archs = np.zeros((3, 6), np.int32)
    >>> found = score_all(make, archs, x, np.zeros(1, int), ScoreConfig(("params",)), block=8)
    >>> found.totals["params"].shape
    (3, 1)
    """
    devices = jax.local_device_count()
    block = -(-block // devices) * devices
    starts = range(0, len(archs), block)
    kept: dict[int, dict[str, np.ndarray]] = {}
    place = None if folder is None else Path(folder)
    if place is not None:
        _claim(place, config, archs, block, images)
    function = score_block(make, config, batching)
    for i in range(jax.process_index(), len(starts), jax.process_count()):
        if place is not None and (place / f"block-{i:05d}.npz").exists():
            continue
        rows = archs[starts[i] : starts[i] + block]
        padded = np.concatenate([rows, np.repeat(rows[:1], block - len(rows), 0)])
        found = jax.tree.map(np.asarray, function(padded, images, labels))
        flat = {
            f"{name}.{part}": v[: len(rows)]
            for name, pair in found.items()
            for part, v in zip(("total", "nodes"), pair, strict=True)
        }
        if place is None:
            kept[i] = flat
        else:
            write_npz(place / f"block-{i:05d}.npz", flat)
        if stop(i + 1, len(starts)):
            return None
    if place is not None:
        files = [place / f"block-{i:05d}.npz" for i in range(len(starts))]
        if not all(file.exists() for file in files):
            return None
        kept = {i: dict(np.load(file)) for i, file in enumerate(files)}
    joined = {k: np.concatenate([kept[i][k] for i in range(len(starts))]) for k in kept[0]}
    nodes = {n: joined[f"{n}.nodes"] for n in config.proxies if joined[f"{n}.nodes"].size}
    return Scores({n: joined[f"{n}.total"] for n in config.proxies}, nodes)


def write_npz(path: Path | str, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays as a compressed NPZ whose bytes depend on nothing but the arrays.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "a.npz")
    >>> write_npz(path, {"x": np.arange(3)})
    >>> np.load(path)["x"].tolist()
    [0, 1, 2]
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in arrays.items():
            item = io.BytesIO()
            np.lib.format.write_array(item, np.asanyarray(value), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, item.getvalue())
    atomic_write(path, buffer.getvalue())


def _claim(place: Path, config: ScoreConfig, archs: Any, block: int, images: Any) -> None:
    from jaxsys.core.tree import fingerprint

    prints = fingerprint({"archs": np.asarray(archs), "images": np.asarray(images)})
    settings = json.dumps(asdict(config) | {"block": block} | prints, sort_keys=True)
    file = place / "settings.json"
    if file.exists() and file.read_text() != settings:
        raise UserError(
            f"{place} holds blocks of a run with other settings, architectures or images; expected "
            "the same ones; choose another folder or remove it"
        )
    if not file.exists():
        atomic_write(file, settings)
