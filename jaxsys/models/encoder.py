"""What encoders share: attention that needs no cache, tensors on disk, packages that hold weights.

An encoder's parameters are a nested dict whose dotted paths are its checkpoint's tensor names, as
with language models (`jaxsys.models.lm`), so that LoRA, merging and quantisation address them in
the same way.
"""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxsys.core import report
from jaxsys.core.checkpoint import write_safetensors
from jaxsys.core.errors import UserError
from jaxsys.core.tree import flatten, path_key, unflatten
from jaxsys.models.lm.attention import attend
from jaxsys.models.lm.layout import subtree
from jaxsys.models.lm.linear import ACTIVATIONS, linear
from jaxsys.models.lm.load import compare

Shapes = dict[str, tuple[int, ...]]
_MOST_TOKENIZER_BYTES = 1 << 28

ACTIVATION = ACTIVATIONS | {"quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x)}


class Projections(NamedTuple):
    """Name the four linear modules of an attention within its block.

    >>> Projections("q", "k", "v", "out").out
    'out'
    """

    q: str
    k: str
    v: str
    out: str


def self_attention(
    params: Mapping[str, Any],
    names: Projections,
    x: Float[Array, "B T D"],
    heads: int,
    keep: Bool[Array, "B T T"],
) -> Float[Array, "B T D"]:
    """Let every token attend to those that it may see: softmax(q · k / √(D / H)) v, projected.

    Args:
        params: the block's subtree.
        names: of the four modules in it.
        x: what the block's attention reads.
        heads: H.
        keep: whether token i (second axis) may attend to token j (third).

    Returns:
        What the output projection gives.

    >>> eye = {name: {"weight": jnp.eye(4)} for name in "qkvo"}
    >>> x = jnp.ones((1, 3, 4))
    >>> keep = jnp.ones((1, 3, 3), bool)
    >>> jax.eval_shape(lambda: self_attention(eye, Projections(*"qkvo"), x, 2, keep)).shape
    (1, 3, 4)
    """
    b, t, _ = x.shape
    q, k, v = (linear(subtree(params, name), x).reshape(b, t, heads, -1) for name in names[:3])
    mixed = attend(q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), keep)
    return linear(subtree(params, names.out), mixed.reshape(b, t, -1))


def unit(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Scale vectors to length 1: x / ‖x‖; a vector of zeros stays what it is, its gradient finite.

    >>> np.asarray(unit(jnp.array([[3.0, 4.0], [0.0, 0.0]]))).round(2)
    array([[0.6, 0.8],
           [0. , 0. ]], dtype=float32)
    """
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def draw(key: Array, shapes: Mapping[str, tuple[int, ...]], std: float = 0.02) -> dict[str, Any]:
    """Draw fresh parameters: N(0, σ²), biases 0, gains of normalisations 1.

    Each tensor's key is folded from its own name, so its value does not depend on the others.

    Args:
        key: random key.
        shapes: name to shape.
        std: σ.

    Returns:
        Nested dict of float32 arrays.

    >>> params = draw(jax.random.key(0), {"norm.weight": (2,), "norm.bias": (2,)})
    >>> params["norm"]["weight"].tolist(), params["norm"]["bias"].tolist()
    ([1.0, 1.0], [0.0, 0.0])
    """

    def one(name: str, shape: tuple[int, ...]) -> Array:
        if name.endswith("bias"):
            return jnp.zeros(shape)
        if len(shape) == 1 and name.endswith(".weight"):
            return jnp.ones(shape)
        return std * jax.random.normal(path_key(key, name), shape)

    return unflatten({name: one(name, shape) for name, shape in shapes.items()})


def to_tree(
    tensors: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
    kind: str,
    dtype: Any = None,
) -> dict[str, Any]:
    """Check the tensors of a checkpoint and put them on the device as a tree.

    Args:
        tensors: name to array.
        shapes: name to shape, all that there should be.
        where: the file, for a message.
        kind: what it should hold, for a message.
        dtype: of the parameters; None keeps the file's.

    Returns:
        Nested dict in the order of `shapes`.

    Raises:
        UserError: naming tensors that are missing, superfluous or of another shape.

    >>> to_tree({"a.b": np.ones(2)}, {"a.b": (2,)}, "here", "a toy", np.float32)["a"]["b"].dtype
    dtype('float32')
    """
    compare(shapes, {name: tensor.shape for name, tensor in tensors.items()}, where, kind)

    def put(array: Any) -> Array:
        wanted = array.dtype if dtype is None else dtype
        return jax.device_put(np.asarray(array).astype(wanted, copy=False))

    return unflatten({name: put(tensors[name]) for name in shapes})


def save_folder(
    path: str | Path,
    params: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    hf_config: Mapping[str, Any],
    kind: str,
) -> list[Path]:
    """Write ``config.json`` and ``model.safetensors`` as transformers reads them.

    Args:
        path: the folder; it is made where it is absent.
        params: nested dict; adapters must be merged and quantised weights made dense before.
        shapes: name to shape, all that there should be.
        hf_config: the fields of ``config.json``.
        kind: what the tree should hold, for a message.

    Returns:
        The files.

    Raises:
        UserError: when the tensors are not those of `shapes`.

    >>> import tempfile
    >>> tree = {"w": jnp.ones(2)}
    >>> [f.name for f in save_folder(tempfile.mkdtemp(), tree, {"w": (2,)}, {}, "a toy")]
    ['config.json', 'model.safetensors']
    """
    flat = flatten(params)
    compare(shapes, {name: leaf.shape for name, leaf in flat.items()}, "this tree", kind)
    files = write_safetensors(path, flat, flat.__getitem__)
    config = Path(path) / "config.json"
    report.atomic_write(config, json.dumps(hf_config, indent=2) + "\n")
    return [config, *files]


def package_file(module: str, inside: str, distribution: str, remedy: str) -> Path:
    """Find a file that a package carries, without importing the package.

    Args:
        module: its name in Python.
        inside: path of the file or folder within it.
        distribution: its name to pip, for a message.
        remedy: what installs it.

    Raises:
        UserError: if the package is not installed or has no such file.

    >>> package_file("jaxsys", "models", "jaxsys", "").name
    'models'
    """
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise UserError(f"the package {distribution} is not installed; run {remedy}")
    path = Path(found.origin).parent / inside
    if not path.exists():
        raise UserError(f"the package {distribution} has no {inside}; install it again: {remedy}")
    return path


def read_text(path: Path, most_bytes: int = _MOST_TOKENIZER_BYTES) -> str:
    """Read a text file of bounded size.

    Raises:
        UserError: if it is missing, too large, or not UTF-8.

    >>> read_text(Path("nowhere.json"))
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: nowhere.json cannot be read (No such file or directory); ...
    """
    try:
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
        if len(content) > most_bytes:
            raise ValueError(f"more than {most_bytes} bytes")
        return content.decode("utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{path} cannot be read ({reason}); expected a text file; correct the path"
        ) from None


def library() -> Any:
    """Import the tokenizers package.

    Raises:
        UserError: if it is missing.

    >>> library().__name__
    'tokenizers'
    """
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            "this needs the package tokenizers, which is missing; run pip install 'jaxsys[ground]'"
        ) from None
    return tokenizers
