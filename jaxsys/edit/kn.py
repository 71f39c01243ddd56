"""KN: find the feed-forward neurons that express a fact, and rewrite what they say.

A neuron i of layer l is one input of the layer's down-projection. Its attribution is the integrated
gradient of the answer's probability over its activation w̄ at the prompt's last token (Dai et al.,
equation 4):

    Attr(l, i) = w̄_i · (1/m) Σ_{k=1..m} ∂P(answer | w_l = (k/m) w̄) / ∂w_i

Knowledge neurons are those above a part of the largest attribution; of several prompts for a fact,
those shared by enough of them. The edit adds to each one's value vector, a column of the
down-projection: v ← v + s (e_target − e_answer), with e the word embeddings and s = 2.

Only the last token changes with its activations, so one token runs through the blocks for each
step, beside stored keys and values of the others.

Reference: arXiv 2104.08696.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxsys.core.errors import UserError
from jaxsys.edit.contract import Editable, Edited, Info, Request
from jaxsys.edit.editable import (
    add_delta,
    check_length,
    down_name,
    get_matrix,
    matrix_path,
    round_up,
)
from jaxsys.edit.rows import checked
from jaxsys.evaluate.score import encode_pair
from jaxsys.models import lm
from jaxsys.models.lm.families import layout_of
from jaxsys.models.lm.layout import join, subtree
from jaxsys.models.lm.linear import rows_of as embedding_rows


@dataclass(frozen=True)
class KN:
    """Set KN.

    Attributes:
      steps: m; the paper takes 20, and 1 is what the code of the study has for Llama (one
        gradient, here at the full activation).
      threshold: part of the largest attribution that a neuron must exceed; 0.3 in the paper, 0.2
        in the released code.
      share: with paraphrases, the part of the prompts that a neuron must exceed in.
      scale: s; 2 for answers of one token, which are the only ones here.
      paraphrases: prompt of a request to other prompts for its fact, which refine the neurons;
        none by default, as released.
      rows_per_call: tokens of one program.
      several: what to do with a target of several tokens: ``refuse`` it, or edit towards its
        ``first``, so that a whole set of facts can be run.

    Raises:
      UserError: for numbers out of range.

    >>> KN(steps=1).threshold
    0.2
    """

    steps: int = 20
    threshold: float = 0.2
    share: float = 0.7
    scale: float = 2.0
    paraphrases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rows_per_call: int = 60
    several: Literal["refuse", "first"] = "refuse"

    def __post_init__(self) -> None:
        fine = 0 <= self.threshold < 1 and 0 <= self.share < 1
        if not fine or min(self.steps, self.rows_per_call) < 1:
            raise UserError(
                f"steps is {self.steps}, threshold {self.threshold}, share {self.share} and "
                f"rows_per_call {self.rows_per_call}; expected at least 1, parts from 0 to below "
                "1, and at least 1; correct them"
            )


class Attribution(NamedTuple):
    """Hold the attributions of one prompt.

    Attributes:
      scores: [L, F] Attr.
      answer: the token whose probability was attributed.
      prediction: the token that the model finds likeliest.

    >>> Attribution(np.zeros((1, 2)), 5, 5).answer
    5
    """

    scores: Float[np.ndarray, "L F"]
    answer: int
    prediction: int


def attribute(
    model: Editable,
    params: Any,
    ids: Sequence[int],
    answer: int | None = None,
    steps: int = 20,
    rows_per_call: int = 60,
) -> Attribution:
    """Compute every neuron's integrated gradient for a prompt.

    Args:
      model: its configuration is used.
      params: of the model.
      ids: the prompt's tokens.
      answer: token whose probability is attributed; None for the model's own prediction.
      steps: m.
      rows_per_call: tokens of one program.

    Raises:
      UserError: for a prompt that is too long, or mixtures among the layers.

    >>> config = lm.LMConfig("llama", 16, 8, 1, 2, 2, 4, 12, 64)
    >>> params = lm.init(jax.random.key(0), config)
    >>> attribute(Editable(config, None), params, [1, 2, 3], steps=1, rows_per_call=1).scores.shape
    (1, 12)
    """
    config = model.config
    points = tuple(
        f"{join(lm.layer_prefix(config, i), down_name(config, i))}:in" for i in range(config.layers)
    )
    check_length(model, len(ids) + 1)
    width = round_up(max(len(ids) - 1, 1), 8)
    tokens = np.zeros((1, width), np.int32)
    tokens[0, : len(ids) - 1] = ids[:-1]
    mask = np.arange(width)[None] < len(ids) - 1
    cache, base, prediction = _read(
        params, tokens, mask, np.int32(ids[-1]), config=config, points=points
    )
    goal = int(prediction) if answer is None else answer
    layers, ks = np.divmod(np.arange(config.layers * steps), steps)
    scores = np.zeros((config.layers, base.shape[-1]))
    for start in range(0, len(layers), rows_per_call):
        layer, k = layers[start : start + rows_per_call], ks[start : start + rows_per_call]
        rows = len(layer)
        # Filled up with repetitions, which are then not counted.
        full = np.resize(layer, rows_per_call), np.resize((k + 1) / steps, rows_per_call)
        slopes = _slopes(
            params,
            cache,
            base,
            np.int32(ids[-1]),
            np.int32(goal),
            full[0].astype(np.int32),
            full[1].astype(np.float32),
            config=config,
            points=points,
        )
        np.add.at(scores, layer, np.asarray(slopes, np.float64)[:rows])
    return Attribution(scores * np.asarray(base, np.float64) / steps, goal, int(prediction))


@partial(jax.jit, static_argnames=("config", "points"))
def _read(params, tokens, mask, last, *, config, points):
    """Store keys and values of all tokens but the last, and tap the last one's activations."""
    dtype = jax.tree.leaves(params)[0].dtype
    cache = lm.init_cache(config, 1, tokens.shape[1] + 8, dtype)
    cache = lm.apply(params, config, tokens, cache=cache, mask=mask, last=True).cache
    out = lm.apply(params, config, jnp.full((1, 1), last), cache=cache, taps=points)
    base = jnp.stack([out.taps[point][0, 0].astype(jnp.float32) for point in points])
    return cache, base, out.logits[0, 0].argmax()


@partial(jax.jit, static_argnames=("config", "points"))
def _slopes(params, cache, base, last, answer, layer, part, *, config, points):
    """Differentiate each row's P(answer), one layer of a row scaled, by that layer's activation."""
    rows = layer.shape[0]
    cache = jax.tree.map(lambda a: jnp.broadcast_to(a, (rows, *a.shape[1:])), cache)
    here = layer[None] == jnp.arange(len(points))[:, None]  # [L, B]
    shift = (here * (part - 1.0)[None])[:, :, None] * base[:, None]

    def probability(shift):
        changes = [lm.Intervention(point, jnp.int32(0), shift[i]) for i, point in enumerate(points)]
        out = lm.apply(
            params, config, jnp.full((rows, 1), last), cache=cache, interventions=changes
        )
        logits = out.logits[:, 0].astype(jnp.float32)
        return jnp.exp(logits[:, answer] - jax.nn.logsumexp(logits, axis=-1)).sum()

    slopes = jax.grad(probability)(shift)  # [L, B, F]
    return jnp.take_along_axis(slopes, layer[None, :, None], axis=0)[0]


def knowledge_neurons(
    found: Sequence[Attribution], threshold: float = 0.2, share: float = 0.7
) -> list[tuple[int, int]]:
    """List the neurons above a part of the largest attribution, in enough of the prompts.

    Args:
      found: of one prompt or several.
      threshold: part of a prompt's largest attribution.
      share: of several prompts, the part that a neuron must exceed in.

    Returns:
      (layer, neuron), in order.

    Raises:
      UserError: if an attribution is not finite.

    >>> scores = np.array([[1.0, 0.1], [0.5, 0.0]])
    >>> knowledge_neurons([Attribution(scores, 0, 0)])
    [(0, 0), (1, 0)]
    """
    votes = np.zeros(found[0].scores.shape)
    for one in found:
        if not np.isfinite(one.scores).all():
            raise UserError(
                "the attributions are not finite; expected numbers; load the model in float32"
            )
        votes += one.scores > threshold * max(one.scores.max(), 0.0)
    enough = votes > share * len(found) if len(found) > 1 else votes > 0
    return [(int(layer), int(i)) for layer, i in np.argwhere(enough)]


def edit_kn(
    model: Editable,
    config: KN,
    params: Any,
    requests: Sequence[Request],
    stats: Any = None,
    state: Any = None,
) -> Edited:
    """Rewrite the value vectors of each request's knowledge neurons, one request after the other.

    The attributed answer is the first token of the old answer where that is known, else what the
    model predicts.

    Args:
      model: configuration and tokenizer.
      config: see `KN`.
      params: not changed.
      requests: with targets of one token.
      stats: not used.
      state: not used; edits follow one another in the parameters alone.

    Returns:
      The edited parameters; the factors have one column for each neuron.

    Raises:
      UserError: for a target of several tokens, or requests that cannot be edited.

    Reference: arXiv 2104.08696, section 5.

    >>> from jaxsys.data import ByteTokenizer
    >>> lm_config = lm.LMConfig("llama", 256, 8, 1, 2, 2, 4, 12, 64)
    >>> params, facts = lm.init(jax.random.key(0), lm_config), [Request("Rome is", "Rome", "big")]
    >>> edit_kn(Editable(lm_config, ByteTokenizer()), KN(steps=1), params, facts)
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: the target 'big' has 4 tokens; ...
    """
    del stats, state
    rows = checked(model, requests)
    for request, row in zip(requests, rows, strict=True):
        if config.several == "refuse" and len(row.ids) - row.split != 1:
            raise UserError(
                f"the target {request.target[:60]!r} has {len(row.ids) - row.split} tokens; KN "
                "adds one token's embedding and takes targets of 1; choose another target, or "
                "several='first'"
            )
    if model.config.embed_width:
        raise UserError(
            f"this {model.config.model_type} model's embeddings are narrower than its blocks; KN "
            "adds embeddings to their outputs; choose another method"
        )
    columns: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    neurons, answers = [], []
    for request, row in zip(requests, rows, strict=True):
        goal = _truth(model, request)
        prompts = [row.ids[: row.split]]
        for text in config.paraphrases.get(request.prompt, ()):
            prompts.append(tuple(encode_pair(model.tokenizer, text.rstrip(), " x").context))
        found = [
            attribute(model, params, ids, goal, config.steps, config.rows_per_call)
            for ids in prompts
        ]
        chosen = knowledge_neurons(found, config.threshold, config.share)
        change = config.scale * (
            _embedding(params, model.config, row.ids[row.split])
            - _embedding(params, model.config, found[0].prediction)
        )
        params = _rewrite(model, params, chosen, change, columns)
        neurons.append(len(chosen))
        answers.append(found[0].answer)
    factors = {
        path: (jnp.asarray(np.stack(a, axis=1)), jnp.asarray(np.stack(b, axis=1)))
        for path, pairs in columns.items()
        for a, b in [zip(*pairs, strict=True)]
    }
    notes = {"neurons": np.array(neurons), "answer": np.array(answers), "steps": config.steps}
    return Edited(params, None, Info(factors, notes))


def _truth(model: Editable, request: Request) -> int | None:
    if not request.truth:
        return None
    pair = encode_pair(model.tokenizer, request.prompt.rstrip(), f" {request.truth}")
    return int(pair.continuation[0])


def _embedding(params: Any, config: Any, token: int) -> np.ndarray:
    table = subtree(params, join(config.prefix, layout_of(config).embed))["weight"]
    return np.asarray(embedding_rows(table, jnp.array([token]))[0], np.float32)


def _rewrite(
    model: Editable,
    params: Any,
    chosen: Sequence[tuple[int, int]],
    change: np.ndarray,
    columns: dict[str, list[tuple[np.ndarray, np.ndarray]]],
) -> Any:
    """Add a change to the chosen columns, and note it as a factor of each."""
    by_layer: dict[int, list[int]] = {}
    for layer, i in chosen:
        by_layer.setdefault(layer, []).append(i)
    for layer, indices in by_layer.items():
        path = matrix_path(model.config, layer)
        inputs = get_matrix(model.config, params, path).shape[1]
        b = np.zeros((inputs, 1), np.float32)
        b[indices] = 1
        # All of a request's neurons get the same vector: one factor says it for a layer.
        columns.setdefault(path, []).append((change, b[:, 0]))
        params = add_delta(model.config, params, path, jnp.asarray(change[:, None]), jnp.asarray(b))
    return params
