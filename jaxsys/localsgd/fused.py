"""Partial local SGD as one program per step, for accelerators, in the interface of the host's step.

XLA's latency-hiding scheduler moves the per-layer collectives behind compute there; the program
keeps them apart (`jaxsys.core.mesh.over_replicas`). One process drives one device.
"""

import time
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jaxsys.core.mesh import over_replicas, stack_local, take_local
from jaxsys.core.timeline import Span
from jaxsys.core.tree import Layer
from jaxsys.localsgd.host import COMPUTE, HostInfo, Overlapped
from jaxsys.localsgd.step import Due, LossFn, State, partial_local_sgd
from jaxsys.localsgd.strategy import Strategy


def fused_local_sgd(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    layers: tuple[Layer, ...],
    strategy: Strategy,
    mesh: Mesh,
) -> Overlapped:
    """Build partial local SGD for one worker process, each step one compiled program.

    Args:
      loss_fn: ``loss_fn(params, batch) -> scalar``.
      optimizer: any optax transformation.
      layers: groups of leaves in backward order.
      strategy: what is averaged, when and how.
      mesh: one device per process (`jaxsys.core.mesh.device_pair`).

    Returns:
      The functions of the run. Its states hold global arrays [R, ...], donated from step to step;
      one step is one span, and what of it was waiting is not known (0).

    >>> from jaxsys.core.mesh import replica_mesh
    >>> import jax.numpy as jnp
    >>> run = fused_local_sgd(lambda p, x: jnp.sum((p["w"] - x) ** 2), optax.sgd(0.5),
    ...                       (Layer("w", (0,)),), Strategy(period=1),
    ...                       replica_mesh(jax.devices()[:1]))
    >>> s = run.init({"w": jnp.zeros(1)}, jax.random.key(0))
    >>> run.params(run.step(s, jnp.ones(1), Due((0,), (0,)))[0])["w"].tolist()
    [1.0]
    """
    algorithm = partial_local_sgd(loss_fn, optimizer, layers, strategy)
    programs: dict[Due, Any] = {}

    def init(params: Any, key: jax.Array) -> State:
        own = jax.device_put(algorithm.init(params, key), mesh.local_devices[0])
        return stack_local(own, mesh)

    def program(due: Due) -> Any:
        if due not in programs:
            programs[due] = over_replicas(
                lambda state, batch: algorithm.step(state, batch, due),
                "shard_map",
                mesh=mesh,
                donate=True,
                keep_collectives=True,
            )
        return programs[due]

    def step(state: State, batch: Any, due: Due) -> tuple[State, HostInfo]:
        began = time.perf_counter()
        there = stack_local(jax.device_put(batch, mesh.local_devices[0]), mesh)
        state, info = jax.block_until_ready(program(due)(state, there))
        step_s = time.perf_counter() - began
        loss, norms = take_local(info)
        spans = (Span("step", COMPUTE, 0.0, step_s),)
        return state, HostInfo(loss, norms, step_s, 0.0, 0.0, spans)

    return Overlapped(init, step, lambda state: state, lambda state: take_local(state.params))
