"""Mixtures of experts: choosing experts per token, and running each on its own tokens only.

Experts are separate arrays, as in the checkpoint, and each runs under a switch over a few row
counts: none of the work if nobody chose it, else a product just large enough for its tokens; a
single token switches over the experts instead, once for each that it visits. One token thus reads
only those, and a long prompt costs little more than its share; the result is exact whatever the
load.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsys.models.lm.config import LMConfig
from jaxsys.models.lm.layout import Layout, expert_roles, subtree
from jaxsys.models.lm.linear import ACTIVATIONS, linear
from jaxsys.models.lm.taps import Probe

# One token is worth a switch over all experts for each that it visits, unless compiling so many
# branches takes longer than it saves.
MOST_BRANCHES = 64


def route(
    config: LMConfig, logits: Float[Array, "N E"]
) -> tuple[Float[Array, "N k"], Int[Array, "N k"]]:
    """Choose each token's experts and their weights.

    ``softmax``: the k largest of softmax(logits), divided by their sum if the model says so.
    ``sparsemixer``: the two largest; each has the weight that a softmax gives it over the
    candidates within a relative distance of 2ε below it, the first being left out of the second's.

    Args:
        config: the model.
        logits: the router's output.

    Returns:
        Weights in float32 and experts' indices.

    Reference: Mixtral (arXiv 2401.04088); GRIN's SparseMixer-v2 (arXiv 2409.12136).

    >>> config = LMConfig("mixtral", 9, 8, 1, 2, 2, 4, 8, 8, experts=3, experts_per_token=2)
    >>> weights, chosen = route(config, jnp.array([[0.0, 2.0, 2.0]]))
    >>> weights.tolist(), sorted(chosen[0].tolist())
    ([[0.5, 0.5]], [1, 2])
    """
    logits = logits.astype(jnp.float32)
    if config.router == "sparsemixer":
        return _sparse_mixer(logits, 2 * config.router_jitter)
    return soft_top_k(logits, config.experts_per_token, config.renormalise)


def soft_top_k(
    logits: Float[Array, "N E"], k: int, renormalise: bool
) -> tuple[Float[Array, "N k"], Int[Array, "N k"]]:
    """Take the k largest of softmax(logits), best first.

    Args:
        logits: of all experts, in float32.
        k: experts of a token.
        renormalise: divide by their sum, which is the softmax of the chosen logits alone.

    Returns:
        Weights and experts.

    >>> weights, chosen = soft_top_k(jnp.array([[0.0, 2.0, 1.0]]), 2, True)
    >>> chosen.tolist()
    [[1, 2]]
    """
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), k)
    if renormalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, chosen


def _sparse_mixer(logits: Array, distance: float) -> tuple[Array, Array]:
    weights, chosen = [], []
    free = logits
    for _ in range(2):
        best = jnp.max(free, axis=-1, keepdims=True)
        index = jnp.argmax(free, axis=-1, keepdims=True)
        far = (best - logits) / jnp.maximum(jnp.abs(logits), best) > distance
        share = jax.nn.softmax(jnp.where(far, -jnp.inf, free), axis=-1)
        weights.append(jnp.take_along_axis(share, index, axis=-1))
        chosen.append(index)
        free = jnp.where(jnp.arange(logits.shape[-1])[None] == index, -jnp.inf, free)
    return jnp.concatenate(weights, axis=-1), jnp.concatenate(chosen, axis=-1)


def feed_forward(
    params: Mapping[str, Any],
    config: LMConfig,
    names: tuple[str, str, str],
    x: Float[Array, "... D"],
    probe: Probe,
    *,
    in_out: bool = False,
) -> Float[Array, "... D"]:
    """Run down(act(gate(x)) · up(x)), or down(act(up(x))) without a gate.

    Args:
        params: subtree that holds the named modules.
        config: the model.
        names: paths of gate ("" for none), up and down.
        x: rows.
        probe: watches the points.
        in_out: matrices are [in, out].

    Returns:
        Rows of the same shape.

    >>> config = LMConfig("llama", 97, 2, 2, 2, 2, 2, 3, 64)
    >>> params = {"up": {"weight": jnp.ones((3, 2))}, "down": {"weight": jnp.ones((2, 3))}}
    >>> feed_forward(params, config, ("", "up", "down"), jnp.ones((1, 2)), Probe((), ())).shape
    (1, 2)
    """

    def run(path: str, y: Array) -> Array:
        y = linear(subtree(params, path), probe(f"{path}:in", y), in_out=in_out)
        return probe(f"{path}:out", y)

    gate, up, down = names
    act = ACTIVATIONS[config.activation]
    hidden = act(run(gate, x)) * run(up, x) if gate else act(run(up, x))
    return run(down, hidden)


def mixture(
    params: Mapping[str, Any],
    config: LMConfig,
    layout: Layout,
    x: Float[Array, "B T D"],
    probe: Probe,
) -> Float[Array, "B T D"]:
    """Run a mixture block: the weighted sum of the outputs of each token's experts.

    A tapped expert sees zeros in the place of tokens that did not choose it, so sums over its
    inputs are sums over its own tokens.

    Args:
        params: the block's subtree.
        config: the model.
        layout: names of its modules.
        x: normalised residual stream.
        probe: watches the points; watching an expert runs every expert on every row.

    Returns:
        What is added to the residual stream.

    >>> from jaxsys.models.lm.families import layout_of
    >>> from jaxsys.models.lm.init import init
    >>> config = LMConfig("mixtral", 9, 8, 1, 2, 2, 4, 8, 8, experts=3, experts_per_token=2,
    ...                   expert_width=8)
    >>> block = init(jax.random.key(0), config)["model"]["layers"]["0"]
    >>> mixture(block, config, layout_of(config), jnp.ones((1, 3, 8)), Probe((), ())).shape
    (1, 3, 8)
    """
    x = probe(f"{layout.moe}:in", x)
    router = f"{layout.moe}.gate"
    logits = linear(subtree(params, router), probe(f"{router}:in", x))
    logits = probe(f"{router}:out", logits).reshape(-1, config.experts)
    weights, chosen = route(config, logits)
    experts = subtree(params, f"{layout.moe}.experts")
    if probe.inside(".experts."):
        y = _all_rows(params, config, layout, x, weights, chosen, probe)
    elif logits.shape[0] == 1 and config.experts * config.experts_per_token <= MOST_BRANCHES:
        y = _one_row(experts, config, expert_roles(layout), x, weights[0], chosen[0])
    else:
        y = _own_rows(experts, config, expert_roles(layout), x, weights, chosen)
    return probe(f"{layout.moe}:out", y)


def _all_rows(params, config, layout, x, weights, chosen, probe) -> Array:
    shape = (*x.shape[:2], -1)
    weights, chosen = weights.reshape(shape), chosen.reshape(shape)
    y = jnp.zeros_like(x)
    gate, up, down = expert_roles(layout)
    for e in range(config.experts):
        here = chosen == e
        own = jnp.where(here.any(-1, keepdims=True), x, jnp.zeros((), x.dtype))
        expert = f"{layout.moe}.experts.{e}."
        names = (expert + gate, expert + up, expert + down)
        out = feed_forward(params, config, names, own, probe)
        y = y + out * jnp.sum(weights * here, axis=-1, keepdims=True).astype(x.dtype)
    return y


def _one_row(experts, config, names, x, weights, chosen) -> Array:
    runs = [
        lambda row, expert=experts[str(e)]: feed_forward(expert, config, names, row, Probe((), ()))
        for e in range(config.experts)
    ]
    outs = [
        jax.lax.switch(chosen[j], runs, x) * weights[j].astype(x.dtype)
        for j in range(config.experts_per_token)
    ]
    return sum(outs[1:], outs[0])


def _own_rows(experts, config, names, x, weights, chosen) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    sizes = row_counts(rows.shape[0], config)
    y = jnp.zeros_like(rows)
    for e in range(config.experts):
        here = chosen == e
        weight = jnp.sum(weights * here, axis=-1).astype(rows.dtype)
        own = here.any(-1)
        # As many steps as there are row counts that are too small.
        branch = jnp.sum(jnp.sum(own) > jnp.array((0, *sizes[:-1])))
        runs = [_run_expert(experts[str(e)], config, names, size) for size in sizes]
        y = jax.lax.switch(branch, [lambda y, *_: y, *runs], y, rows, own, weight)
    return y.reshape(x.shape)


def row_counts(n_rows: int, config: LMConfig) -> tuple[int, ...]:
    """Choose the sizes of product that an expert may need: about 1.25 and 2.5 of its share, all.

    >>> config = LMConfig("mixtral", 9, 8, 1, 2, 2, 4, 8, 8, experts=8, experts_per_token=2)
    >>> row_counts(1, config), row_counts(512, config)
    ((1,), (160, 320, 512))
    """
    if n_rows <= 8:
        return (n_rows,)
    share = n_rows * config.experts_per_token / config.experts
    wanted = (8 * -int(-factor * share // 8) for factor in (1.25, 2.5))
    return (*sorted({size for size in wanted if size < n_rows}), n_rows)


def _run_expert(expert, config: LMConfig, names: tuple[str, str, str], size: int):
    def run(y: Array, rows: Array, own: Bool[Array, "N"], weight: Array) -> Array:
        silent = Probe((), ())
        if size == rows.shape[0]:
            return y + feed_forward(expert, config, names, rows, silent) * weight[:, None]
        index = jnp.nonzero(own, size=size, fill_value=rows.shape[0])[0]
        picked = rows.at[index].get(mode="fill", fill_value=0)
        out = feed_forward(expert, config, names, picked, silent)
        out = out * weight.at[index].get(mode="fill", fill_value=0)[:, None]
        return y.at[index].add(out, mode="drop")

    return run
