"""Where experts pull apart: sign conflicts and cancellation, by tensor and by layer.

One pass over the leaves gives all three definitions: every one of them is a ratio of sums over
coordinates, so a layer's is the ratio of its tensors' sums, and nothing but those sums is kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxsys.core.errors import UserError
from jaxsys.core.tree import flatten
from jaxsys.merge.in_memory import check_trees

Definition = Literal["pairwise_sign", "any_sign", "magnitude"]
DEFINITIONS: tuple[Definition, ...] = ("pairwise_sign", "any_sign", "magnitude")


class Tally(NamedTuple):
    """Hold the sums that conflict is made of.

    Attributes:
      opposite: [pairs] coordinates where two experts' denoised entries have opposite signs.
      shared: [pairs] coordinates where both are not zero.
      split: coordinates where the signs that are not zero are not unanimous.
      touched: coordinates where some denoised entry is not zero.
      cancelled: Σ_k (Σ_n |τ_n,k| − |Σ_n τ_n,k|).
      total: Σ_k Σ_n |τ_n,k|.

    >>> tally(np.array([[1.0, -2.0], [1.0, 2.0]])).opposite.tolist()
    [1.0]
    """

    opposite: Float[np.ndarray, "pairs"]
    shared: Float[np.ndarray, "pairs"]
    split: float
    touched: float
    cancelled: float
    total: float


class Conflicts(NamedTuple):
    """Report conflict by tensor and by layer, for every definition.

    Attributes:
      tensors: path to definition to d in [0, 1].
      layers: layer to the same, from the sums over its tensors, in the model's order.
      sizes: parameters of each layer.

    >>> conflicts({"h": {"0": {"w": np.zeros(2)}}}, [{"h": {"0": {"w": np.ones(2)}}}] * 2).sizes
    {'h.0': 2}
    """

    tensors: dict[str, dict[Definition, float]]
    layers: dict[str, dict[Definition, float]]
    sizes: dict[str, int]

    def of_layers(self, definition: Definition) -> dict[str, float]:
        """Give one definition's d_l by layer.

        >>> Conflicts({}, {"h.0": {"magnitude": 0.5}}, {}).of_layers("magnitude")
        {'h.0': 0.5}
        """
        return {layer: found[definition] for layer, found in self.layers.items()}


def denoise(stack: np.ndarray, quantile: float | int) -> np.ndarray:
    """Set the small entries of every task vector to zero.

    τ̂_n = τ_n ⊙ [|τ_n| ≥ the q-quantile of |τ_n|].

    Reconstruction: that the paper denoises parameters is established, that it does it so is our
    reading; per tensor and per expert.

    Args:
      stack: [N, ...] task vectors of one tensor.
      quantile: q in [0, 1); 0 changes nothing.

    Returns:
      τ̂, same shape.

    Raises:
      UserError: for q outside [0, 1).

    Reference: arXiv 2502.04411.

    >>> denoise(np.array([[0.1, -3.0, 0.2, 2.0]]), 0.5).tolist()
    [[0.0, -3.0, 0.0, 2.0]]
    """
    if not 0 <= quantile < 1:
        raise UserError(f"quantile is {quantile}; expected a share in [0, 1), 0 for no denoising")
    if quantile == 0 or stack[0].size == 0:
        return stack
    size = np.abs(stack).reshape(len(stack), -1)
    bound = np.quantile(size, quantile, axis=1).astype(size.dtype)
    kept = size >= bound[:, None]
    return np.where(kept.reshape(stack.shape), stack, np.zeros((), stack.dtype))


def tally(stack: np.ndarray, quantile: float | int = 0.0) -> Tally:
    """Sum up one tensor.

    Args:
      stack: [N, ...] task vectors.
      quantile: of `denoise`, for the two definitions by signs.

    >>> tally(np.array([[1.0, 0.0], [-1.0, 1.0]])).split
    1.0
    """
    n = len(stack)
    signs = np.sign(denoise(stack, quantile)).astype(np.int8).reshape(n, -1)
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    products = [signs[i] * signs[j] for i, j in pairs]
    split = (signs > 0).any(0) & (signs < 0).any(0)
    flat = stack.reshape(n, -1)
    total = float(np.abs(flat).sum(dtype=np.float64))
    kept = float(np.abs(flat.sum(0, dtype=np.float64)).sum())
    return Tally(
        np.array([np.count_nonzero(p < 0) for p in products], np.float64),
        np.array([np.count_nonzero(p) for p in products], np.float64),
        float(split.sum()),
        float((signs != 0).any(0).sum()),
        total - kept,
        total,
    )


def add(a: Tally, b: Tally) -> Tally:
    """Join the sums of two tensors.

    >>> once = tally(np.ones((2, 3)))
    >>> add(once, once).total
    12.0
    """
    return Tally(
        a.opposite + b.opposite,
        a.shared + b.shared,
        a.split + b.split,
        a.touched + b.touched,
        a.cancelled + b.cancelled,
        a.total + b.total,
    )


def measures(sums: Tally) -> dict[Definition, float]:
    """Turn sums into the three definitions; where nothing moved, conflict is 0.

    pairwise_sign: mean over pairs i < j of #{k: τ̂_i,k τ̂_j,k < 0} / #{k: τ̂_i,k τ̂_j,k ≠ 0};
    any_sign: share of the touched coordinates whose signs are not unanimous;
    magnitude: 1 − Σ_k |Σ_n τ_n,k| / Σ_k Σ_n |τ_n,k|.

    Reconstruction: the paper's d_l is not given in what could be read; these are three readings.

    >>> [round(v, 2) for v in measures(tally(np.array([[1.0, 2.0], [-1.0, 2.0]]))).values()]
    [0.5, 0.5, 0.33]
    """
    pairs = sums.opposite / np.maximum(sums.shared, 1.0)
    return {
        "pairwise_sign": float(pairs.mean()) if pairs.size else 0.0,
        "any_sign": sums.split / max(sums.touched, 1.0),
        "magnitude": max(sums.cancelled, 0.0) / sums.total if sums.total else 0.0,
    }


def layer_name(path: str) -> str:
    """Name the layer of a tensor: its path to the first number, else the module it belongs to.

    >>> layer_name("model.layers.3.mlp.up_proj.weight"), layer_name("model.norm.weight")
    ('model.layers.3', 'model.norm')
    """
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return ".".join(parts[:-1]) or path


def in_order(layers: Sequence[str]) -> list[str]:
    """Put layers in the model's order: embeddings, blocks by number, what comes after.

    >>> in_order(["lm_head", "h.10", "h.2", "wte"])
    ['wte', 'h.2', 'h.10', 'lm_head']
    """

    def rank(name: str) -> tuple[int, int, str]:
        last = name.rsplit(".", 1)[-1]
        if last.isdigit():
            return (1, int(last), name)
        first = any(word in last for word in ("emb", "wte", "wpe", "tok"))
        return (0 if first else 2, 0, name)

    return sorted(layers, key=rank)


def as_flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Take a tree, or a checkpoint that is flat already, as a dict from path to tensor.

    >>> sorted(as_flat({"a.b": np.ones(1), "c": {"d": np.ones(1)}}))
    ['a.b', 'c.d']
    """
    if all(not isinstance(value, Mapping) for value in tree.values()):
        return dict(tree)
    return flatten(tree)


def check_family(base: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> None:
    """Refuse experts that are not of the base's form, naming all that differs at once.

    Args:
      base: flat.
      models: flat.

    Raises:
      UserError: for missing or superfluous tensors and other shapes, or without experts.

    >>> check_family({"w": np.ones(2)}, [{"w": np.ones(3)}])
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: 1 tensor does not fit: w is [2] in base and [3] in model 0; ...
    """
    if not models:
        raise UserError("there are no models; expected at least one beside the base; name some")
    check_trees(["base", *(f"model {i}" for i in range(len(models)))], [base, *models])


def task_vectors(
    base: Mapping[str, Any], models: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Go through the leaves: path, θ_0, and the stack of τ_n = θ_n − θ_0, in float32.

    Args:
      base: flat; memory maps do.
      models: flat.

    >>> [t.tolist() for _, _, t in task_vectors({"w": np.ones(1)}, [{"w": np.full(1, 3.0)}])]
    [[[2.0]]]
    """
    for path, leaf in base.items():
        origin = np.asarray(leaf, np.float32)
        stack = np.stack([np.asarray(model[path], np.float32) - origin for model in models])
        yield path, origin, stack


def conflicts(
    base: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    *,
    quantile: float | int = 0.8,
    layer_of: Callable[[str], str] = layer_name,
) -> Conflicts:
    """Measure where experts of one base pull apart, in one pass over the leaves.

    Args:
      base: parameters that all experts began with: a tree, or a flat checkpoint (memory maps do).
      models: two experts or more.
      quantile: of `denoise`, for the definitions by signs.
      layer_of: path to layer.

    Returns:
      All three definitions, by tensor and by layer.

    Raises:
      UserError: if the models are not of one form.

    Reference: arXiv 2502.04411.

    >>> base = {"h": {"0": {"w": np.zeros(2)}}}
    >>> experts = [{"h": {"0": {"w": np.array([1.0, s])}}} for s in (1.0, -1.0)]
    >>> conflicts(base, experts, quantile=0).layers["h.0"]
    {'pairwise_sign': 0.5, 'any_sign': 0.5, 'magnitude': 0.5}
    """
    flat, others = as_flat(base), [as_flat(model) for model in models]
    check_family(flat, others)
    tensors: dict[str, dict[Definition, float]] = {}
    sums: dict[str, Tally] = {}
    sizes: dict[str, int] = {}
    for path, origin, stack in task_vectors(flat, others):
        found, layer = tally(stack, quantile), layer_of(path)
        tensors[path] = measures(found)
        sums[layer] = add(sums[layer], found) if layer in sums else found
        sizes[layer] = sizes.get(layer, 0) + origin.size
    order = in_order(list(sums))
    layers = {layer: measures(sums[layer]) for layer in order}
    return Conflicts(tensors, layers, {layer: sizes[layer] for layer in order})
