"""What test_host.py and its workers both run: a small model, its data, every kind of strategy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.localsgd.strategy import Strategy, make_plan, presets

STEPS = 6
_P = presets(3)
STRATEGIES: dict[str, Strategy] = {
    name: _P[name]
    for name in (
        "ssgd",
        "wfbp",
        "local",
        "equal",
        "dreamddp",
        "dreamddp-eager",
        "diloco",
        "streaming",
    )
} | {
    "local-int8": dataclasses.replace(_P["local"], codec="int8", error_feedback=True),
    "ssgd-f16": dataclasses.replace(_P["ssgd"], codec="f16"),
    "pre-after": dataclasses.replace(_P["equal"], launch="after"),
    "moments": dataclasses.replace(_P["equal"], moment_periods=(("*mu*", 2),)),
}


def loss_fn(params, x):
    y = jnp.tanh(x @ params["a"]["w"] + params["a"]["b"][None])
    y = jnp.tanh(y @ params["b"]["w"])
    return jnp.mean((y @ params["c"]["w"] - 1.0) ** 2)


def start(workers):
    k = jax.random.split(jax.random.key(1), 3)
    params = {
        "a": {"w": jax.random.normal(k[0], (3, 16)), "b": jnp.zeros(16)},
        "b": {"w": jax.random.normal(k[1], (16, 8))},
        "c": {"w": jax.random.normal(k[2], (8, 1))},
    }
    return params, np.asarray(jax.random.normal(jax.random.key(2), (STEPS, workers, 5, 3)))


def phases(strategy, n_layers):
    return make_plan(strategy, [1.0] * n_layers, [2.0] * n_layers).phases
