"""What a layer should say about a subject so that the model gives the new answer: v*.

The vector δ is found by gradient descent through the blocks above, for many requests at a time.
Nothing before the subject's last token depends on δ, so its keys and values are computed once, and
so are the blocks below; only the few tokens from the subject on run in every step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxsys.core.errors import UserError
from jaxsys.edit.contract import Editable, Request
from jaxsys.edit.editable import Encoded, check_length, down_name, encode, last_token, round_up
from jaxsys.models import lm
from jaxsys.models.lm.families import layout_of

EASE = 0.1  # PMET: weight of the likelihood once the target is the likeliest answer
CALM = 0.01  # PMET: weighted divergence at which it then stops


@dataclass(frozen=True)
class TargetConfig:
    """Choose how v* is found; None: the default of the model's size (`jaxsys.edit.defaults`).

    Attributes:
      steps: forward passes at most; the last one takes no step.
      lr: of Adam.
      clamp: c: ‖δ‖ is kept at most c ‖v_0‖.
      weight_decay: c_wd.
      kl: c_kl, of the divergence on "SUBJECT is a".
      stop: loss at which a request is done.
      prefixes: texts put before the prompt; None: sampled from the model.
      seed: of that sampling.
      batch: requests that run at one time.

    >>> TargetConfig(steps=25).stop
    0.05
    """

    steps: int | None = None
    lr: float | None = None
    clamp: float | None = None
    weight_decay: float | None = None
    kl: float | None = None
    stop: float = 0.05
    prefixes: tuple[str, ...] | None = None
    seed: int = 0
    batch: int = 16


class Targets(NamedTuple):
    """Hold what was found for N requests.

    Attributes:
      value: v* = v_0 + δ, [N, D] float32.
      initial: v_0, what the layer says at the bare prompt.
      loss: at the end, [N].
      nll: mean negative log-likelihood of a target token over the prompts at the end, [N] nats.
      steps: forward passes taken, [N].

    >>> Targets(*[np.zeros((1, 2))] * 2, *[np.zeros(1)] * 3).value.shape
    (1, 2)
    """

    value: Any
    initial: Any
    loss: Any
    nll: Any
    steps: Any


class Problem(NamedTuple):
    """Hold the rows of N requests: P prompts and the row for the divergence, R = P + 1 each.

    Attributes:
      before: tokens before the lookup token, [N · R, Tp], padded on the right.
      lengths: how many of them count, [N · R].
      after: the tokens from there to the last but one of the target, [N · R, S].
      targets: ids of the target, [N, P, M].
      places: index in ``after`` of the token before each, [N, P, M].
      mask: which of the M count, [N, P, M].

    >>> Problem(*[np.zeros((1, 1))] * 6).after.shape
    (1, 1)
    """

    before: Any
    lengths: Any
    after: Any
    targets: Any
    places: Any
    mask: Any


def make_problem(
    model: Editable, requests: Sequence[Request], prefixes: Sequence[str], rows: int | None = None
) -> Problem:
    """Encode requests, each with no prefix and with every prefix, and "SUBJECT is a".

    Args:
      model: its tokenizer is used.
      requests: N of them.
      prefixes: P - 1 texts.
      rows: pad to so many requests by repeating the last one.

    >>> from jaxsys.data import ByteTokenizer
    >>> model = Editable(lm.LMConfig("llama", 256, 32, 2, 4, 2, 8, 48, 64), ByteTokenizer())
    >>> make_problem(model, [Request("Rome is in", "Rome", "Gaul")], ("So",)).after.shape
    (3, 12)
    """
    padded = [*requests, *[requests[-1]] * ((rows or 0) - len(requests))]
    encoded = [[encode(model, request, p) for p in ("", *prefixes)] for request in padded]
    parts = []
    for request, prompts in zip(padded, encoded, strict=True):
        parts += [(e.ids[: e.lookup], e.ids[e.lookup : -1]) for e in prompts]
        text = f"{request.subject.strip()} is a"
        ids = tuple(int(i) for i in model.tokenizer.encode(text))
        at = last_token(model, text, len(request.subject.strip()))
        parts.append((ids[:at], ids[at : at + 1]))
    longest = [max(1, *(len(part[side]) for part in parts)) for side in (0, 1)]
    check_length(model, max(len(a) + len(b) for a, b in parts))
    before = np.zeros((len(parts), round_up(longest[0], 16)), np.int32)
    after = np.zeros((len(parts), round_up(longest[1], 4)), np.int32)
    for i, (a, b) in enumerate(parts):
        before[i, : len(a)], after[i, : len(b)] = a, b
    lengths = np.array([len(a) for a, _ in parts], np.int32)
    return Problem(before, lengths, after, *_answers(encoded))


def _answers(encoded: list[list[Encoded]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    longest = max(len(e.ids) - e.split for prompts in encoded for e in prompts)
    m = 1 << (longest - 1).bit_length()
    shape = (len(encoded), len(encoded[0]), m)
    targets, places = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    mask = np.zeros(shape, bool)
    for i, prompts in enumerate(encoded):
        for j, e in enumerate(prompts):
            n = len(e.ids) - e.split
            targets[i, j, :n] = e.ids[e.split :]
            places[i, j, :n] = np.arange(e.split - e.lookup - 1, len(e.ids) - e.lookup - 1)
            mask[i, j, :n] = True
    return targets, places, mask


def points(config: Any, layer: int, kind: str) -> tuple[str, ...]:
    """Give the points, relative to the block, that δ is added to.

    Args:
      config: the model.
      layer: of the block.
      kind: ``mlp`` (what the edited matrix writes: ROME), ``layer`` (the residual stream after the
        block: MEMIT) or ``joint`` (what attention and the edited matrix write: PMET).

    >>> points(lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64), 0, "joint")
    ('mlp.down_proj:out', 'self_attn.o_proj:out')
    """
    down = f"{down_name(config, layer)}:out"
    kinds = {"mlp": (down,), "layer": (":out",), "joint": (down, f"{layout_of(config).out}:out")}
    return kinds[kind]


def find_targets(
    model: Editable,
    params: Any,
    requests: Sequence[Request],
    layer: int,
    kind: str,
    config: TargetConfig,
) -> Targets:
    """Find v* for each request, `TargetConfig.batch` of them at a time.

        L(δ) = mean over prefixes of -(1/|o|) Σ_t log p(o_t) + c_kl KL(p_δ ‖ p_0)
               + c_wd ‖δ‖ / ‖v_0‖²

    where the divergence is taken at the subject's last token of "SUBJECT is a". After each step of
    Adam δ is projected to ‖δ‖ ≤ c ‖v_0‖. For ``joint`` both offsets have decay and projection of
    their own, and once the target is the likeliest answer everywhere its likelihood weighs a tenth
    and the request stops at a small divergence.

    Args:
      model: the model.
      params: its parameters.
      requests: N.
      layer: where δ is added.
      kind: see `points`; the first of its points is what is returned.
      config: without None, as `defaults.settle` makes it.

    Returns:
      `Targets` in the order of the requests.

    Raises:
      UserError: if an offset is not finite.

    Reference:
      arXiv 2202.05262 (ROME), equation 4; arXiv 2308.08742 (PMET), section 4.2.

    >>> from jaxsys.data import ByteTokenizer
    >>> model = Editable(lm.LMConfig("llama", 256, 32, 2, 4, 2, 8, 48, 64), ByteTokenizer())
    >>> config = TargetConfig(2, 0.5, 4.0, 0.5, 0.0625, prefixes=())
    >>> find_targets(model, {}, [Request("Rome is in", "Rome", "G")], 9, "mlp", config)
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: layer 9 is asked for; the model has layers 0 to 1; choose ...
    """
    assert config.prefixes is not None
    behind = [len(e.ids) - e.lookup for e in (encode(model, request) for request in requests)]
    order = np.argsort(behind, kind="stable")  # like lengths together, so that little is padding
    found = []
    for first in range(0, len(requests), config.batch):
        part = [requests[i] for i in order[first : first + config.batch]]
        rows = min(1 << (len(part) - 1).bit_length(), config.batch)
        problem = make_problem(model, part, config.prefixes, rows)
        result = _find(
            model.config, params, problem, layer, points(model.config, layer, kind), config
        )
        found.append(Targets(*(np.asarray(x)[: len(part)] for x in result)))
    places = np.argsort(order)
    whole = Targets(*(np.concatenate(parts)[places] for parts in zip(*found, strict=True)))
    wrong = np.flatnonzero(~np.isfinite(whole.value).all(axis=1))
    if wrong.size:
        raise UserError(
            f"the target value of request {wrong[0]} is not finite after {whole.steps[wrong[0]]} "
            f"steps at a rate of {config.lr}; expected numbers; lower the rate or the clamp"
        )
    return whole


def _find(config, params, problem: Problem, layer: int, names: tuple[str, ...], options) -> Targets:
    x, stores, start, initial = _prepare(config, params, problem, layer, names)
    rows = problem.targets.shape[1] + 1
    v0 = tuple(v.reshape(-1, rows, v.shape[-1])[:, 0].astype(jnp.float32) for v in initial)
    numbers = {
        name: jnp.float32(getattr(options, name))
        for name in ("lr", "clamp", "weight_decay", "kl", "stop")
    }
    delta, loss, nll, steps = _descend(
        params, x, stores, start, v0, problem, numbers, jnp.int32(options.steps),
        config=config, layer=layer, names=names,
    )  # fmt: skip
    return Targets(v0[0] + delta[0], v0[0], loss, nll, steps)


def _prepare(config, params, problem: Problem, layer: int, names: tuple[str, ...]):
    """Run what δ does not reach: all blocks before the lookup token, blocks below behind it."""
    before, after = jnp.asarray(problem.before), jnp.asarray(problem.after)
    start = jnp.asarray(problem.lengths)
    length = before.shape[1] + after.shape[1]
    none = jnp.zeros_like(start)
    positions = start[:, None] + jnp.arange(after.shape[1])[None]
    x = lm.embed(params, config, before)
    y = lm.embed(params, config, after, positions)
    empty = (before.shape[0], config.kv_heads, length, config.head_width)
    stores, found = [], {}
    for i in range(config.layers):
        block = lm.layer(params, config, i)
        store = (jnp.zeros(empty, x.dtype), jnp.zeros(empty, x.dtype))
        x, store, _ = lm.block(block, config, i, x, store=store, start=none)
        if i < layer:
            y, store, _ = lm.block(block, config, i, y, store=store, start=start)
        if i == layer:
            _, _, found = lm.block(block, config, i, y, store=store, start=start, taps=names)
        if i >= layer:
            stores.append(store)
    return y, tuple(stores), start, [found[name][:, 0] for name in names]


class _State(NamedTuple):
    step: Int[Array, ""]
    delta: tuple[Array, ...]
    adam: Any
    done: Array
    factor: Array
    reference: Array
    loss: Array
    nll: Array
    steps: Array


@partial(jax.jit, static_argnames=("config", "layer", "names"))
def _descend(params, x, stores, start, v0, problem, numbers, most, *, config, layer, names):
    n = problem.targets.shape[0]
    joint = len(names) > 1
    adam = optax.scale_by_adam()

    def objective(delta, factor, reference, first):
        logits, own = _answer(params, x, stores, start, problem, delta, config, layer, names)
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
        chosen = jnp.take_along_axis(log_p, problem.targets[..., None], axis=-1)[..., 0]
        count = jnp.sum(problem.mask, axis=-1)
        nll = jnp.mean(-jnp.sum(jnp.where(problem.mask, chosen, 0.0), axis=-1) / count, axis=-1)
        now = jax.nn.log_softmax(own.astype(jnp.float32))
        reference = jnp.where(first, jax.lax.stop_gradient(now), reference)
        kl = numbers["kl"] * jnp.sum(jnp.exp(now) * (now - reference), axis=-1)
        decay = sum(_norm(d) / _norm(v) ** 2 for d, v in zip(delta, v0, strict=True))
        loss = factor * nll + kl + numbers["weight_decay"] * decay
        likeliest = (jnp.argmax(log_p, axis=-1) == problem.targets) | ~problem.mask
        return jnp.sum(loss), (loss, nll, kl, jnp.all(likeliest, axis=(1, 2)), reference)

    def body(s: _State) -> _State:
        grad, (loss, nll, kl, likeliest, reference) = jax.grad(objective, has_aux=True)(
            s.delta, s.factor, s.reference, s.step == 0
        )
        stopped, factor = loss < numbers["stop"], s.factor
        if joint:
            factor = jnp.where(likeliest, EASE, 1.0)
            stopped |= likeliest & (kl <= CALM)
        stopped = s.done | stopped | (s.step == most - 1)
        updates: Any
        updates, adam_state = adam.update(grad, s.adam)
        moved = tuple(
            _project(d - numbers["lr"] * u, numbers["clamp"] * _norm(v))
            for d, u, v in zip(s.delta, updates, v0, strict=True)
        )
        keep = stopped[:, None]
        delta = tuple(jnp.where(keep, d, m) for d, m in zip(s.delta, moved, strict=True))
        loss, nll = (jnp.where(s.done, *pair) for pair in ((s.loss, loss), (s.nll, nll)))
        steps = s.steps + ~s.done
        return _State(
            s.step + 1, delta, adam_state, stopped, factor, reference, loss, nll, steps
        )  # fmt: skip

    delta = tuple(jnp.zeros_like(v) for v in v0)
    zero = jnp.zeros(n, jnp.float32)
    vocab = jnp.zeros((n, config.vocab_size), jnp.float32)
    state = _State(
        jnp.int32(0), delta, adam.init(delta), jnp.zeros(n, bool), jnp.ones(n, jnp.float32), vocab,
        zero, zero, jnp.zeros(n, jnp.int32),
    )  # fmt: skip
    end = jax.lax.while_loop(lambda s: ~jnp.all(s.done), body, state)
    return end.delta, end.loss, end.nll, end.steps


def _answer(params, x, stores, start, problem, delta, config, layer, names):
    """Give logits before each target token [N, P, M, V] and at the subject alone [N, V]."""
    n, p, m = problem.targets.shape
    changes = [
        lm.Intervention(name, jnp.int32(0), jnp.repeat(d, p + 1, axis=0))
        for name, d in zip(names, delta, strict=True)
    ]
    for i in range(layer, config.layers):
        x, _, _ = lm.block(
            lm.layer(params, config, i),
            config,
            i,
            x,
            store=stores[i - layer],
            start=start,
            interventions=changes if i == layer else (),
        )
    rows = x.reshape(n, p + 1, *x.shape[1:])
    wanted = jnp.take_along_axis(rows[:, :p], problem.places[..., None], axis=2)
    both = jnp.concatenate([wanted.reshape(n, p * m, -1), rows[:, p, :1]], axis=1)
    logits = lm.head(params, config, both)
    return logits[:, :-1].reshape(n, p, m, -1), logits[:, -1]


def _norm(v: Float[Array, "N D"]) -> Float[Array, "N"]:
    # Its gradient at nought is nought, as at the start δ is.
    square = jnp.sum(jnp.square(v), axis=-1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def _project(v: Float[Array, "N D"], most: Float[Array, "N"]) -> Float[Array, "N D"]:
    norm = jnp.linalg.norm(v, axis=-1)
    return v * jnp.minimum(1.0, most / jnp.maximum(norm, 1e-30))[:, None]
