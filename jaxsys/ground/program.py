"""One training step of any grounder, and epochs of it compiled into one program.

A run is a function of its seed: every epoch visits the rows in an order drawn from seed and epoch,
and the keys of dropout and random views are folded by the number of the step. The batch is gathered
inside the program where the tables fit on the device.

Axes: ``R`` rows, ``S`` seeds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsys.core.errors import UserError
from jaxsys.ground.contract import Grounder
from jaxsys.ground.evaluation import hits
from jaxsys.ground.spread import spread
from jaxsys.ground.tables import Rows, gather, take_rows


@dataclass(frozen=True)
class TrainConfig:
    """Describe the training; the defaults are SNARE's recipe, with early stopping.

    Attributes:
        epochs: at most.
        batch: rows in a step; the last, smaller batch of an epoch is left out (its rows differ
            from epoch to epoch).
        lr: Adam's rate for heads and captioner.
        adapter_lr: Adam's rate for the domain encoder, adapters or a full copy.
        weight_decay: of all matrices, decoupled.
        warmup_steps: of linear growth of both rates.
        clip_norm: bound on the norm of the gradient; none if left out.
        patience: epochs without a better validation accuracy before the run ends; 0 never ends
            early.
        passes: over the validation rows; more than one where views are drawn at random.
        round: epochs between looks at progress, log and checkpoints.

    Raises:
        UserError: for a number that is out of range.

    >>> TrainConfig().batch
    64
    """

    epochs: int = 50
    batch: int = 64
    lr: float = 1e-3
    adapter_lr: float = 1e-4
    weight_decay: float = 0.0
    warmup_steps: int = 0
    clip_norm: float | None = None
    patience: int = 10
    passes: int = 1
    round: int = 1

    def __post_init__(self) -> None:
        least = {"epochs": 1, "batch": 1, "passes": 1, "round": 1}
        least |= {"patience": 0, "warmup_steps": 0, "weight_decay": 0}
        low = [name for name, bound in least.items() if getattr(self, name) < bound]
        rates = [name for name in ("lr", "adapter_lr") if getattr(self, name) <= 0]
        rates += ["clip_norm"] if self.clip_norm is not None and self.clip_norm <= 0 else []
        if low or rates:
            name = (low + rates)[0]
            wanted = f"at least {least[name]}" if name in least else "a positive number"
            raise UserError(f"{name} is {getattr(self, name)}; expected {wanted}; correct it")


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Make Adam with one rate for what is under ``domain`` and another for all else.

    Args:
        config: rates, decay, warm-up, clipping.

    Reference: SNARE's recipe (arXiv 2107.12514); the adapters' rate is chosen here.

    >>> params = {"heads": jnp.ones(1), "domain": jnp.ones(1)}
    >>> optimizer = make_optimizer(TrainConfig())
    >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
    >>> round(float(updates["heads"][0] / updates["domain"][0]))
    10
    """

    def adam(rate: float) -> optax.GradientTransformation:
        grown: Any = rate
        if config.warmup_steps:
            grown = optax.linear_schedule(0.0, rate, config.warmup_steps)
        mask = lambda params: jax.tree.map(lambda x: x.ndim >= 2, params)  # noqa: E731
        decay = config.weight_decay
        return optax.adamw(grown, weight_decay=decay, mask=mask) if decay else optax.adam(grown)

    def label(params: Any) -> Any:
        name = lambda path, _: "domain" if _top(path) == "domain" else "heads"  # noqa: E731
        return jax.tree_util.tree_map_with_path(name, params)

    rates: dict[Any, Any] = {"heads": adam(config.lr), "domain": adam(config.adapter_lr)}
    step = optax.multi_transform(rates, label)
    clip = config.clip_norm
    return step if clip is None else optax.chain(optax.clip_by_global_norm(clip), step)


def _top(path: Any) -> str:
    return jax.tree_util.keystr(path[:1], simple=True) if path else ""


class Task(NamedTuple):
    """Hold what a program reads and never changes; arrays only.

    Attributes:
        frozen: parameters.
        tables: None where batches come from the host.
        train: rows, filled up to the most that any seed has.
        count: how many of these are real.
        valid: rows, filled up to whole batches, or None.
        real: which of these are real.

    >>> Task({}, None, Rows(0, 0, 0), 0, None, None).valid is None
    True
    """

    frozen: Any
    tables: Any
    train: Rows
    count: Any
    valid: Any
    real: Any


class Program:
    """Hold the compiled functions of a run, alone or of many seeds; made by `program`.

    >>> all(hasattr(Program, name) for name in ("_step", "_epoch", "_advance"))
    True
    """

    def __init__(self, grounder: Grounder, config: TrainConfig, mesh: Any, valid: int, many: bool):
        self.grounder, self.config, self.mesh = grounder, config, mesh
        self.valid, self.many = valid, many
        self.optimizer = make_optimizer(config)
        jit = partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
        self.init = jit(self._lift(self._init, (0, None, None)))
        self.advance = jit(self._advance, donate_argnums=0, static_argnums=4)
        self.step = jit(self._step, donate_argnums=0)
        self.order = jit(self._order, static_argnums=(2, 3))
        self.note = jit(self._note, donate_argnums=0)

    def _lift(self, function: Callable[..., Any], axes: Any) -> Callable[..., Any]:
        return jax.vmap(function, axes) if self.many else function

    def _init(self, seed: Any, frozen: Any, start: Any) -> Any:
        params = self.grounder.init(_key(seed, 0), frozen)
        params = {**params, **start} if start else params
        nothing = jnp.full(self.config.epochs, jnp.nan, jnp.float32)
        best = {"params": params if self.valid else {}, "accuracy": jnp.float32(-1.0)}
        return {
            "params": params,
            "memory": self.optimizer.init(params),
            "best": {**best, "epoch": jnp.int32(-1)},
            "losses": nothing,
            "accuracies": nothing,
            "broken": jnp.int32(-1),
        }

    def _is_stopped(self, state: Any, epoch: Any) -> Any:
        waited = epoch - 1 - state["best"]["epoch"]
        patient = not (self.valid and self.config.patience)
        return jnp.zeros((), bool) if patient else waited >= self.config.patience

    def _order(self, seed: Any, epoch: Any, n: int, steps: int, count: Any) -> Any:
        """Draw [steps, batch] places among the first `count` of n."""
        draws = jax.random.uniform(jax.random.fold_in(_key(seed, 1), epoch), (n,))
        draws = jnp.where(jnp.arange(n) < count, draws, 2.0)
        return jnp.argsort(draws)[: steps * self.config.batch].reshape(steps, -1)

    def _step(self, carry: Any, frozen: Any, batch: Any, seed: Any, number: Any) -> Any:
        params, memory = carry
        key = jax.random.fold_in(_key(seed, 2), number)
        loss = partial(self.grounder.loss, key=key)
        (value, parts), slopes = jax.value_and_grad(loss, has_aux=True)(params, frozen, batch)
        updates, memory = self.optimizer.update(slopes, memory, params)
        return (optax.apply_updates(params, updates), memory), (value, parts)

    def _epoch(self, state: Any, task: Task, seed: Any, epoch: Any, steps: int) -> Any:
        n = len(task.train.text)
        order = self._order(seed, epoch, n, steps, task.count)

        def one(carry: Any, at: Any) -> Any:
            places, number = at
            batch = spread(gather(task.tables, take_rows(task.train, places)), self.mesh)
            return self._step(carry, task.frozen, batch, seed, number)

        numbers = epoch * steps + jnp.arange(steps)
        carry = (state["params"], state["memory"])
        carry, (values, _) = jax.lax.scan(one, carry, (order, numbers))
        accuracy = self._accuracy(carry[0], task) if self.valid else jnp.float32(jnp.nan)
        return self._note(state, carry, values, accuracy, epoch, numbers[0])

    def _note(
        self, state: Any, carry: Any, values: Any, accuracy: Any, epoch: Any, first: Any
    ) -> Any:
        """Take an epoch's results into the state; a stopped run keeps what it has."""
        stopped, best = self._is_stopped(state, epoch), state["best"]
        if self.valid:
            new = {"params": carry[0], "accuracy": accuracy, "epoch": jnp.asarray(epoch, jnp.int32)}
            better = (accuracy > best["accuracy"]) & ~stopped
            best = jax.tree.map(lambda a, b: jnp.where(better, a, b), new, best)
        bad = ~jnp.isfinite(values)
        at = jnp.where(bad.any() & ~stopped, first + jnp.argmax(bad), -1).astype(jnp.int32)
        told = {"losses": jnp.mean(values), "accuracies": accuracy}
        history = {
            name: state[name].at[epoch].set(jnp.where(stopped, jnp.nan, value))
            for name, value in told.items()
        }
        broken = jnp.where(state["broken"] >= 0, state["broken"], at)
        return {"params": carry[0], "memory": carry[1], "best": best, "broken": broken, **history}

    def _accuracy(self, params: Any, task: Task) -> Any:
        def one(right: Any, at: Any) -> Any:
            rows, real, key = at
            batch = spread(gather(task.tables, rows), self.mesh)
            found = self.grounder.scores(params, task.frozen, batch, key=key)
            return right + jnp.sum(hits(found, rows.answer) & real), None

        whole = jax.tree.map(lambda x: x.reshape(-1, self.valid, *x.shape[1:]), task.valid)
        real = task.real.reshape(-1, self.valid)
        right, passes = jnp.int32(0), self.config.passes
        for number in range(passes):  # the same draws in every epoch, so that epochs compare
            keys = jax.random.split(jax.random.key(number), len(real))
            right, _ = jax.lax.scan(one, right, (whole, real, keys))
        return right / (passes * jnp.sum(real))

    def _advance(self, state: Any, task: Task, seed: Any, span: Any, steps: int) -> Any:
        """Run epochs span[0] to span[1] − 1, fewer where all have stopped or a loss broke."""
        stopped = self._lift(self._is_stopped, (0, None))
        zeros: Any = (0,) * 4
        axes: Any = Task(None, None, *zeros) if self.many else 0
        run = self._lift(partial(self._epoch, steps=steps), (0, axes, 0, None))

        def more(carry: Any) -> Any:
            epoch, state = carry
            on = (epoch < span[1]) & ~jnp.any(state["broken"] >= 0)
            return on & ~jnp.all(stopped(state, epoch))

        def one(carry: Any) -> Any:
            epoch, state = carry
            return epoch + 1, run(state, task, seed, epoch)

        epoch, state = jax.lax.while_loop(more, one, (span[0], state))
        return state, epoch, jnp.all(stopped(state, epoch))


def _key(seed: Any, use: int) -> Any:
    return jax.random.fold_in(jax.random.key(seed), use)


@lru_cache(maxsize=16)
def program(grounder: Grounder, config: TrainConfig, mesh: Any, valid: int, many: bool) -> Program:
    """Make a program, or give the one that is compiled already.

    Args:
        grounder: what is trained.
        config: steps and rates.
        mesh: whose devices share each batch.
        valid: validation rows scored at a time; 0 without validation.
        many: whether states, rows and seeds have a leading axis S.

    >>> from jaxsys.ground.match import zero_shot
    >>> from jaxsys.ground.spread import row_mesh
    >>> model, mesh = zero_shot(), row_mesh(1, jax.devices()[:1])
    >>> same = [program(model, TrainConfig(), mesh, 0, False) for _ in range(2)]
    >>> same[0] is same[1]
    True
    """
    return Program(grounder, config, mesh, valid, many)
