"""Put a model's tensors where a plan wants them, before the first token.

What the CPU computes, and what is copied over per use, stays a view of the mapped file where its
alignment allows (files that `lm.save` or `jaxsys lm convert` wrote; others are copied). The down
matrix of a part that is cut is copied piece by piece, for its columns do not lie together.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsys.core.checkpoint import SafetensorsHeader, read_header
from jaxsys.core.errors import UserError
from jaxsys.core.tree import unflatten
from jaxsys.models import lm
from jaxsys.models.lm.families import layout_of
from jaxsys.models.lm.gguf import HfTensors
from jaxsys.models.lm.layout import join, subtree
from jaxsys.models.quantise import QuantisedInt8, quantise_int8, weights
from jaxsys.offload.layers import cut, ffn_names
from jaxsys.offload.monitor import is_mapped, tree_bytes
from jaxsys.offload.parts import part_names
from jaxsys.offload.place import Devices, Role, check_plan, slices
from jaxsys.offload.types import Plan

OpenFile = tuple[Path, int, int]  # with its size and inode when it was opened


class Loaded(NamedTuple):
    """Hold weights that are used together, and say where they are.

    Attributes:
        weights: a tree on one device.
        role: resident (on the accelerator), stream (in the CPU's memory, copied over per use) or
            cpu.
        n_bytes: of the weights.

    >>> Loaded({}, "cpu", 0).role
    'cpu'
    """

    weights: Any
    role: Role
    n_bytes: int


class Layer(NamedTuple):
    """Hold one layer.

    Attributes:
        half: attention, norms and router; None where ``whole`` is there.
        ffn: expert (-1 for a dense block) to its pieces; empty where ``whole`` is there.
        whole: the layer's tree where all of it is on the device of its cache.
        cache_on: whether that is the accelerator.

    >>> Layer(None, {}, None, False).ffn
    {}
    """

    half: Loaded | None
    ffn: Mapping[int, tuple[Loaded, ...]]
    whole: Loaded | None
    cache_on_accelerator: bool


class Placed(NamedTuple):
    """Hold a model whose tensors are where the plan wants them.

    Attributes:
        config: the model.
        plan: the plan.
        devices: of the run.
        embed: table of tokens (and positions).
        layers: all of them.
        head: last norm and output matrix.
        tree: the whole tree, where the run has one device only.
        mapped_bytes: of the CPU's weights, those that are views of the file.
        copied_bytes: of the CPU's weights, those that are copies.
        files: the mapped files, their sizes and inodes.
        dtype: of activations and cache.

    >>> Placed._fields[:3]
    ('config', 'plan', 'devices')
    """

    config: lm.LMConfig
    plan: Plan
    devices: Devices
    embed: Loaded
    layers: tuple[Layer, ...]
    head: Loaded
    tree: Any
    mapped_bytes: int
    copied_bytes: int
    files: tuple[OpenFile, ...]
    dtype: Any

    def home(self, layer: Layer) -> Any:
        """Give the device on which a layer's attention runs."""
        device = self.devices.accelerator
        return device if layer.cache_on_accelerator and device is not None else self.devices.cpu

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights that live on the accelerator, an embedding that is shared once."""
        arrays = {
            id(leaf): leaf.nbytes
            for part in _loaded(self)
            if part.role == "resident"
            for leaf in jax.tree.leaves(part.weights)
        }
        return sum(arrays.values())


def _loaded(placed: Placed) -> Iterator[Loaded]:
    yield placed.embed
    for layer in placed.layers:
        yield from (part for part in (layer.half, layer.whole) if part is not None)
        for pieces in layer.ffn.values():
            yield from pieces
    yield placed.head


def open_model(
    source: str | Path | Mapping[str, Any], config: lm.LMConfig | None = None
) -> tuple[lm.LMConfig, Mapping[str, Any], tuple[OpenFile, ...]]:
    """Open a model for `place_model`, reading no weight.

    Args:
        source: what `lm.load` takes, or a tree of parameters, quantised or not.
        config: with a tree, its model.

    Returns:
        The model, its tensors by name, and the files behind them with their sizes and inodes.

    Raises:
        UserError: as `lm.open_tensors`, or a tree without a config.

    >>> config = lm.LMConfig("llama", 97, 32, 1, 4, 2, 8, 48, 64)
    >>> len(open_model(lm.init(jax.random.key(0), config), config)[1])
    12
    """
    if isinstance(source, Mapping):
        if config is None:
            raise UserError("a tree of parameters came without its config; pass config=")
        return config, weights(source), ()
    config, tensors = lm.open_tensors(source)
    path = Path(source)
    header: SafetensorsHeader | None = read_header(path) if path.is_dir() else None
    files = header.files if header else (path,)
    stats = [(file, file.stat()) for file in files]
    return config, tensors, tuple((file, s.st_size, s.st_ino) for file, s in stats)


def tensor_bytes(
    tensors: Mapping[str, Any], *, dtype: Any = None, int8: bool = False
) -> dict[str, int]:
    """Count the bytes that tensors will take, for `parts_of`.

    Args:
        tensors: by name, as from `open_model`.
        dtype: that they are to have; None keeps theirs.
        int8: matrices of layers are to be quantised; see `place_model`.

    Returns:
        Bytes by name.

    >>> tensor_bytes({"model.layers.0.up.weight": np.zeros((2, 8), np.float32)}, int8=True)
    {'model.layers.0.up.weight': 24}
    """
    known = tensors if isinstance(tensors, HfTensors) else None
    found = {}
    for name in tensors:
        tensor: Any = None if known else tensors[name]  # a GGUF file's would be made for this
        shape = known.shapes[name] if known else tensor.shape
        if isinstance(tensor, QuantisedInt8):
            found[name] = tree_bytes(tensor)
        elif int8 and _is_coded(name, len(shape)):
            found[name] = shape[0] * shape[1] + 4 * shape[0]
        else:
            own = known.dtypes[name] if known else tensor.dtype
            found[name] = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype or own).itemsize
    return found


def _is_coded(name: str, axes: int) -> bool:
    # As `models.quantise.quantise` chooses: matrices in numbered blocks, routers excepted.
    inside = any(part.isdigit() for part in name.split("."))
    return inside and axes == 2 and not name.endswith((".gate.weight", ".router.weight"))


def place_model(
    source: str | Path | Mapping[str, Any],
    plan: Plan,
    devices: Devices,
    *,
    config: lm.LMConfig | None = None,
    dtype: Any = None,
    int8: bool = False,
    fixed: bool = True,
) -> Placed:
    """Load a model as planned.

    Args:
        source: what `lm.load` takes, or a tree of parameters.
        plan: where everything goes.
        devices: of the run.
        config: with a tree, its model.
        dtype: of the parameters; None keeps theirs. Anything else copies.
        int8: round the matrices of layers (routers excepted) to 8 bits with a scale for each
            output while they are loaded.
        fixed: nothing changes its place. False keeps every expert in the CPU's memory, as whole as
            the plan cuts it, and runs every mixture layer in parts: what a cache of experts and a
            record of their use need.

    Returns:
        The placed model.

    Raises:
        UserError: as `open_model` and `check_plan`.

    >>> from jaxsys.offload.parts import parts_of
    >>> from jaxsys.offload.place import cpu_plan, find_devices
    >>> config = lm.LMConfig("llama", 97, 32, 1, 4, 2, 8, 48, 64)
    >>> params = lm.init(jax.random.key(0), config)
    >>> placed = place_model(params, cpu_plan(parts_of(config)), find_devices("none"),
    ...                      config=config)
    >>> placed.resident_bytes, placed.mapped_bytes
    (0, 0)
    """
    config, tensors, files = open_model(source, config)
    where = check_plan(plan, config, devices)
    loader = _Loader(config, plan, devices, tensors, where, dtype, int8, fixed)
    # The head first: a tied embedding uses its matrix.
    head = loader.head()
    embed = loader.embed(head)
    layers = tuple(loader.layer(i) for i in range(config.layers))
    tree = None
    if all(layer.whole is not None for layer in layers) and devices.accelerator is None:
        tree = unflatten(loader.held)
    return Placed(
        config,
        plan,
        devices,
        embed,
        layers,
        head,
        tree,
        loader.mapped_bytes,
        loader.copied_bytes,
        files,
        _activations(embed),
    )


def _activations(embed: Loaded) -> Any:
    leaves = jax.tree.leaves(embed.weights)
    return next(x.dtype for x in leaves if jax.numpy.issubdtype(x.dtype, jax.numpy.floating))


class _Loader:
    """Put tensors on devices one part at a time, counting what is copied."""

    def __init__(self, config, plan, devices, tensors, where, dtype, int8, fixed):
        self.config, self.plan, self.devices = config, plan, devices
        self.tensors, self.where, self.dtype, self.int8 = tensors, where, dtype, int8
        self.fixed = fixed
        self.names = part_names(config)
        self.held: dict[str, Any] = {}  # with one device: every tensor, for the whole program
        self.mapped_bytes = self.copied_bytes = 0

    def read(self, name: str) -> Any:
        """Give a tensor on the host in its final form."""
        tensor = self.tensors[name]
        if hasattr(tensor, "matmul"):
            return tensor
        if self.int8 and _is_coded(name, tensor.ndim):
            in_out = layout_of(self.config).in_out
            with jax.default_device(self.devices.cpu):
                return jax.jit(quantise_int8, static_argnames="in_out")(
                    np.asarray(tensor), in_out=in_out
                )
        if self.dtype is not None and tensor.dtype != self.dtype:
            return np.asarray(tensor).astype(self.dtype)
        return tensor

    def put(self, tree: Any, role: Role) -> Loaded:
        """Put a part's weights where its role wants them."""
        device = self.devices.accelerator if role == "resident" else self.devices.cpu

        def one(leaf: Any) -> Any:
            if not isinstance(leaf, jax.Array) and not leaf.flags["C_CONTIGUOUS"]:
                leaf = np.ascontiguousarray(leaf)
            array = jax.device_put(leaf, device)
            if role != "resident":
                mapped = is_mapped(array, leaf)
                self.mapped_bytes += leaf.nbytes * mapped
                self.copied_bytes += leaf.nbytes * (not mapped)
            return array

        placed = jax.tree.map(one, tree)
        return Loaded(placed, role, tree_bytes(placed))

    def part(self, key: Any) -> Loaded:
        """Load an uncuttable part as a nested tree of full names."""
        [own] = slices(self.plan, self.where[key])
        return self.named(self.names[key], own.role)

    def named(self, names: Any, role: Role) -> Loaded:
        placed = {name: self.put(self.read(name), role) for name in names}
        flat = {name: part.weights for name, part in placed.items()}
        if self.devices.accelerator is None:
            self.held |= flat
        return Loaded(unflatten(flat), role, sum(part.n_bytes for part in placed.values()))

    def head(self) -> Loaded:
        [own] = slices(self.plan, self.where[-1, "head", -1])
        names = self.names[-1, "norms", -1] + self.names[-1, "head", -1]
        return self.named(names, own.role)

    def embed(self, head: Loaded) -> Loaded:
        names = self.names[-1, "embed", -1]
        if not self.config.tied:
            return self.part((-1, "embed", -1))
        # The table is the head's: what is looked up is looked up where that is.
        table = f"{join(self.config.prefix, layout_of(self.config).embed)}.weight"
        own = self.named(names, head.role)
        flat = weights(own.weights) | {table: subtree(head.weights, table)}
        return Loaded(unflatten(flat), head.role, own.n_bytes)

    def layer(self, i: int) -> Layer:
        config, prefix = self.config, lm.layer_prefix(self.config, i)
        on_accelerator = self.plan.cache_on[i] == "accelerator"
        experts = range(config.experts) if config.is_sparse(i) else (-1,)
        kind = "expert" if config.is_sparse(i) else "mlp"
        half = self.part((i, "attention", -1))
        cuts = {e: slices(self.plan, self.where[i, kind, e]) for e in experts}
        together = "resident" if on_accelerator else "cpu"
        roles = {own.role for pieces in cuts.values() for own in pieces} | {half.role}
        half = half._replace(weights=subtree(half.weights, prefix))
        if roles == {together} and (self.fixed or kind == "mlp"):
            return self._whole(i, half, cuts, kind)
        in_out = layout_of(config).in_out
        ffn = {}
        for e, pieces in cuts.items():
            part = self._part_tree(i, e)
            whole = len(pieces) == 1
            if whole and kind == "expert" and not self.fixed:
                pieces = (pieces[0]._replace(role="cpu"),)
            ffn[e] = tuple(
                self.put(part if whole else cut(part, s.start, s.stop, in_out=in_out), s.role)
                for s in pieces
            )
        return Layer(half, ffn, None, on_accelerator)

    def _whole(self, i: int, half: Loaded, cuts: Any, kind: str) -> Layer:
        prefix = lm.layer_prefix(self.config, i)
        flat, n_bytes = weights(half.weights), half.n_bytes
        for e in cuts:
            own = self.named(self.names[i, kind, e], half.role)
            flat |= weights(subtree(own.weights, prefix))
            n_bytes += own.n_bytes
        whole = Loaded(unflatten(flat), half.role, n_bytes)
        return Layer(None, {}, whole, half.role == "resident")

    def _part_tree(self, i: int, e: int) -> dict[str, dict[str, Any]]:
        prefix = lm.layer_prefix(self.config, i)
        tree: dict[str, dict[str, Any]] = {}
        for role, path in ffn_names(self.config, i, e).items():
            name = f"{prefix}.{path}"
            tree[role] = {"weight": self.read(f"{name}.weight")}
            if f"{name}.bias" in self.tensors:
                tree[role]["bias"] = self.read(f"{name}.bias")
        return tree


def check_files(files: Sequence[OpenFile]) -> None:
    """Refuse to go on where a mapped file has been cut.

    Reading a page behind the new end of a file would end the process, so this is looked at before
    every step; a file that is cut during a step cannot be caught. A file that was deleted or
    replaced as a whole does no harm: the mapping keeps the old one.

    Args:
        files: of a placed model.

    Raises:
        UserError: naming the file.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "model"
    >>> _ = file.write_bytes(b"ab")
    >>> check_files(((file, 3, file.stat().st_ino),))
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: ...model has 2 bytes and had 3 when it was opened; ...
    """
    for file, size, inode in files:
        try:
            now = file.stat()
        except OSError:
            continue
        if now.st_ino == inode and now.st_size < size:
            raise UserError(
                f"{file} has {now.st_size} bytes and had {size} when it was opened; expected a "
                "file that stays whole while a model runs from it; write it again and start anew"
            )
