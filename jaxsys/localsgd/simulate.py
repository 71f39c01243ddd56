"""Simulate workers on the devices of one process: any loss, any strategy, one function call."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxsys.core.errors import UserError
from jaxsys.core.mesh import Driver, over_replicas, replica_mesh
from jaxsys.core.tree import Layer
from jaxsys.localsgd.exchange import divergence
from jaxsys.localsgd.layers import find_layers
from jaxsys.localsgd.plan import SyncPlan
from jaxsys.localsgd.step import (
    Due,
    Info,
    LossFn,
    State,
    due,
    init_state,
    partial_local_sgd,
)
from jaxsys.localsgd.strategy import Strategy, make_plan


class Simulation(NamedTuple):
    """What a simulation leaves behind.

    Attributes:
      state: the state of all workers, every array with a leading axis R; it can be continued from.
      loss: each worker's own loss before each step, [steps, R].
      divergence: Γ of each layer after every ``divergence_every`` steps, [k, L].
      plan: which layers were synchronised when.
      layers: the layers that the plan's indices mean, in backward order.

    >>> Simulation._fields
    ('state', 'loss', 'divergence', 'plan', 'layers')
    """

    state: State
    loss: np.ndarray
    divergence: np.ndarray
    plan: SyncPlan | tuple[tuple[int, ...], ...]
    layers: tuple[Layer, ...]


def simulate(
    loss_fn: LossFn,
    params: Any,
    optimizer: optax.GradientTransformation,
    batch_at: Callable[[int], Any],
    *,
    workers: int,
    steps: int,
    strategy: Strategy,
    plan: SyncPlan | Sequence[tuple[int, ...]] | None = None,
    layers: Sequence[Layer] | None = None,
    driver: Driver = "vmap",
    mesh: Mesh | None = None,
    seed: int = 0,
    divergence_every: int = 0,
    on_step: Callable[[int, Info], None] | None = None,
    state: State | None = None,
) -> Simulation:
    """Train R simulated workers that are kept together by a strategy.

    Nothing crosses a network, so this shows what a strategy does to the loss, not to the time. Each
    distinct thing that a step can have to do (`jaxsys.localsgd.step.Due`) is compiled once, and
    again only for another loss function, optimiser, strategy, driver or shape.

    Args:
      loss_fn: ``loss_fn(params, batch) -> scalar``, of one worker.
      params: the parameters from which all workers start.
      optimizer: any optax transformation; each worker has a state of its own.
      batch_at: ``step -> batch`` whose arrays have a leading axis R; steps count from 0.
      workers: R.
      steps: how many steps to take.
      strategy: what is averaged, when and how (`jaxsys.localsgd.strategy.presets`).
      plan: a plan or its phases (layer indices of each iteration of the period); by default what
        the strategy plans when every layer takes one second to compute and one to send.
      layers: groups of leaves in backward order; by default modules, as `find_layers` finds them.
      driver: ``vmap`` on one device, ``pmap`` or ``shard_map`` on R.
      mesh: for ``shard_map``: R devices; the first R by default.
      seed: of the codec's stochastic rounding.
      divergence_every: measure the divergence after every so many steps; 0 never does.
      on_step: called with the number of each step and its `Info`, whose arrays lead with R.
      state: continue from here (as returned by an earlier call); `params` then only gives shapes.

    Returns:
      A `Simulation`.

    Raises:
      UserError: workers or steps below 1, fewer devices than workers, a batch or state of another
        number of workers, or a plan that names layers that do not exist.

    >>> from jaxsys.localsgd.strategy import presets
    >>> run = simulate(lambda p, x: jnp.mean((p["w"] - x) ** 2), {"w": jnp.zeros(1)},
    ...                optax.sgd(0.5), lambda step: jnp.array([[1.0], [3.0]]),
    ...                workers=2, steps=2, strategy=presets(2)["local"])
    >>> mean_params(run.state)["w"].tolist(), run.loss.tolist()
    ([2.0], [[1.0, 9.0], [0.0, 0.0]])
    """
    _check_sizes(workers, steps, divergence_every)
    mesh = _check_devices(driver, workers, mesh)
    first = 0 if state is None else _first_step(state, workers)
    shapes = jax.tree.map(lambda x: x[0], _checked_batch(batch_at(first), workers))
    chosen = tuple(find_layers(loss_fn, params, shapes) if layers is None else layers)
    unit_s = [1.0] * len(chosen)
    plan = make_plan(strategy, unit_s, unit_s) if plan is None else plan
    phases = _checked_phases(plan, len(chosen))
    if state is None:
        one = init_state(params, optimizer, chosen, strategy, jax.random.key(seed))
        reached = jax.tree.map(lambda x: jnp.broadcast_to(x, (workers, *jnp.shape(x))), one)
    else:
        reached = state
    losses, gammas = [], []
    for step in range(first, first + steps):
        program = _step_program(
            loss_fn, optimizer, chosen, strategy, due(phases, strategy, step), driver, mesh
        )
        reached, info = program(reached, _checked_batch(batch_at(step), workers))
        losses.append(np.asarray(info.loss))
        if divergence_every and (step + 1) % divergence_every == 0:
            gamma = _divergence_program(chosen, driver, mesh)(reached.params)
            gammas.append(np.asarray(gamma)[0])
        if on_step is not None:
            on_step(step, info)
    return Simulation(
        state=reached,
        loss=np.stack(losses),
        divergence=np.array(gammas, np.float32).reshape(-1, len(chosen)),
        plan=plan if isinstance(plan, SyncPlan) else phases,
        layers=chosen,
    )


def mean_params(state: State) -> Any:
    """Average the parameters over the workers, as one does before using the model.

    Args:
      state: arrays with a leading axis R.

    Returns:
      A tree of parameters without that axis.

    >>> state = State({"w": jnp.array([[1.0], [3.0]])}, *[()] * 5, jnp.zeros(2), jnp.zeros(2))
    >>> mean_params(state)["w"].tolist()
    [2.0]
    """
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), state.params)


# Kept between calls, so that a second seed or a continued run compiles nothing.
@functools.lru_cache(maxsize=128)
def _step_program(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    layers: tuple[Layer, ...],
    strategy: Strategy,
    now: Due,
    driver: Driver,
    mesh: Mesh | None,
) -> Callable[..., Any]:
    algorithm = partial_local_sgd(loss_fn, optimizer, layers, strategy)
    return over_replicas(lambda s, b: algorithm.step(s, b, now), driver, mesh=mesh)


@functools.lru_cache(maxsize=16)
def _divergence_program(
    layers: tuple[Layer, ...], driver: Driver, mesh: Mesh | None
) -> Callable[..., Any]:
    return over_replicas(lambda p: divergence(p, layers), driver, mesh=mesh)


def _check_sizes(workers: int, steps: int, divergence_every: int) -> None:
    for name, value, least in (
        ("workers", workers, 1),
        ("steps", steps, 1),
        ("divergence_every", divergence_every, 0),
    ):
        if value < least:
            raise UserError(f"{name} is {value}; expected at least {least}; raise it")


def _check_devices(driver: Driver, workers: int, mesh: Mesh | None) -> Mesh | None:
    if driver == "vmap":
        return None
    have = jax.local_device_count() if mesh is None else mesh.size
    if have < workers or (mesh is not None and have != workers):
        raise UserError(
            f"{workers} workers under {driver} on {have} devices; expected one device a worker; "
            "use driver 'vmap', or ask for virtual devices with jax_num_cpu_devices before JAX is "
            "used"
        )
    if driver == "shard_map" and mesh is None:
        return replica_mesh(jax.local_devices()[:workers])
    return mesh


def _first_step(state: State, workers: int) -> int:
    found = jnp.shape(state.step)
    if found != (workers,):
        raise UserError(
            f"the state's step counter has shape {found} for {workers} workers; expected "
            f"({workers},); pass the state that a simulation of as many workers returned"
        )
    return int(np.asarray(state.step)[0])


def _checked_batch(batch: Any, workers: int) -> Any:
    for leaf in jax.tree.leaves(batch):
        if jnp.ndim(leaf) < 1 or jnp.shape(leaf)[0] != workers:
            raise UserError(
                f"batch_at gave an array of shape {jnp.shape(leaf)} for {workers} workers; "
                f"expected a first axis of {workers}; stack one batch for each worker"
            )
    return batch


def _checked_phases(
    plan: SyncPlan | Sequence[tuple[int, ...]], n_layers: int
) -> tuple[tuple[int, ...], ...]:
    phases = plan.phases if isinstance(plan, SyncPlan) else plan
    phases = tuple(tuple(int(i) for i in layers) for layers in phases)
    named = {i for layers in phases for i in layers}
    if named != set(range(n_layers)):
        odd = sorted(named ^ set(range(n_layers)))
        raise UserError(
            f"the plan leaves out or invents the layers {odd[:8]} of {n_layers}; expected every "
            "layer in some phase and no other; plan for these layers"
        )
    return phases
