"""GRACE: a codebook beside one layer, whose entries replace what a matrix gives near a key.

    h = v_j  if  ‖a − k_j‖ ≤ ε_j  for the nearest key k_j,  else  W a      (equation 2)

where a is the input of the adapted matrix. Keys are what the last token of an edited prompt gives;
values are found by gradient; radii grow over edits of one answer and split between different ones.

Departures: every token is looked up, not the one whose index the last edit left behind, so the
answer of the edited model depends on the prompt alone; answers are compared token by token (the
released code compares their averages); an edit whose key is an old one to within `GRACE.same` takes
its place, so that a fact can be edited again.

Reference: arXiv 2211.11031.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from jaxsys.core.errors import UserError
from jaxsys.core.tree import path_key
from jaxsys.edit.codebook import Codebook, CodebookWeight, place
from jaxsys.edit.contract import Answering, Editable, Edited, Info, Request
from jaxsys.edit.editable import down_name, get_matrix, matrix_path, with_leaf
from jaxsys.edit.rows import Rows, checked, log_probs, mean_nll, rows_of
from jaxsys.evaluate.protocol import from_lm
from jaxsys.models import lm
from jaxsys.models.lm.families import layout_of
from jaxsys.models.lm.layout import join, subtree
from jaxsys.models.lm.taps import Intervention


@dataclass(frozen=True)
class GRACE:
    """Set GRACE.

    Attributes:
      layer: whose down-projection is adapted; None: the one at five sixths of the depth (27 of 32).
      radius: ε_0, the radius of a new key.
      lr: of Adam on the value.
      steps: at most.
      stop: loss, in nats per token, below which no further step is taken; 0 to take all steps, as
        released.
      start: a value begins ``random`` (uniform on 0 to 1, as released) or ``warm`` (what the matrix
        gives).
      same: distance, as a part of ε_0, within which two keys are one.
      seed: of random values.

    Raises:
      UserError: for numbers that are not positive.

    >>> GRACE().radius
    1.0
    """

    layer: int | None = None
    radius: float = 1.0
    lr: float = 1.0
    steps: int = 100
    stop: float = 1e-2
    start: str = "warm"
    same: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.radius, self.lr, self.steps) <= 0 or self.start not in ("random", "warm"):
            raise UserError(
                f"radius is {self.radius}, lr {self.lr}, steps {self.steps} and start "
                f"{self.start!r}; expected positive numbers, and random or warm; correct them"
            )


def edit_grace(
    model: Editable,
    config: GRACE,
    params: Any,
    requests: Sequence[Request],
    stats: Any = None,
    state: Codebook | None = None,
) -> Edited:
    """Add requests to the codebook one by one; the parameters stay what they are.

    The value of a new key minimises −(1/|o|) Σ log p(o_t) with the output of the matrix at the
    prompt's last token replaced by it.

    Args:
      model: configuration and tokenizer.
      config: see `GRACE`.
      params: not changed.
      requests: entered in order.
      stats: not used.
      state: the codebook so far; None for an empty one.

    Returns:
      The same parameters, the codebook as state; see `answering_grace` for how it answers.

    Raises:
      UserError: for requests that cannot be edited, or a state of another model.

    Reference: arXiv 2211.11031, section 3.

    >>> from jaxsys.data import ByteTokenizer
    >>> lm_config = lm.LMConfig("llama", 256, 16, 1, 2, 2, 8, 24, 64)
    >>> params, facts = lm.init(jax.random.key(0), lm_config), [Request("Rome is", "Rome", "big")]
    >>> model = Editable(lm_config, ByteTokenizer())
    >>> edit_grace(model, GRACE(steps=1), params, facts).state.count
    1
    """
    del stats
    layer = adapted_layer(config, model.config)
    path = matrix_path(model.config, layer)
    outputs, inputs = get_matrix(model.config, params, path).shape
    book = Codebook.empty(inputs, outputs) if state is None else state
    if book.keys.shape[1] != inputs or book.values.shape[1] != outputs:
        raise UserError(
            f"the codebook is for a matrix [{book.values.shape[1]}, {book.keys.shape[1]}] and "
            f"{path} is [{outputs}, {inputs}]; use it with the model that it was made for"
        )
    losses, steps = [], []
    for request, encoded in zip(requests, checked(model, requests), strict=True):
        # One request after the other: the place of each depends on those before.
        rows = rows_of(model, params, [encoded], layer)
        key, output = (np.asarray(v) for v in _looked_at(params, rows, model.config, layer))
        label = encoded.ids[encoded.split :]
        book, index = place(book, key, label, config.radius, config.same)
        loss, taken = 0.0, 0
        if index is not None:
            begin = output if config.start == "warm" else _random(config, request.prompt, outputs)
            value, loss, taken = _fit(params, rows, model.config, config, output, begin)
            values = book.values.copy()
            values[index] = value - _bias(params, model.config, layer)
            book = book._replace(values=values)
        losses.append(loss)
        steps.append(taken)
    notes = {"loss": np.array(losses), "steps": np.array(steps), "entries": book.count}
    return Edited(params, book, Info({}, notes))


def answering_grace(
    model: Editable, config: GRACE, params: Any, state: Codebook | None
) -> Answering:
    """Give the model that looks every token up in the codebook, in scoring and in generation.

    Args:
      model: configuration.
      config: as it was for the edits.
      params: of the model.
      state: the codebook; None for the unedited model.

    >>> lm_config = lm.LMConfig("llama", 256, 16, 1, 2, 2, 8, 24, 64)
    >>> params = lm.init(jax.random.key(0), lm_config)
    >>> answering_grace(Editable(lm_config, None), GRACE(), params, None).model.vocab_size
    256
    """
    dtype = jax.tree.leaves(params)[0].dtype
    if state is None:
        return Answering(from_lm(params, model.config, dtype))
    path = matrix_path(model.config, adapted_layer(config, model.config))
    arrays = (jnp.asarray(a) for a in (state.keys, state.values, state.radii))
    flip = layout_of(model.config).in_out
    weight = CodebookWeight(jnp.asarray(subtree(params, path)), *arrays, in_out=flip)
    return Answering(from_lm(with_leaf(params, path, weight), model.config, dtype))


def adapted_layer(config: GRACE, lm_config: Any) -> int:
    """Give the layer that GRACE adapts: five sixths of the depth by default, 27 of 32.

    >>> adapted_layer(GRACE(), lm.LMConfig("llama", 97, 32, 32, 4, 2, 8, 48, 64))
    27
    """
    if config.layer is not None:
        return config.layer
    return min(round(lm_config.layers * 27 / 32), lm_config.layers - 1)


def _looked_at(params: Any, rows: Rows, config: Any, layer: int) -> tuple[Array, Array]:
    down = down_name(config, layer)
    block = lm.layer(params, config, layer)
    taps = (f"{down}:in", f"{down}:out")
    _, _, found = lm.block(block, config, layer, rows.x, taps=taps)
    end = int(rows.prompt_end[0])
    key, output = (found[tap][0, end].astype(jnp.float32) for tap in taps)
    return key, output


def _bias(params: Any, config: Any, layer: int) -> np.ndarray | float:
    module = subtree(lm.layer(params, config, layer), down_name(config, layer))
    return np.asarray(module["bias"], np.float32) if "bias" in module else 0.0


def _random(config: GRACE, prompt: str, outputs: int) -> np.ndarray:
    key = path_key(jax.random.key(config.seed), prompt)
    return np.asarray(jax.random.uniform(key, (outputs,)))


def _fit(
    params: Any,
    rows: Rows,
    lm_config: Any,
    config: GRACE,
    output: np.ndarray,
    begin: np.ndarray,
) -> tuple[np.ndarray, float, int]:
    """Find what the matrix should have given at the prompt's last token."""
    value, memory, steps = jnp.asarray(begin), _adam(config.lr).init(jnp.asarray(begin)), 0
    while True:
        loss, grad = _gradient(
            value, jnp.asarray(output), params, rows._replace(layer=0), lm_config, rows.layer
        )
        if not np.isfinite(float(loss)):
            raise UserError(
                f"the loss after {steps} steps is not finite; expected a number; lower lr, or load "
                "the model in float32"
            )
        if float(loss) < config.stop or steps == config.steps:
            return np.asarray(value), float(loss), steps
        value, memory = _step(_adam(config.lr).update, grad, memory, value)
        steps += 1


@lru_cache(maxsize=16)
def _adam(lr: float) -> optax.GradientTransformation:
    # One object for one rate: it is a static argument of a compiled step.
    return optax.adam(lr)


@partial(jax.jit, static_argnums=(4, 5))
def _gradient(value, output, params, rows, lm_config, layer):
    point = f"{join(lm.layer_prefix(lm_config, layer), down_name(lm_config, layer))}:out"

    def objective(value):
        change = Intervention(point, rows.prompt_end, (value - output)[None])
        log_p, _ = log_probs(
            params, lm_config, rows.x, rows.answers.at, layer=layer, interventions=(change,)
        )
        return mean_nll(log_p, rows.answers.ids, rows.answers.mask)[0]

    return jax.value_and_grad(objective)(value)


@partial(jax.jit, static_argnums=0)
def _step(update, grad, memory, value):
    updates, memory = update(grad, memory, value)
    return optax.apply_updates(value, updates), memory
