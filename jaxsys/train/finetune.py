"""Fine-tune any model: all of it, or LoRA adapters beside weights frozen in float or in few bits.

The model enters as ``loss_fn(params, batch)``, the data as ``batch_at(step)``; both are functions,
so a run is a function of its arguments, and one that was killed continues bit for bit.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsys.core.checkpoint import RunStore
from jaxsys.core.errors import UserError
from jaxsys.core.report import to_json
from jaxsys.models import lora
from jaxsys.models.quantise import BLOCK_WEIGHTS, quantise
from jaxsys.train.logs import Tee, Writer
from jaxsys.train.loop import check_finite, iterate, resume

LossFn = Callable[[Any, Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Say what is trained.

    Attributes:
      steps: of the whole run.
      method: ``full``: every parameter, kept in float32. ``lora``: adapters; the model is frozen.
      bits: of the frozen matrices that get adapters, with ``lora``: None leaves them as they are,
        8 and 4 quantise them first, which is QLoRA's arrangement (arXiv 2305.14314) with uniform
        codes in place of its NF4.
      patterns: globs over the paths of the matrices that get adapters.
      rank: r of the adapters.
      alpha: α of the adapters.
      in_out: matrices are [in, out] (GPT-2's Conv1D).
      seed: of the adapters' start.
      save_every: steps between checkpoints; 0 saves only the last step.

    Raises:
      UserError: without steps, or with bits for a model that is trained whole.

    >>> Recipe(steps=10, bits=4).method
    'lora'
    """

    steps: int
    method: Literal["full", "lora"] = "lora"
    bits: Literal[8, 4] | None = None
    patterns: tuple[str, ...] = BLOCK_WEIGHTS
    rank: int = 8
    alpha: float = 16.0
    in_out: bool = False
    seed: int = 0
    save_every: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"steps is {self.steps}; a run needs at least 1")
        if self.method == "full" and self.bits is not None:
            raise UserError(
                f"bits is {self.bits} with method full; codes cannot be trained; choose method lora"
            )


class Finetuned(NamedTuple):
    """Hold what came of a run.

    Attributes:
      params: the tuned model, ready for ``apply``: with `LoraWeight`s where adapters were trained.
      adapters: those adapters (`lora.merge` adds them in); empty with method ``full``.
      losses: of the steps that this call ran.

    >>> Finetuned({}, {}, (2.5, 2.0)).losses[-1]
    2.0
    """

    params: dict[str, Any]
    adapters: lora.Adapters
    losses: tuple[float, ...]


def finetune(
    params: Mapping[str, Any],
    loss_fn: LossFn,
    batch_at: Callable[[int], Any],
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    *,
    store: RunStore | None = None,
    writer: Writer | None = None,
    meta: Mapping[str, Any] | None = None,
) -> Finetuned:
    """Train on batches, from the newest checkpoint of `store` if it has one.

    For a language model: ``loss_fn = lambda p, tokens: lm.loss(p, config, tokens)`` with a
    `TokenStream`, or ``lambda p, b: lm.loss(p, config, *b)`` with an `InstructionStream`, which
    counts the answers only.

    Args:
      params: the model; not changed.
      loss_fn: (params, batch) to a scalar. With adapters or codes its linear layers must go through
        `models.lm.linear`, as those of `models.lm` do.
      batch_at: step number to batch.
      optimizer: an optax transformation, such as one of `train.optimizers.PRESETS` makes.
      recipe: what is trained.
      store: where to save and resume; its checkpoints hold what is trained, not the frozen model.
      writer: gets step, loss, norm of the gradient and seconds of every step.
      meta: what else identifies the run (data, optimiser), as JSON; a checkpoint with another
        recipe or meta is refused.

    Returns:
      The tuned model.

    Raises:
      UserError: if the checkpoint is of another run.
      NonFiniteError: if the loss stops being a number.

    >>> from jaxsys.train.optimizers import sgd
    >>> loss_fn = lambda p, batch: jnp.sum((p["w"] - batch) ** 2)
    >>> recipe = Recipe(steps=30, method="full")
    >>> tuned = finetune({"w": jnp.zeros(1)}, loss_fn, lambda i: jnp.ones(1), sgd(0.3), recipe)
    >>> round(float(tuned.params["w"][0]), 4)
    1.0
    """
    frozen, trained = _split(params, recipe)
    state = {"trained": trained, "optimizer": jax.jit(optimizer.init)(trained)}
    identity = json.loads(to_json({"recipe": dataclasses.asdict(recipe), "meta": meta or {}}))
    state, start = resume(store, state, identity)
    train_step = jax.jit(_step, static_argnums=(0, 1, 2), donate_argnums=3)
    writer = writer or Tee()
    losses, before_s = [], time.perf_counter()
    run = iterate(
        lambda state, batch: train_step(loss_fn, optimizer.update, recipe, state, frozen, batch),
        state,
        batch_at,
        start=start,
        steps=recipe.steps,
        save_every=recipe.save_every,
        store=store,
        meta=identity,
        guard=lambda i, info: check_finite(i, info["loss"]),
    )
    for i, after, info in run:
        state, now_s = after, time.perf_counter()
        row = {name: float(np.asarray(value)) for name, value in info.items()}
        writer.write({"step": i, **row, "step_s": now_s - before_s})
        losses.append(row["loss"])
        before_s = now_s
    adapters = {} if recipe.method == "full" else state["trained"]
    return Finetuned(_join(frozen, state["trained"], recipe), adapters, tuple(losses))


def _split(params: Mapping[str, Any], recipe: Recipe) -> tuple[Any, Any]:
    """Part a model into what stays and what is trained; the latter is the caller's no longer."""
    if recipe.method == "full":
        return {}, jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), dict(params))
    if recipe.bits is not None:
        params = quantise(params, recipe.patterns, bits=recipe.bits, in_out=recipe.in_out)
    adapters = lora.init(
        jax.random.key(recipe.seed),
        params,
        recipe.patterns,
        rank=recipe.rank,
        alpha=recipe.alpha,
        in_out=recipe.in_out,
    )
    return params, adapters


def _join(frozen: Any, trained: Any, recipe: Recipe) -> Any:
    if recipe.method == "full":
        return trained
    return lora.apply(frozen, trained, in_out=recipe.in_out)


def _step(
    loss_fn: LossFn, update: Callable, recipe: Recipe, state: Any, frozen: Any, batch: Any
) -> tuple[Any, dict[str, jax.Array]]:
    def objective(trained: Any) -> jax.Array:
        return loss_fn(_join(frozen, trained, recipe), batch)

    trained, memory = state["trained"], state["optimizer"]
    loss, grads = jax.value_and_grad(objective)(trained)
    updates, memory = update(grads, memory, trained)
    state = {"trained": optax.apply_updates(trained, updates), "optimizer": memory}
    return state, {"loss": loss, "grad_norm": optax.tree.norm(grads)}
