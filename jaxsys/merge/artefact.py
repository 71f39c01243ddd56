"""A routed merge as one folder: parts and router in safetensors, choices in JSON; never pickle.

``routed.json`` says what is there, ``model.safetensors`` holds the arrays; a model's own
``config.json`` and tokenizer may lie beside them, so that the folder can be run.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.checkpoint import read_safetensors, write_safetensors
from jaxsys.core.compress import BLOCK, Quantized
from jaxsys.core.errors import UserError
from jaxsys.core.report import atomic_write, to_json
from jaxsys.merge.routed import Routed, cost, count_experts
from jaxsys.merge.router import BlendConfig, Router
from jaxsys.merge.sparse import Dense, Indexed, Masked, Part, Unified, experts_of

FILE = "routed.json"
FORMAT = "jaxsys routed merge"
VERSION = 1
_MOST_JSON_BYTES = 1 << 26


class Artefact(NamedTuple):
    """Hold all that a routed merge needs to answer.

    Attributes:
      routed: shared leaves and parts.
      names: of the experts.
      method: which merge it is, such as ``mediator``.
      router: trained head, or None: then the experts' own uncertainty routes, or nothing.
      blend: how a posterior becomes weights.
      temperature: of the posterior from the experts' uncertainty, where there is no head.
      notes: whatever else is worth keeping, as JSON (configuration, conflicts, routed layers).

    >>> Artefact(Routed({"w": jnp.ones(2)}, {}), ("a",), "mediator").router is None
    True
    """

    routed: Routed
    names: tuple[str, ...]
    method: str
    router: Router | None = None
    blend: BlendConfig = BlendConfig()
    temperature: float = 1.0
    notes: Mapping[str, Any] = {}


def save_artefact(folder: str | Path, artefact: Artefact) -> Path:
    """Write the folder.

    Args:
      folder: made if need be; other files in it stay.
      artefact: what to keep.

    Returns:
      The folder.

    Raises:
      UserError: if there are not as many names as experts.

    >>> import tempfile
    >>> made = Artefact(Routed({"w": jnp.ones(2)}, {}), ("a",), "mediator")
    >>> load_artefact(save_artefact(tempfile.mkdtemp(), made)).routed.shared["w"].tolist()
    [1.0, 1.0]
    """
    routed, path = artefact.routed, Path(folder)
    if routed.parts and len(artefact.names) != count_experts(routed):
        raise UserError(
            f"got {len(artefact.names)} names for {count_experts(routed)} experts; name each once"
        )
    arrays = {f"shared.{name}": leaf for name, leaf in routed.shared.items()}
    kinds: dict[str, dict[str, Any]] = {}
    for name, part in routed.parts.items():
        kinds[name] = {"kind": type(part).__name__.lower()}
        arrays |= {f"parts.{name}.{field}": x for field, x in _fields(part).items()}
    if artefact.router is not None:
        arrays |= _router_arrays(artefact.router)
    document = {
        "format": FORMAT,
        "version": VERSION,
        "method": artefact.method,
        "experts": list(artefact.names),
        "parts": kinds,
        "router": None if artefact.router is None else {"layers": len(artefact.router.layers)},
        "blend": dataclasses.asdict(artefact.blend),
        "temperature": artefact.temperature,
        "cost": cost(routed)._asdict(),
        "notes": dict(artefact.notes),
    }
    # The description goes last: a folder that was cut short has none and is refused.
    path.mkdir(parents=True, exist_ok=True)
    (path / FILE).unlink(missing_ok=True)
    write_safetensors(path, arrays, arrays.__getitem__)
    atomic_write(path / FILE, json.dumps(json.loads(to_json(document)), indent=1) + "\n")
    return path


def load_artefact(folder: str | Path) -> Artefact:
    """Read a folder that `save_artefact` wrote, or refuse it.

    Args:
      folder: its path.

    Returns:
      The artefact; on a CPU, its aligned tensors stay memory maps.

    Raises:
      UserError: if files are missing or damaged, or arrays do not fit together.

    >>> load_artefact("nowhere")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: nowhere holds no routed merge ...
    """
    path = Path(folder)
    document = _read(path)
    arrays = read_safetensors(path)
    shared = {
        name.removeprefix("shared."): jax.device_put(leaf)
        for name, leaf in arrays.items()
        if name.startswith("shared.")
    }
    parts: dict[str, Part] = {}
    try:
        for name, told in document["parts"].items():
            prefix = f"parts.{name}."
            own = {n.removeprefix(prefix): x for n, x in arrays.items() if n.startswith(prefix)}
            parts[name] = _part(str(told["kind"]), own)
            _check(name, parts[name], shared)
        routed = Routed(shared, parts)
        names = tuple(str(name) for name in document["experts"])
        if parts and len(names) != count_experts(routed):
            raise ValueError(f"{len(names)} names for {count_experts(routed)} experts")
        router = _router(arrays, document["router"])
        blend = BlendConfig(**document["blend"])
        temperature = float(document["temperature"])
        method, notes = str(document["method"]), dict(document["notes"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} holds no sound routed merge ({str(error)[:200]}); build it anew"
        ) from None
    return Artefact(routed, names, method, router, blend, temperature, notes)


def _read(path: Path) -> dict[str, Any]:
    try:
        with (path / FILE).open("rb") as file:
            text = file.read(_MOST_JSON_BYTES + 1)
        document = json.loads(text) if len(text) <= _MOST_JSON_BYTES else None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError("another file of this name")
        if document.get("version") != VERSION:
            raise ValueError(f"version {document.get('version')} and not {VERSION}")
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)[:100]
        raise UserError(
            f"{path} holds no routed merge ({reason}); expected a folder with {FILE}; "
            "name one that `jaxsys merge route` built"
        ) from None
    return document


def _fields(part: Part) -> dict[str, Any]:
    found = {}
    for field, value in part._asdict().items():
        if isinstance(value, Quantized):
            found |= {"codes": value.codes, "scale": value.scale}
        else:
            found[field] = value
    return found


def _part(kind: str, own: dict[str, np.ndarray]) -> Part:
    put = {field: jax.device_put(x) for field, x in own.items()}
    if kind == "dense":
        return Dense(put["values"])
    if kind == "unified":
        return Unified(put["vector"], put["mask"], put["scale"])
    values = Quantized(put["codes"], put["scale"]) if "codes" in put else put["values"]
    if kind == "masked":
        return Masked(put["mask"], values)
    if kind == "indexed":
        return Indexed(put["indices"], values)
    raise ValueError(f"part kind {kind[:40]!r}")


def _check(name: str, part: Part, shared: Mapping[str, Any]) -> None:
    """Refuse arrays that cannot be of one leaf: they would be read out of bounds, or wrapped."""
    if name not in shared:
        raise ValueError(f"parts of {name[:80]!r}, which has no shared leaf")
    n, leaf = int(np.prod(shared[name].shape)), shared[name]
    experts = experts_of(part)
    mask = getattr(part, "mask", None)
    fits = mask is None or (mask.dtype == jnp.uint8 and mask.shape == (experts, -(-n // 8)))
    if isinstance(part, Dense):
        fits = part.values.shape == (experts, *leaf.shape)
    elif isinstance(part, Unified):
        fits = fits and part.vector.shape == leaf.shape and part.scale.shape == (experts,)
    else:
        kept = _kept(part, n, experts)
        fits = fits and _fits_values(part.values, kept, experts)
    if not fits:
        raise ValueError(f"the parts of {name[:80]!r} do not fit its shape {tuple(leaf.shape)}")


def _kept(part: Masked | Indexed, n: int, experts: int) -> int:
    if isinstance(part, Indexed):
        places = np.asarray(part.indices)
        if places.ndim != 2 or not places.size or places.min() < 0 or places.max() >= n:
            raise ValueError("indices outside their leaf")
        return places.shape[1]
    bits = np.unpackbits(np.asarray(part.mask), axis=1, count=n, bitorder="little").sum(1)
    if len(set(bits.tolist())) != 1 or len(bits) != experts:
        raise ValueError("masks that keep different numbers of entries")
    return int(bits[0])


def _fits_values(values: Any, kept: int, experts: int) -> bool:
    if not isinstance(values, Quantized):
        return values.shape == (experts, kept)
    blocks = -(-kept // BLOCK)
    widths = (BLOCK // 2, BLOCK // 4) if values.codes.dtype == jnp.uint8 else (BLOCK,)
    *rows, width = values.codes.shape
    return tuple(rows) == values.scale.shape == (experts, blocks) and width in widths


def _router_arrays(router: Router) -> dict[str, Any]:
    arrays = {
        "router.mean": router.mean,
        "router.scale": router.scale,
        "router.temperature": jnp.reshape(router.temperature, (1,)),
    }
    for i, (weight, bias) in enumerate(router.layers):
        arrays |= {f"router.{i}.weight": weight, f"router.{i}.bias": bias}
    return arrays


def _router(arrays: Mapping[str, np.ndarray], told: Any) -> Router | None:
    if told is None:
        return None
    layers = []
    for i in range(int(told["layers"])):
        weight, bias = arrays[f"router.{i}.weight"], arrays[f"router.{i}.bias"]
        if weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise ValueError(f"router layer {i} has shapes {weight.shape} and {bias.shape}")
        layers.append((jnp.asarray(weight), jnp.asarray(bias)))
    return Router(
        jnp.asarray(arrays["router.mean"]),
        jnp.asarray(arrays["router.scale"]),
        tuple(layers),
        jnp.asarray(arrays["router.temperature"])[0],
    )
