"""Train any grounder: alone or many seeds at once, stopped early, resumed, over any devices.

Axes: ``R`` rows, ``S`` seeds.
"""

import dataclasses
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.checkpoint import RunStore
from jaxsys.core.errors import UserError
from jaxsys.core.report import to_json
from jaxsys.ground.contract import Grounder
from jaxsys.ground.evaluation import score
from jaxsys.ground.metrics import strictly_best
from jaxsys.ground.program import Program, Task, TrainConfig, program
from jaxsys.ground.spread import own_rows, replicate, row_mesh, split
from jaxsys.ground.tables import Rows, Tables, check, gather, take_rows
from jaxsys.train.logs import Writer
from jaxsys.train.loop import NonFiniteError, resume

__all__ = ["Fitted", "TrainConfig", "fit", "fit_seeds"]

Progress = Callable[[int, int], None]
_VALID = 256  # rows scored at a time


class Fitted(NamedTuple):
    """Hold what a run gave; of `fit_seeds`, with a leading axis S everywhere.

    Attributes:
        params: of the best epoch by validation accuracy, or of the last without validation rows.
        losses: [epochs] mean loss; NaN after the run ended.
        accuracies: [epochs] on the validation rows; NaN where there are none.
        best_epoch: the epoch that `params` are from.

    >>> Fitted._fields
    ('params', 'losses', 'accuracies', 'best_epoch')
    """

    params: Any
    losses: Any
    accuracies: Any
    best_epoch: Any


def fit(
    grounder: Grounder,
    frozen: Any,
    tables: Tables,
    train: Rows,
    valid: Rows | None = None,
    config: TrainConfig | None = None,
    *,
    seed: int = 0,
    start: Mapping[str, Any] | None = None,
    store: RunStore | None = None,
    writer: Writer | None = None,
    meta: Mapping[str, Any] | None = None,
    resident: bool = True,
    devices: Sequence[Any] | None = None,
    progress: Progress = lambda done, total: None,
) -> Fitted:
    """Train one grounder, from the newest checkpoint of `store` if it has one.

    With several processes each calls this with the same arguments; their devices share each batch
    and the result is that of one device, to rounding.

    Args:
        grounder: what is trained.
        frozen: its frozen parameters.
        tables: of objects and texts.
        train: rows with answers.
        valid: rows whose accuracy chooses the epoch; without them the last one is kept.
        config: steps and rates.
        seed: of initialisation, order, dropout and views.
        start: parts of the parameters to begin from, by their first name: LaGOR begins from a
            trained MATCH with ``{"head": match_params["head"]}``.
        store: where to save and resume.
        writer: gets epoch, loss and accuracy of every epoch, in process 0.
        meta: what else identifies the run; a checkpoint of another run is refused.
        resident: tables go to the device whole. Without, each batch is gathered on the host, from
            arrays or memory maps of any size.
        devices: that share each batch; all by default.
        progress: called with steps done and the most there can be.

    Raises:
        UserError: for rows that cannot be used, fewer of them than a batch, a grounder without
            parameters, or a checkpoint of another run.
        NonFiniteError: naming the step whose loss is not a number; it is not saved.

    >>> from jaxsys.ground.match import MatchConfig, match
    >>> tables = Tables(np.ones((2, 1), bool), np.eye(2), np.arange(2), np.eye(2)[:, None])
    >>> rows = Rows(np.array([[0, 1], [1, 0]]), np.array([0, 0]), np.array([0, 1]))
    >>> model = match(MatchConfig(2, 2, hidden=(4,)))
    >>> options = {"config": TrainConfig(epochs=3, batch=2), "devices": jax.devices()[:1]}
    >>> fit(model, {}, tables, rows, rows, **options).losses.shape
    (3,)
    """
    config = config or TrainConfig()
    check(tables, train)
    mesh, steps = row_mesh(config.batch, devices), _steps([train], config)
    run, parts = _set_up(grounder, config, mesh, tables, [train], [valid], many=False)
    frozen = replicate(frozen, mesh)
    task = Task(frozen, None, *replicate(parts, mesh))
    number = np.int32(seed)
    state = replicate(run.init(number, frozen, start), mesh)
    if not jax.tree.leaves(state["params"]):
        raise UserError(
            "this grounder has no parameters; there is nothing to train; evaluate it as it is"
        )
    identity = _identity(config, [seed], parts, meta)
    state, begin = resume(store, state, identity)
    keep = _Keep(config, store, identity, writer if jax.process_index() == 0 else None, progress)
    if resident:
        task = task._replace(tables=replicate(tables, mesh))
        state = _from_device(run, keep, task, state, begin, steps, number)
    else:
        state = _from_host(run, keep, task, state, begin, steps, number, tables, train, valid)
    return _fitted(state)


def fit_seeds(
    grounder: Grounder,
    frozen: Any,
    tables: Tables,
    train: Rows | Sequence[Rows],
    valid: Rows | Sequence[Rows] | None = None,
    config: TrainConfig | None = None,
    *,
    seeds: Sequence[int],
    store: RunStore | None = None,
    writer: Writer | None = None,
    meta: Mapping[str, Any] | None = None,
    start: Mapping[str, Any] | None = None,
    progress: Progress = lambda done, total: None,
) -> Fitted:
    """Train one grounder for each seed, all in one program on one device.

    Each does what `fit` would do with its seed, and keeps its own best epoch.

    Args:
        grounder: what is trained.
        frozen: shared by all.
        tables: shared by all.
        train: rows, or rows of each seed, such as those of another split. Where their numbers
            differ, an epoch has as many steps as the fewest give.
        valid: the same of validation rows.
        config: steps and rates.
        seeds: S of them.
        store: as for `fit`.
        writer: as for `fit`; losses and accuracies are lists over the seeds.
        meta: as for `fit`.
        start: as for `fit`, the same for all.
        progress: as for `fit`, called with steps of one seed.

    Raises:
        UserError: as `fit`, or for rows of another number than the seeds.
        NonFiniteError: naming the first step at which any seed's loss is not a number.

    >>> from jaxsys.ground.match import MatchConfig, match
    >>> tables = Tables(np.ones((2, 1), bool), np.eye(2), np.arange(2), np.eye(2)[:, None])
    >>> rows = Rows(np.array([[0, 1], [1, 0]]), np.array([0, 0]), np.array([0, 1]))
    >>> model = match(MatchConfig(2, 2, hidden=(4,)))
    >>> config = TrainConfig(epochs=3, batch=2)
    >>> found = fit_seeds(model, {}, tables, rows, None, config, seeds=[0, 1])  # doctest: +SKIP
    >>> found.losses.shape  # doctest: +SKIP
    (2, 3)
    """
    config = config or TrainConfig()
    trains, valids = _each(train, len(seeds)), _each(valid, len(seeds))
    for rows in trains:
        check(tables, rows)
    mesh = row_mesh(config.batch, jax.local_devices()[:1])
    run, parts = _set_up(grounder, config, mesh, tables, trains, valids, many=True)
    parts = (jax.tree.map(np.asarray, part) for part in parts)
    frozen, task_parts = replicate((frozen, tuple(parts)), mesh)
    task = Task(frozen, replicate(tables, mesh), *task_parts)
    numbers = np.asarray(seeds, np.int32)
    state = run.init(numbers, frozen, start)
    identity = _identity(config, seeds, task_parts, meta)
    state, begin = resume(store, state, identity)
    keep = _Keep(config, store, identity, writer, progress)
    return _fitted(_from_device(run, keep, task, state, begin, _steps(trains, config), numbers))


class _Keep(NamedTuple):
    """What a run does beside training."""

    config: TrainConfig
    store: RunStore | None
    identity: dict[str, Any]
    writer: Writer | None
    progress: Progress

    def round(self, state: Any, begin: int, end: int, steps: int) -> None:
        """Refuse a broken loss, then log and save the epochs from begin to end − 1."""
        broken = np.asarray(state["broken"])
        if (broken >= 0).any():
            raise NonFiniteError(int(broken[broken >= 0].min()), "loss")
        told = {name: np.asarray(state[name]) for name in ("losses", "accuracies")}
        for epoch in range(begin, end):
            row = {"loss": told["losses"][..., epoch], "accuracy": told["accuracies"][..., epoch]}
            if self.writer is not None:
                self.writer.write({"step": epoch, **{k: v.tolist() for k, v in row.items()}})
        if self.store is not None:
            self.store.save(end - 1, state, self.identity)
        self.progress(end * steps, self.config.epochs * steps)


def _from_device(
    run: Program, keep: _Keep, task: Task, state: Any, begin: int, steps: int, seed: Any
) -> Any:
    """Train from tables that the program holds, `round` epochs in a call."""
    done, epochs = False, keep.config.epochs
    while begin < epochs and not done:
        span = np.array([begin, min(begin + keep.config.round, epochs)], np.int32)
        state, end, done = run.advance(state, task, seed, span, steps)
        if int(end) > begin:
            keep.round(state, begin, int(end), steps)
        begin, done = int(end), bool(done)
    return state


def _from_host(
    run: Program,
    keep: _Keep,
    task: Task,
    state: Any,
    begin: int,
    steps: int,
    seed: Any,
    tables: Tables,
    train: Rows,
    valid: Rows | None,
) -> Any:
    """Train from tables that stay on the host, a step in a call."""
    config, mesh, waited = keep.config, run.mesh, 0
    own = own_rows(config.batch, mesh)
    for epoch in range(begin, config.epochs):
        waited = epoch - 1 - int(state["best"]["epoch"])
        if valid is not None and config.patience and waited >= config.patience:
            break
        order = np.asarray(run.order(seed, np.int32(epoch), len(train.text), steps, task.count))
        carry, values = (state["params"], state["memory"]), []
        for i, places in enumerate(order):
            number = epoch * steps + i
            batch = split(gather(tables, take_rows(train, places[own])), mesh)
            carry, (value, _) = run.step(carry, task.frozen, batch, seed, np.int32(number))
            # The step before has ended by now, so that looking at it waits for nothing.
            if values and not np.isfinite(np.asarray(values[-1])):
                raise NonFiniteError(number - 1, "loss")
            values.append(value)
            keep.progress(number + 1, config.epochs * steps)
        accuracy = np.float32(np.nan)
        if valid is not None:
            options: dict[str, Any] = {"passes": config.passes, "resident": False}
            devices = list(mesh.devices.flat)
            found = score(run.grounder, carry[0], task.frozen, tables, valid,
                          batch=run.valid, devices=devices, **options)  # fmt: skip
            right = [strictly_best(one, np.asarray(valid.answer)) for one in found]
            accuracy = np.float32(np.mean(right))
        rest = {name: x for name, x in state.items() if name not in ("params", "memory")}
        first = np.int32(epoch * steps)
        state = run.note(rest, carry, jnp.stack(values), accuracy, np.int32(epoch), first)
        keep.round(state, epoch, epoch + 1, steps)
    return state


def _set_up(
    grounder: Grounder,
    config: TrainConfig,
    mesh: Any,
    tables: Tables,
    trains: Sequence[Rows],
    valids: Sequence[Rows | None],
    *,
    many: bool,
) -> tuple[Program, Any]:
    """Make the program, and its rows: of several seeds filled up to one length and stacked."""
    block, valid, real = 0, None, None
    checked = [rows for rows in valids if rows is not None]
    if checked:
        for rows in checked:
            check(tables, rows)
        most = max(len(rows.text) for rows in checked)
        block = -(-min(_VALID, most) // mesh.size) * mesh.size
        whole = -(-most // block) * block
        valid = _stack([_longer(rows, whole) for rows in checked])
        real = np.stack([np.arange(whole) < len(rows.text) for rows in checked])
    longest = max(len(rows.text) for rows in trains)
    train = _stack([_longer(rows, longest) for rows in trains])
    parts = (train, np.array([len(rows.text) for rows in trains], np.int32), valid, real)
    if not many:
        parts = jax.tree.map(lambda x: x[0], parts)
    free = dataclasses.replace(config, round=1)  # so that it compiles no other program
    return program(grounder, free, mesh, block, many), parts


def _steps(trains: Sequence[Rows], config: TrainConfig) -> int:
    fewest = min(len(rows.text) for rows in trains)
    if fewest < config.batch:
        raise UserError(
            f"there are {fewest} training rows and a batch has {config.batch}; expected at least "
            "one whole batch; choose a smaller one"
        )
    return fewest // config.batch


def _longer(rows: Rows, count: int) -> Rows:
    return take_rows(Rows(*map(np.asarray, rows)), np.arange(count) % len(rows.text))


def _stack(rows: Sequence[Rows]) -> Rows:
    return Rows(*(np.stack(parts).astype(np.int32) for parts in zip(*rows, strict=True)))


def _each(rows: Any, count: int) -> list[Any]:
    found = [rows] * count if rows is None or isinstance(rows, Rows) else list(rows)
    if len(found) != count or not count:
        raise UserError(
            f"there are rows for {len(found)} seeds and {count} seeds; expected as many, and at "
            "least one; give one set of rows for all, or one for each"
        )
    return found


def _identity(
    config: TrainConfig, seeds: Sequence[int], parts: Any, meta: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Say what makes a run this one; how often it is saved does not."""
    content = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(parts))
    settings = dataclasses.asdict(config)
    del settings["round"]
    rows = {"rows": int(np.sum(parts[1])), "checksum of rows": zlib.crc32(content)}
    data = {"seeds": [int(seed) for seed in seeds], **rows}
    return json.loads(to_json({"training": settings, "data": data, "meta": dict(meta or {})}))


def _fitted(state: Any) -> Fitted:
    best = state["best"]
    told = {name: np.asarray(state[name]) for name in ("losses", "accuracies")}
    if jax.tree.leaves(best["params"]):
        return Fitted(best["params"], **told, best_epoch=np.asarray(best["epoch"]))
    last = np.isfinite(told["losses"]).sum(-1) - 1
    return Fitted(state["params"], **told, best_epoch=last)
