"""The networks of a MEND editor: made, applied to gradients, written and read.

Reference: arXiv 2110.11309, sections 3.1 and 3.2.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxsys.core.checkpoint import read_header, read_safetensors, write_safetensors
from jaxsys.core.errors import UserError
from jaxsys.core.tree import path_key
from jaxsys.edit.editable import get_matrix
from jaxsys.models import lm
from jaxsys.models.lm.families import layout_of
from jaxsys.models.lm.layout import join

_TINY = 1e-7


class Editor(NamedTuple):
    """Hold an editor network and what it was fed.

    Attributes:
      nets: shape of the matrices, as ``in x out``, to U [2, Z, r], V [2, r, Z] and b [2, Z].
      modes: path of a matrix to a and s, [2, Z] each.
      rates: path of a matrix to α.
      moments: shape of the matrices to the number, mean [Z] and summed squared deviations [Z] of
        the pairs seen.

    >>> Editor({}, {}, {"w": 1e-4}, {}).rates
    {'w': 0.0001}
    """

    nets: dict[str, dict[str, Any]]
    modes: dict[str, dict[str, Any]]
    rates: dict[str, Any]
    moments: dict[str, dict[str, Any]]


class Pairs(NamedTuple):
    """Hold the two factors of a gradient for every token.

    Attributes:
      x: [N, I] inputs.
      delta: [N, O] gradients of the outputs; zero for tokens that no answer depends on.

    >>> Pairs(jnp.ones((1, 2)), jnp.ones((1, 3))).delta.shape
    (1, 3)
    """

    x: Any
    delta: Any


def edited_paths(config: Any, blocks: int = 3) -> dict[str, str]:
    """List the matrices of the last blocks' feed-forward parts, with the points of their inputs.

    Args:
      config: an `LMConfig`.
      blocks: how many; the authors take three.

    Raises:
      UserError: for more blocks than the model has, or mixtures among them.

    >>> config = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> sorted(edited_paths(config, 1))[0]
    'model.layers.1.mlp.down_proj.weight'
    """
    layout, paths = layout_of(config), {}
    if not 1 <= blocks <= config.layers:
        raise UserError(f"blocks is {blocks}; expected 1 to {config.layers}; correct it")
    for i in range(config.layers - blocks, config.layers):
        if config.is_sparse(i):
            raise UserError(
                f"layer {i} of this {config.model_type} model is a mixture of experts, and MEND "
                "edits single matrices; use a dense model, or GRACE, SERAC or IKE"
            )
        for name in filter(None, (layout.gate, layout.up, layout.down)):
            module = join(lm.layer_prefix(config, i), name)
            paths[f"{module}.weight"] = f"{module}:in"
    return paths


def init_editor(key: Array, config: Any, rank: int = 1920, blocks: int = 3) -> Editor:
    """Make an editor that follows the plain gradient with α = 1e-4.

    Args:
      key: random key.
      config: an `LMConfig`.
      rank: r of the networks; the authors take 1920; at most Z is used.
      blocks: see `edited_paths`.

    >>> editor = init_editor(
    ...     jax.random.key(0), lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64), 4, 1)
    >>> sorted(editor.nets), editor.nets["32x48"]["u"].shape
    (['32x48', '48x32'], (2, 80, 4))
    """
    nets, modes, rates, moments = {}, {}, {}, {}
    shapes = lm.shapes(config)
    for path in edited_paths(config, blocks):
        shape = shapes[path].shape
        outputs, inputs = shape[::-1] if layout_of(config).in_out else shape
        name, size = f"{inputs}x{outputs}", inputs + outputs
        if name not in nets:
            r = min(rank, size)
            v = jax.random.normal(path_key(key, name), (2, r, size)) * size**-0.5
            nets[name] = {"u": jnp.zeros((2, size, r)), "v": v, "b": jnp.zeros((2, size))}
            moments[name] = {"n": jnp.zeros(()), "mean": jnp.zeros(size), "m2": jnp.zeros(size)}
        modes[path] = {"scale": jnp.ones((2, size)), "shift": jnp.zeros((2, size))}
        rates[path] = jnp.float32(1e-4)
    return Editor(nets, modes, rates, moments)


def shape_name(params: Any, config: Any, path: str) -> str:
    """Name the network of a matrix by its shape.

    >>> config = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> shape_name({"w": jnp.zeros((48, 32))}, config, "w")
    '32x48'
    """
    outputs, inputs = get_matrix(config, params, path).shape
    return f"{inputs}x{outputs}"


def transform(editor: Editor, path: str, name: str, pairs: Pairs) -> Pairs:
    """Map the pairs of a matrix to those of its edit, x̃ and −α δ̃; tokens without gradient to 0.

    Args:
      editor: the networks.
      path: of the matrix.
      name: of its shape; see `shape_name`.
      pairs: of the gradient.

    >>> config = lm.LMConfig("llama", 97, 4, 1, 2, 1, 2, 6, 64)
    >>> editor = init_editor(jax.random.key(0), config, 2, 1)
    >>> pairs = Pairs(jnp.ones((1, 4)), jnp.full((1, 6), 2.0))
    >>> transform(editor, "model.layers.0.mlp.up_proj.weight", "4x6", pairs).delta[0, 0].round(6)
    Array(-0.0002, dtype=float32)
    """
    net, modes = editor.nets[name], editor.modes[path]
    mean, spread = mean_and_spread(editor.moments[name])
    z = (jnp.concatenate([pairs.x, pairs.delta], axis=1) - mean[None]) / spread[None]
    high = jax.lax.Precision.HIGHEST
    for i in range(2):
        low = jnp.einsum("nz,rz->nr", z, net["v"][i], precision=high)
        inner = jnp.einsum("nr,zr->nz", low, net["u"][i], precision=high) + net["b"][i][None]
        inner = modes["scale"][i][None] * inner + modes["shift"][i][None]
        # The slope at zero must be one, not a half or nothing: every unit begins there.
        z = z + jnp.where(inner >= 0, inner, 0.0)
    live = jnp.any(pairs.delta != 0, axis=1, keepdims=True)
    z = jnp.where(live, z, 0.0)
    inputs = pairs.x.shape[1]
    return Pairs(z[:, :inputs], -editor.rates[path] * z[:, inputs:])


def mean_and_spread(moments: Mapping[str, Any]) -> tuple[Array, Array]:
    """Give the running mean and standard deviation; 0 and 1 before two pairs have been seen.

    >>> moments = {"n": jnp.float32(0), "mean": jnp.zeros(1), "m2": jnp.zeros(1)}
    >>> [v.tolist() for v in mean_and_spread(moments)]
    [[0.0], [1.0]]
    """
    seen = moments["n"] > 1
    spread = jnp.sqrt(moments["m2"] / jnp.maximum(moments["n"] - 1, 1)) + _TINY
    return jnp.where(seen, moments["mean"], 0.0), jnp.where(seen, spread, 1.0)


def save_editor(folder: str | Path, editor: Editor) -> None:
    """Write an editor as safetensors.

    Args:
      folder: made if need be.
      editor: the networks.

    >>> import tempfile
    >>> config = lm.LMConfig("llama", 97, 4, 1, 2, 1, 2, 6, 64)
    >>> save_editor(folder := tempfile.mkdtemp(), init_editor(jax.random.key(0), config, 2, 1))
    >>> sorted(load_editor(folder).nets)
    ['4x6', '6x4']
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(editor)
    del tree
    arrays = {"/".join([k[0].name, *(p.key for p in k[1:])]): np.asarray(v) for k, v in leaves}
    write_safetensors(folder, arrays, lambda name: arrays[name], metadata={"editor": "mend-1"})


def load_editor(folder: str | Path) -> Editor:
    """Read an editor that `save_editor` wrote.

    Raises:
      UserError: if there is none, or it is not whole.

    >>> load_editor("no/such/folder")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: ...
    """
    file = Path(folder) / "model.safetensors"
    arrays = read_safetensors(file)
    parts: dict[str, Any] = {field: {} for field in Editor._fields}
    for name, array in arrays.items():
        field, *keys = name.split("/")
        if field not in parts or len(keys) != (1 if field == "rates" else 2):
            raise UserError(f"{file} holds {name[:80]!r}; expected an editor of MEND; train one")
        place = parts[field] if field == "rates" else parts[field].setdefault(keys[0], {})
        place[keys[-1]] = jnp.asarray(array)
    editor = Editor(**parts)
    if read_header(file).metadata.get("editor") != "mend-1" or set(editor.rates) != set(
        editor.modes
    ):
        raise UserError(f"{file} holds no whole editor of MEND; expected one; train it again")
    return editor
