"""Fisher merging: average parameters, each weighted by how much the loss of its task feels it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.dtypes import canonicalize_dtype

from jaxsys.core.errors import UserError
from jaxsys.core.tree import unflatten
from jaxsys.merge.conflict import as_flat, check_family


def diagonal_fisher(
    loss_fn: Callable[[Any, Any], jax.Array], params: Any, batches: Iterable[Any]
) -> Any:
    """Estimate the diagonal of the Fisher information, F = mean over examples of (∂ loss/∂θ)².

    With the data's own labels this is the empirical Fisher; with labels drawn from the model's own
    predictions, the Fisher. Which it is, ``loss_fn`` and the batches decide.

    Args:
      loss_fn: (params, example) to the loss of one example.
      params: of the expert.
      batches: trees of arrays whose leading axis counts examples; each is differentiated example by
        example under `jax.vmap`.

    Returns:
      A tree like `params`, float32.

    Raises:
      UserError: without batches.

    Reference: Matena and Raffel, arXiv 2111.09832, equation 4.

    >>> f = diagonal_fisher(lambda p, x: p["w"] * x, {"w": jnp.ones(())}, [jnp.array([1.0, 3.0])])
    >>> float(f["w"])
    5.0
    """

    @jax.jit
    def squares(params: Any, batch: Any) -> Any:
        grads = jax.vmap(jax.grad(loss_fn), (None, 0))(params, batch)
        return jax.tree.map(lambda g: jnp.sum(jnp.square(g.astype(jnp.float32)), axis=0), grads)

    total, count = None, 0
    for batch in batches:
        found = squares(params, batch)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        count += len(jax.tree.leaves(batch)[0])
    if total is None:
        raise UserError("there are no batches; expected examples of the expert's task; give some")
    return jax.tree.map(lambda x: x / count, total)


def fisher_merge(
    models: Sequence[Mapping[str, Any]],
    fishers: Sequence[Mapping[str, Any]],
    weights: Sequence[float] | None = None,
    *,
    floor: float = 1e-6,
    normalise: bool = True,
) -> dict[str, Any]:
    """Merge by Fisher-weighted averaging: θ = Σ λ_n F_n θ_n / Σ λ_n F_n, entry by entry.

    Args:
      models: N experts: trees or flat checkpoints.
      fishers: of each, from `diagonal_fisher`.
      weights: λ [N]; all equal by default.
      floor: least F, so that entries that no task feels are averaged.
      normalise: divide each F_n by its norm over the whole model first, so that an expert with
        large gradients does not outvote the others; the floor is applied after that.

    Returns:
      Nested dict, in the dtypes of the first model.

    Raises:
      UserError: if models or Fishers are not of one form, or their numbers differ.

    Reference: Matena and Raffel, arXiv 2111.09832, equation 5.

    >>> models = [{"w": np.array([0.0, 0.0])}, {"w": np.array([4.0, 4.0])}]
    >>> f = [{"w": np.array([3.0, 1.0])}, {"w": np.array([1.0, 1.0])}]
    >>> fisher_merge(models, f, normalise=False)["w"].tolist()
    [1.0, 2.0]
    """
    trees, felt = [as_flat(m) for m in models], [as_flat(f) for f in fishers]
    if not trees or len(felt) != len(trees):
        raise UserError(f"got {len(felt)} Fishers for {len(trees)} models; give one for each")
    check_family(trees[0], [*trees[1:], *felt])
    shares = np.ones(len(trees)) if weights is None else np.asarray(weights, np.float64)
    if shares.shape != (len(trees),):
        raise UserError(f"got {shares.size} weights for {len(trees)} models; give one for each")
    norms = np.ones(len(trees))
    if normalise:
        squares = [
            sum(float(np.square(np.asarray(x, np.float64)).sum()) for x in f.values()) for f in felt
        ]
        norms = np.sqrt(np.maximum(squares, 1e-60))
    merged = {}
    for path, leaf in trees[0].items():
        above = below = np.zeros(leaf.shape)
        for i, (tree, fisher) in enumerate(zip(trees, felt, strict=True)):
            f = shares[i] * np.maximum(np.asarray(fisher[path], np.float64) / norms[i], floor)
            above = above + f * np.asarray(tree[path], np.float64)
            below = below + f
        merged[path] = jnp.asarray(above / below, canonicalize_dtype(leaf.dtype))
    return unflatten(merged)
