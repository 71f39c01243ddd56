"""Fine-tuning after pruning, with the mask kept: all weights that stay, or LoRA under the mask."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxsys.core.checkpoint import RunStore
from jaxsys.core.errors import UserError
from jaxsys.core.tree import flatten, unflatten
from jaxsys.models import lora
from jaxsys.train.finetune import Finetuned, Recipe, finetune
from jaxsys.train.logs import Writer

Masks = Mapping[str, Any]


def keep_masks(masks: Masks) -> optax.GradientTransformation:
    """Make an optax transformation that never moves a removed weight.

    Chain it last: momentum, weight decay and clipping before it cannot bring a weight back.

    Args:
        masks: dotted path to mask; True may move. Leaves without a mask move freely.

    Returns:
        A transformation of updates.

    >>> keep = keep_masks({"w": jnp.array([True, False])})
    >>> keep.update({"w": jnp.ones(2), "b": jnp.ones(1)}, keep.init({}))[0]["w"].tolist()
    [1.0, 0.0]
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        flat = flatten(updates)
        unknown = [path for path in masks if path not in flat]
        if unknown:
            raise UserError(
                f"the mask of {unknown[0]!r} belongs to no parameter; pass masks of this model"
            )
        kept = {p: jnp.where(masks[p], u, 0) if p in masks else u for p, u in flat.items()}
        return unflatten(kept), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def masked(optimizer: optax.GradientTransformation, masks: Masks) -> optax.GradientTransformation:
    """Wrap an optimiser so that removed weights stay zero.

    >>> optimizer = masked(optax.sgd(1.0), {"w": jnp.array([True, False])})
    >>> params = {"w": jnp.array([1.0, 0.0])}
    >>> updates, _ = optimizer.update({"w": jnp.ones(2)}, optimizer.init(params), params)
    >>> optax.apply_updates(params, updates)["w"].tolist()
    [0.0, 0.0]
    """
    return optax.chain(optimizer, keep_masks(masks))


def merge_masked(
    params: Mapping[str, Any],
    adapters: Mapping[str, lora.Adapter],
    masks: Masks,
    *,
    in_out: bool = False,
) -> dict[str, Any]:
    """Add adapters into the weights that stay: W' = W + mask ⊙ (α / r) · B A.

    Args:
        params: the pruned model.
        adapters: by path.
        masks: by path.
        in_out: weights are [in, out].

    Returns:
        A tree of the same paths, zero where it was.

    >>> adapter = lora.Adapter(jnp.ones((1, 2)), jnp.ones((1, 1)), 3.0)
    >>> merge_masked({"w": jnp.zeros((1, 2))}, {"w": adapter},
    ...              {"w": jnp.array([[True, False]])})["w"].tolist()
    [[3.0, 0.0]]
    """
    flat = flatten(params)
    for path, adapter in adapters.items():
        delta: Array = adapter.delta().T if in_out else adapter.delta()
        delta = jnp.where(masks[path], delta, 0.0) if path in masks else delta
        flat[path] = (flat[path].astype(jnp.float32) + delta).astype(flat[path].dtype)
    return unflatten(flat)


def recover(
    params: Mapping[str, Any],
    masks: Masks,
    loss_fn: Callable[[Any, Any], Array],
    batch_at: Callable[[int], Any],
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    *,
    store: RunStore | None = None,
    writer: Writer | None = None,
) -> Finetuned:
    """Train a pruned model without bringing a removed weight back.

    With ``recipe.method`` ``lora`` the adapters' product goes through the mask in the forward pass,
    so that merging them is exact and costs no sparsity (LoRA beside the weights, as the released
    code of Pruner-Zero trains it, would leave a dense term behind).

    Args:
        params: the pruned model.
        masks: dotted path to mask, True kept.
        loss_fn: (params, batch) to a scalar.
        batch_at: step to batch.
        optimizer: an optax transformation.
        recipe: ``full`` or ``lora`` (without bits).
        store: where to save and resume.
        writer: gets the log.

    Returns:
        The tuned model as plain arrays (adapters merged under the masks), and the losses.

    Raises:
        UserError: for a mask without a parameter, or codes in place of weights.

    >>> loss_fn = lambda p, batch: jnp.sum((p["w"] - batch) ** 2)
    >>> found = recover({"w": jnp.zeros(2)}, {"w": jnp.array([True, False])}, loss_fn,
    ...                 lambda i: jnp.ones(2), optax.sgd(0.3), Recipe(30, method="full"))
    >>> found.params["w"].round(4).tolist()
    [1.0, 0.0]
    """
    if recipe.bits is not None:
        raise UserError(
            f"bits is {recipe.bits}; a mask is kept for float weights only; leave bits out"
        )
    if recipe.method == "full":
        return finetune(
            params, loss_fn, batch_at, masked(optimizer, masks), recipe, store=store, writer=writer
        )
    # The adapters are trained as a model of their own; the frozen one comes with the batch, since a
    # value that a loss closes over would be compiled into the program.
    start = lora.init(
        jax.random.key(recipe.seed),
        params,
        recipe.patterns,
        rank=recipe.rank,
        alpha=recipe.alpha,
        in_out=recipe.in_out,
    )

    def loss(adapters: Any, batch: Any) -> Array:
        frozen, keep, own = batch
        return loss_fn(merge_masked(frozen, adapters, keep, in_out=recipe.in_out), own)

    whole = Recipe(recipe.steps, method="full", seed=recipe.seed, save_every=recipe.save_every)
    frozen, keep = dict(params), dict(masks)
    found = finetune(
        start,
        loss,
        lambda i: (frozen, keep, batch_at(i)),
        optimizer,
        whole,
        store=store,
        writer=writer,
        meta={"rank": recipe.rank, "alpha": recipe.alpha, "patterns": list(recipe.patterns)},
    )
    merged = merge_masked(params, found.params, masks, in_out=recipe.in_out)
    return Finetuned(merged, found.params, found.losses)
