"""MEND: a small trained network turns the gradient of one fact into a better low-rank edit.

The gradient of a linear module is a sum over tokens, ∇W = Σ_t δ_t x_tᵀ. An editor network maps each
pair to another, and the edit is a sum of the same form (sections 3.1 and 3.2):

    z ← [(x − μ_x)/σ_x ; (δ − μ_δ)/σ_δ]
    z ← z + max(0, a_ℓ ⊙ (U V z + b) + s_ℓ)      twice, U, V and b shared by matrices of one shape
    [x̃ ; δ̃] = z,    ΔW_ℓ = −α_ℓ Σ_t δ̃_t x̃_tᵀ

U is zero at the start, so an untrained editor follows the plain gradient. The released code begins
with the other sign of α, which it then learns; here a positive α descends from the first step.

Reference: arXiv 2110.11309.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsys.core.errors import UserError
from jaxsys.edit.contract import Editable, Edited, Info, Request
from jaxsys.edit.editable import get_matrix, with_leaf
from jaxsys.edit.factors import apply
from jaxsys.edit.mend_editor import Editor, Pairs, load_editor, shape_name, transform
from jaxsys.edit.rows import Answers, checked, log_probs, mean_nll, rows_of
from jaxsys.models import lm
from jaxsys.models.lm.families import layout_of
from jaxsys.models.lm.layout import join, subtree
from jaxsys.models.lm.linear import linear


@dataclass(frozen=True)
class MEND:
    """Set MEND.

    Attributes:
      editor: folder of a trained editor, as `save_editor` writes it, or an `Editor`.
      sequence: ``accumulate``: each edit is added to the parameters as they are. ``released``: each
        edit starts from the parameters before the first one and the edits before it are lost, as
        the released code does in a sequence; the state holds these parameters.

    >>> MEND().sequence
    'accumulate'
    """

    editor: Any = None
    sequence: Literal["accumulate", "released"] = "accumulate"


@partial(jax.tree_util.register_dataclass, data_fields=("base", "offset"), meta_fields=("in_out",))
@dataclass(frozen=True)
class OffsetWeight:
    """Stand where a matrix stood and add zeros to what it gives, whose gradient is δ.

    Attributes:
      base: W.
      offset: [N, O] zeros, one row for each token.
      in_out: W is [in, out].

    >>> OffsetWeight(jnp.eye(2), jnp.zeros((1, 2))).matmul(jnp.array([[1.0, 2.0]])).tolist()
    [[1.0, 2.0]]
    """

    base: Any
    offset: Any
    in_out: bool = False

    def matmul(self, x: Float[Array, "N I"]) -> Float[Array, "N O"]:
        """Multiply rows by W and add the offset.

        Args:
          x: rows.
        """
        return linear({"weight": self.base}, x, in_out=self.in_out) + self.offset.astype(x.dtype)


def gradient_pairs(
    params: Any,
    config: Any,
    x: Float[Array, "B T D"],
    answers: Answers,
    *,
    layer: int,
    paths: Mapping[str, str],
) -> tuple[dict[str, Pairs], Float[Array, "B"]]:
    """Compute x_t and δ_t of every edited matrix for the sum over requests of the mean NLL.

    Args:
      params: of the model.
      config: an `LMConfig`.
      x: residual stream before block ``layer``.
      answers: what should follow.
      layer: the first block with an edited matrix.
      paths: from `edited_paths`.

    Returns:
      Pairs by path, and the losses.

    >>> from jaxsys.edit.mend_editor import edited_paths
    >>> config = lm.LMConfig("llama", 16, 8, 1, 2, 2, 4, 12, 64)
    >>> params = jax.eval_shape(partial(lm.init, config=config), jax.random.key(0))
    >>> run = partial(gradient_pairs, config=config, layer=0, paths=edited_paths(config, 1))
    >>> one = jnp.ones((1, 1), jnp.int32)
    >>> pairs, _ = jax.eval_shape(
    ...     run, params, x=jnp.ones((1, 2, 8)), answers=Answers(one, one, one * 1.0))
    >>> pairs["model.layers.0.mlp.down_proj.weight"].x.shape
    (2, 12)
    """
    tokens, flip = x.shape[0] * x.shape[1], layout_of(config).in_out
    outputs = {path: get_matrix(config, params, path).shape[0] for path in paths}

    def objective(offsets):
        with_offsets = params
        for path, offset in offsets.items():
            weight = OffsetWeight(subtree(params, path), offset, flip)
            with_offsets = with_leaf(with_offsets, path, weight)
        log_p, found = log_probs(
            with_offsets, config, x, answers.at, layer=layer, taps=tuple(paths.values())
        )
        losses = mean_nll(log_p, answers.ids, answers.mask)
        return losses.sum(), (losses, found)

    zeros = {path: jnp.zeros((tokens, outputs[path]), jnp.float32) for path in paths}
    deltas, (losses, found) = jax.grad(objective, has_aux=True)(zeros)
    pairs = {}
    for path, point in paths.items():
        inputs = found[point].astype(jnp.float32)
        pairs[path] = Pairs(inputs.reshape(tokens, -1), deltas[path])
    return pairs, losses


def edit_mend(
    model: Editable,
    config: MEND,
    params: Any,
    requests: Sequence[Request],
    stats: Any = None,
    state: Any = None,
) -> Edited:
    """Turn the requests' gradient into an edit of the last blocks' feed-forward matrices.

    Args:
      model: configuration and tokenizer.
      config: see `MEND`.
      params: not changed.
      requests: one batch; their gradients are summed.
      stats: not used.
      state: with ``released``, the matrices before the first edit.

    Returns:
      The edited parameters and the factors, of one column for each token with a gradient.

    Raises:
      UserError: without an editor, with one of another model, or for requests that cannot be
        edited.

    Reference: arXiv 2110.11309.

    >>> edit_mend(Editable(None, None), MEND(), {}, [Request("Rome is", "Rome", "big")])
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: MEND has no editor; ...
    """
    del stats
    editor = _editor(config, model.config, params)
    if config.sequence == "released":
        state = {path: subtree(params, path) for path in editor.rates} if state is None else state
        for path, matrix in state.items():
            params = with_leaf(params, path, jnp.asarray(matrix))
    paths = {path: f"{path.removesuffix('.weight')}:in" for path in editor.rates}
    names = {path: shape_name(params, model.config, path) for path in paths}
    layer = min(_layer_of(path, model.config) for path in paths)
    rows = rows_of(model, params, checked(model, requests), layer)
    found, losses = _factors(
        editor,
        params,
        rows.x,
        rows.answers,
        config=model.config,
        layer=layer,
        paths=tuple(paths.items()),
        names=tuple(names.items()),
    )
    factors = {}
    for path, pairs in found.items():
        x, delta = np.asarray(pairs.x), np.asarray(pairs.delta)
        live = np.any(delta != 0, axis=1)
        factors[path] = (jnp.asarray(delta[live].T), jnp.asarray(x[live].T))
        if not (np.isfinite(x).all() and np.isfinite(delta).all()):
            raise UserError(
                f"the edit of {path} is not finite; expected numbers; train the editor again, with "
                "a lower rate"
            )
    info = Info(factors, {"loss": np.asarray(losses), "steps": 1})
    return Edited(apply(model, params, info), state, info)


@partial(jax.jit, static_argnames=("config", "layer", "paths", "names"))
def _factors(editor, params, x, answers, *, config, layer, paths, names):
    pairs, losses = gradient_pairs(params, config, x, answers, layer=layer, paths=dict(paths))
    return {path: transform(editor, path, name, pairs[path]) for path, name in names}, losses


def _layer_of(path: str, config: Any) -> int:
    blocks = join(config.prefix, layout_of(config).blocks)
    return int(path.removeprefix(f"{blocks}.").split(".")[0])


def _editor(config: MEND, lm_config: Any, params: Any) -> Editor:
    if config.editor is None:
        raise UserError(
            "MEND has no editor; expected the folder of a trained one; train it with "
            "jaxsys.edit.mend_train (experiments/edit/mend_train.py does) and name its folder"
        )
    if isinstance(config.editor, Editor):
        editor = config.editor
    else:
        editor = load_editor(config.editor)
    known = lm.shapes(lm_config)
    for path in editor.rates:
        if path not in known or shape_name(params, lm_config, path) not in editor.nets:
            raise UserError(
                f"the editor is for a matrix {path[:80]!r} that this model has not, or in another "
                "shape; use it with the model that it was trained for"
            )
    return editor
