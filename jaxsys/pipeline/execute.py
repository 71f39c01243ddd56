"""Run a plan: each worker runs its own stages' programs, forward and backward, message by message.

A `Worker` knows its part of the plan and a transport to the others. It holds parameters and
optimiser state of its own stages only, and compiles only their programs.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsys.cluster.throttle import FULL_SPEED, Throttle
from jaxsys.cluster.transport import Transport
from jaxsys.core import tree
from jaxsys.core.errors import UserError
from jaxsys.core.stages import StagedLoss
from jaxsys.pipeline import messages
from jaxsys.pipeline.clip import clipped
from jaxsys.pipeline.messages import Route
from jaxsys.pipeline.plan import Plan
from jaxsys.pipeline.schedule import Action, actions
from jaxsys.pipeline.turn import Part, Run, State, StepInfo, Turn


class Worker:
    """One process's part of a plan.

    Args:
        staged: the loss, cut at the plan's boundaries for the shapes of one micro-batch.
        plan: the plan.
        transport: to the other workers; its rank says which part this is (`messages.rank_of`).
        optimizer: any optax transformation; it gets each leaf for itself, so one that looks at the
            whole tree sees that leaf only.
        params: the whole tree of parameters, or their shapes and types.
        error_feedback: add to a cotangent what compression took from the one before on its link.
            Gradients of leaves that several workers share always have that where they are
            compressed.
        clip_norm: bound on the norm of the whole gradient, over all stages (`clip`); none by
            default.
        throttle: makes this worker as slow as the device that it stands for.

    Attributes:
        rank: of this process.
        plan: the plan.
        chain: index of the chain that it belongs to.
        stages: indices of the stages that it runs.
        paths: path of each parameter leaf that it holds, by leaf index.
        owned: indices of the leaves among them that no earlier worker holds.

    Reconstruction: the paper's executor is known from its abstract only. One message carries all
    values of a micro-batch from one stage to another; a tied leaf lives on each worker that reads
    it, and their gradients are exchanged.

    Reference: arXiv 2410.12707.

    >>> from jaxsys.cluster.transport import in_memory
    >>> from jaxsys.core.stages import cut
    >>> p = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 1))}
    >>> loss = cut(lambda p, x: jnp.sum((x @ p["a"]) @ p["b"]), p, (jnp.ones((1, 2)),), [[0], [1]])
    >>> Worker(loss, Plan(2, (1,), (0, 1)), in_memory(2)[1], optax.sgd(0.1), p).paths
    {1: 'b'}
    """

    def __init__(
        self,
        staged: StagedLoss,
        plan: Plan,
        transport: Transport,
        optimizer: optax.GradientTransformation,
        params: Any,
        *,
        error_feedback: bool = False,
        clip_norm: float | int | None = None,
        throttle: Throttle = FULL_SPEED,
    ) -> None:
        _check(staged, plan, transport)
        self.rank, self.plan = transport.rank, plan
        self.chain, worker = divmod(self.rank, plan.n_workers)
        self.stages = tuple(range(worker, plan.n_stages, plan.n_workers))
        names = tree.paths(params)
        held = messages.worker_leaves(staged, plan, worker)
        self.paths = {j: names[j] for j in held}
        shared = messages.shared_leaves(staged, plan)
        self.owned = tuple(j for j in held if j not in shared or shared[j][0] in self.stages)
        every = messages.routes(staged, plan)
        self._part = Part(
            staged,
            plan,
            transport,
            self.chain,
            worker,
            self.stages,
            self.paths,
            {j: stages for j, stages in shared.items() if j in self.paths},
            {s: [r for r in every if r.target == s] for s in self.stages},
            {s: [r for r in every if r.source == s] for s in self.stages},
            messages.loss_stage(staged),
            error_feedback,
            {},
            throttle,
        )
        self._actions = actions(plan.order, worker, plan.n_workers, plan.micro_batches, plan.chunks)
        self._optimizer, self._clip_norm = optimizer, clip_norm
        self._parts = plan.micro_batches * len(plan.chains)
        self._update = leaf_update(optimizer, self._parts)

    def init(self, params: Any) -> State:
        """Take this worker's leaves and make the optimiser's state for them.

        Args:
            params: the whole tree, or path to leaf with at least this worker's paths.

        Returns:
            The state before the first step.
        """
        by_path = isinstance(params, Mapping) and set(self.paths.values()) <= params.keys()
        flat = params if by_path else tree.flatten(params)
        own = {path: jnp.asarray(flat[path]) for path in self.paths.values()}
        return State(own, {path: self._optimizer.init(x) for path, x in own.items()}, {}, 0)

    def step(self, state: State, batch: Sequence[Any]) -> tuple[State, StepInfo]:
        """Make one training step, together with all other workers.

        Args:
            state: this worker's.
            batch: the examples of the whole step, as the arguments of the loss after the
                parameters; every array has the examples along its first axis. Of chains c of R and
                micro-batches i of m, part ``c·m + i`` of ``R·m`` goes to micro-batch i of chain c.

        Returns:
            The state after it, and what it gave and took.

        Raises:
            PeerLost: another worker is lost.
            UserError: the examples cannot be dealt out evenly.
        """
        run = self.run(state, batch)
        while True:
            try:
                next(run)  # the receive that follows waits
            except StopIteration as end:
                return end.value

    def run(self, state: State, batch: Sequence[Any]) -> Run:
        """Make a step bit by bit, pausing before each message that is waited for.

        Args:
            state: this worker's.
            batch: as for `step`.

        Returns:
            Generator of ``(sender, key)``; its value is that of `step`.
        """
        part = self._part
        turn = Turn(part, state, _micro_batches(part.plan, part.chain, batch))
        for action in self._actions:
            for route, backward in self._needs(action):
                turn.expect(route, backward, action.micro_batch)
        run = {"forward": turn.forward, "backward": turn.backward, "weight": turn.weight}
        for action in self._actions:
            yield from run[action.kind](action.stage, action.micro_batch)
        grads = yield from turn.shared(turn.sums())
        if len(part.plan.chains) > 1:
            grads = yield from turn.mean_over_chains(grads)
        if self._clip_norm is not None:
            own = [self.paths[j] for j in self.owned]
            grads = yield from clipped(turn, grads, own, self._clip_norm, self._parts)
        new = {
            path: self._update(grad, state.opt_state[path], state.params[path])
            for path, grad in grads.items()
        }
        params = {path: value for path, (value, _) in new.items()}
        opt_state = {path: moments for path, (_, moments) in new.items()}
        turn.done("update", self.stages[-1], params)
        loss = yield from turn.tell_loss()
        return State(params, opt_state, turn.residuals, state.step + 1), turn.info(loss)

    def _needs(self, action: Action) -> list[tuple[Route, bool]]:
        if action.kind == "forward":
            return [(r, False) for r in self._part.routes_in[action.stage]]
        if action.kind == "backward":
            return [
                (route, True) for route in self._part.routes_out[action.stage] if route.returned
            ]
        return []


@functools.lru_cache(maxsize=8)
def leaf_update(optimizer: optax.GradientTransformation, parts: int) -> Callable[..., Any]:
    """Compile the update of one leaf from its summed gradient.

    A program for all leaves of a worker would round a leaf otherwise on another worker.

    Args:
        optimizer: the transformation.
        parts: micro-batches in the sum.

    Returns:
        ``update(grad, opt_state, param) -> (param, opt_state)``.

    >>> p, sgd = jnp.ones(2), optax.sgd(0.5)
    >>> leaf_update(sgd, 2)(p, sgd.init(p), p)[0].tolist()
    [0.75, 0.75]
    """

    @jax.jit
    def update(grad: Any, opt_state: Any, param: Any) -> tuple[Any, Any]:
        mean = grad * jnp.asarray(1.0 / parts, grad.dtype)
        change, opt_state = optimizer.update(mean, opt_state, param)
        return optax.apply_updates(param, change), opt_state

    return update


def _micro_batches(plan: Plan, chain: int, batch: Sequence[Any]) -> list[list[Any]]:
    """Deal out the examples of a step: the data leaves of each of this chain's micro-batches."""
    parts = len(plan.chains) * plan.micro_batches
    leaves = jax.tree.leaves(tuple(batch))
    for x in leaves:
        if np.ndim(x) == 0 or x.shape[0] % parts:
            raise UserError(
                f"the batch has an array of shape {np.shape(x)} and the plan {parts} parts; every "
                "array needs the examples along its first axis, a multiple of the parts; change one"
            )
    first = chain * plan.micro_batches
    return [
        [x[p * (x.shape[0] // parts) : (p + 1) * (x.shape[0] // parts)] for x in leaves]
        for p in range(first, first + plan.micro_batches)
    ]


def _check(staged: StagedLoss, plan: Plan, transport: Transport) -> None:
    processes = len(plan.chains) * plan.n_workers
    if len(staged.stages) != plan.n_stages or transport.size != processes:
        raise UserError(
            f"the loss has {len(staged.stages)} stages and the transport {transport.size} "
            f"processes; the plan needs {plan.n_stages} and {processes}; cut the loss at the "
            "plan's boundaries and start a process for each worker"
        )
