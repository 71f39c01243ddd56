"""RegMean: for each linear layer the matrix whose outputs are nearest to all experts' outputs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.dtypes import canonicalize_dtype
from jaxtyping import Array, Bool, Float

from jaxsys.core.errors import UserError
from jaxsys.core.tree import unflatten
from jaxsys.merge.conflict import as_flat, check_family


class Grams(NamedTuple):
    """Hold statistics of the inputs of linear layers; a stream of batches adds to them.

    Attributes:
      sums: path of a matrix to Σ xᵀx over tokens, [in, in], float32.
      tokens: how many tokens were summed.

    >>> float(Grams({"w": np.eye(2)}, 4.0).mean()["w"][0, 0])
    0.25
    """

    sums: dict[str, Any]
    tokens: Any

    def mean(self) -> dict[str, np.ndarray]:
        """Give G = XᵀX / tokens by path, in float64.

        >>> Grams({"w": np.full((1, 1), 6.0)}, 3.0).mean()["w"].tolist()
        [[2.0]]
        """
        return {p: np.asarray(s, np.float64) / float(self.tokens) for p, s in self.sums.items()}


def gram(x: Float[Array, "... I"], mask: Bool[Array, "..."] | None = None) -> Float[Array, "I I"]:
    """Sum xᵀx over all tokens.

    Args:
      x: inputs of a linear layer.
      mask: tokens that count.

    >>> gram(jnp.array([[1.0, 2.0], [0.0, 1.0]])).tolist()
    [[1.0, 2.0], [2.0, 5.0]]
    """
    rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    if mask is not None:
        rows = rows * mask.reshape(-1, 1)
    return jnp.einsum("ni,nj->ij", rows, rows)


def collect_grams(
    inputs_fn: Callable[[Any, Any], tuple[Mapping[str, Array], Array]],
    params: Any,
    batches: Iterable[Any],
) -> Grams:
    """Run an expert over batches of its task and sum the statistics of its linear layers.

    Args:
      inputs_fn: (params, batch) to the inputs [B, T, in] of each matrix by its path, and the mask
        [B, T] of tokens that count; for `models.lm` the taps ``MODULE:in``, see `lm_inputs`.
      params: of the expert.
      batches: examples of its task; labels are not needed.

    Raises:
      UserError: without batches.

    >>> inputs_fn = lambda p, x: ({"w": x}, jnp.ones(x.shape[:-1], bool))
    >>> collect_grams(inputs_fn, {}, [jnp.ones((1, 3, 2))] * 2).mean()["w"].tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """

    @jax.jit
    def one(params: Any, batch: Any) -> Grams:
        inputs, mask = inputs_fn(params, batch)
        return Grams({p: gram(x, mask) for p, x in inputs.items()}, jnp.sum(mask))

    total = None
    for batch in batches:
        found = one(params, batch)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    if total is None:
        raise UserError("there are no batches; expected text of the expert's task; give some")
    return total


def lm_inputs(config: Any, paths: Sequence[str]) -> Callable[[Any, Any], Any]:
    """Make ``inputs_fn`` for a model of `models.lm` and batches (tokens [B, T], mask [B, T]).

    Args:
      config: an `LMConfig`.
      paths: of matrices, such as ``model.layers.0.mlp.up_proj.weight``.

    >>> from jaxsys.models import lm
    >>> config = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> fn = lm_inputs(config, ["model.layers.0.mlp.up_proj.weight"])
    >>> batch = (jnp.ones((1, 5), jnp.int32), jnp.ones((1, 5), bool))
    >>> [x.shape for x in fn(lm.init(jax.random.key(0), config), batch)[0].values()]
    [(1, 5, 32)]
    """
    from jaxsys.models import lm

    taps = {path: f"{path.removesuffix('.weight')}:in" for path in paths}

    def inputs_fn(params: Any, batch: Any) -> tuple[dict[str, Array], Array]:
        tokens, mask = batch
        found = lm.apply(params, config, tokens, taps=tuple(taps.values())).taps
        return {path: found[tap] for path, tap in taps.items()}, mask

    return inputs_fn


def shrink(g: np.ndarray, alpha: float) -> np.ndarray:
    """Multiply the entries off the diagonal by α.

    >>> shrink(np.array([[2.0, 1.0], [1.0, 2.0]]), 0.5).tolist()
    [[2.0, 0.5], [0.5, 2.0]]
    """
    return alpha * g + (1 - alpha) * np.diag(np.diag(g))


def regmean_merge(
    models: Sequence[Mapping[str, Any]],
    grams: Sequence[Grams],
    *,
    alpha: float = 0.9,
    ridge: float = 1e-6,
    in_out: bool = False,
) -> dict[str, Any]:
    """Merge with RegMean: W = (Σ_n G_n)⁻¹ Σ_n G_n W_n for W [in, out]; the rest is averaged.

    Args:
      models: N experts: trees or flat checkpoints.
      grams: of each.
      alpha: factor on the off-diagonals of G_n; 0.1 to 0.95 in the paper, by model.
      ridge: added to the diagonal of each G_n, as a share of its mean, so that inputs that are
        never active do not make the sum singular; equal Grams still give the mean.
      in_out: matrices are [in, out] (GPT-2's Conv1D) and not [out, in].

    Returns:
      Nested dict, in the dtypes of the first model.

    Raises:
      UserError: if the models are not of one form, the statistics are of other matrices, or their
        numbers differ.

    Reference: Jin et al., arXiv 2212.09849.

    >>> models = [{"w": np.array([[0.0]])}, {"w": np.array([[4.0]])}]
    >>> grams = [Grams({"w": np.full((1, 1), g)}, 1.0) for g in (3.0, 1.0)]
    >>> regmean_merge(models, grams)["w"].round(3).tolist()
    [[1.0]]
    """
    trees = [as_flat(m) for m in models]
    if not trees or len(grams) != len(trees):
        raise UserError(f"got {len(grams)} statistics for {len(trees)} models; give one for each")
    check_family(trees[0], trees[1:]) if len(trees) > 1 else None
    means = [g.mean() for g in grams]
    foreign = sorted(set().union(*means) - set(trees[0]))
    if foreign or any(set(m) != set(means[0]) for m in means):
        raise UserError(
            f"the statistics are of {', '.join(foreign[:3]) or 'different matrices per model'}; "
            "expected the same matrices of the model for each; collect them anew"
        )
    merged = {}
    for path, leaf in trees[0].items():
        stack = np.stack([np.asarray(tree[path], np.float64) for tree in trees])
        if path in means[0]:
            found = _solve([m[path] for m in means], stack, alpha, ridge, in_out)
        else:
            found = stack.mean(0)
        merged[path] = jnp.asarray(found, canonicalize_dtype(leaf.dtype))
    return unflatten(merged)


def _solve(
    grams: list[np.ndarray], stack: np.ndarray, alpha: float, ridge: float, in_out: bool
) -> np.ndarray:
    shrunk = []
    for g in grams:
        lift = ridge * max(float(np.mean(np.diag(g))), 1e-12)
        shrunk.append(shrink(g, alpha) + lift * np.eye(len(g)))
    columns = stack if in_out else np.swapaxes(stack, 1, 2)
    right = sum(g @ w for g, w in zip(shrunk, columns, strict=True))
    found = np.linalg.solve(sum(shrunk), right)
    return found if in_out else found.T
