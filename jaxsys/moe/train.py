"""Train a language model with mixtures over devices and processes; one program a step.

Sequences are split over all mesh axes, experts over ``expert``, each expert's hidden width over
``tensor``; everything else is on every device. Every process runs this same program.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsys.cluster import join
from jaxsys.core.checkpoint import RunStore, write_safetensors
from jaxsys.core.errors import UserError
from jaxsys.core.mesh import separate_collectives
from jaxsys.core.report import to_json
from jaxsys.core.tree import flatten
from jaxsys.data import TokenStream
from jaxsys.models import lm
from jaxsys.moe.contract import Axes, LayerPlan, MoEPlan
from jaxsys.moe.gates_balanced import move_bias
from jaxsys.moe.model import mixtures
from jaxsys.moe.reverse import check_layers, loss_of, value_and_grad
from jaxsys.moe.sharding import check_mesh, layer_specs
from jaxsys.moe.stages import cut, lm_stages, paste
from jaxsys.moe.task import Setup, Task, set_up
from jaxsys.moe.upcycle import to_mixtral
from jaxsys.train import check_finite, iterate, optimizers, resume
from jaxsys.train.logs import Tee, Writer

AXES = Axes(data="data", expert="expert", tensor="tensor")
UNCUT = MoEPlan((LayerPlan(),))  # nothing is cut, nothing moved into gaps


@dataclasses.dataclass(frozen=True)
class Job:
    """A whole run.

    Attributes:
      task: what is trained.
      steps: of the whole run.
      seed: of parameters, data order and noise.
      data: groups of devices that hold all experts; 0 for as many as the experts leave over.
      tensor: devices that split each expert.
      plan: degrees and gradient bytes.
      save_every: steps between checkpoints; 0 saves only the last step.
      eval_every: steps between evaluations on held-out text; 0 evaluates only at the end.

    >>> Job().plan.layers[0].forward
    1
    """

    task: Task = dataclasses.field(default_factory=Task)
    steps: int = 100
    seed: int = 0
    data: int = 0
    tensor: int = 1
    plan: MoEPlan = UNCUT
    save_every: int = 0
    eval_every: int = 0


class Trained(NamedTuple):
    """What a run gave.

    Attributes:
      params: the model, sharded over the mesh.
      setup: what was trained.
      mesh: where.
      losses: cross-entropy of the steps that this call ran, nats per token.
      valid_loss: on the held-out text, at the end.

    >>> Trained._fields[-1]
    'valid_loss'
    """

    params: Any
    setup: Setup
    mesh: Mesh
    losses: tuple[float, ...]
    valid_loss: float


def make_mesh(experts: int, data: int = 0, tensor: int = 1) -> Mesh:
    """Lay all devices out as data × expert × tensor.

    Args:
      experts: E.
      data: groups that hold all experts each; 0 for the fewest that make the expert axis divide E.
      tensor: devices that split each expert.

    Returns:
      The mesh.

    Raises:
      UserError: if the devices cannot be laid out so.

    >>> dict(make_mesh(jax.device_count()).shape)["data"]
    1
    """
    devices = jax.device_count()
    groups = devices // tensor if tensor >= 1 and devices % tensor == 0 else 0
    if data == 0:
        data = next(
            (d for d in range(1, groups + 1) if groups % d == 0 == experts % (groups // d)), 0
        )
    if groups == 0 or data < 1 or groups % data:
        raise UserError(
            f"{devices} devices cannot be laid out as {data} data groups × experts × {tensor} "
            "tensor parts; expected numbers whose product divides the devices; change data, tensor "
            "or the number of processes"
        )
    names = ("data", "expert", "tensor")
    auto = jax.sharding.AxisType.Auto
    return jax.make_mesh((data, groups // data, tensor), names, axis_types=(auto,) * 3)


def train(
    job: Job,
    *,
    store: RunStore | None = None,
    writer: Writer | None = None,
    on_step: Callable[[int, dict[str, float]], None] = lambda i, row: None,
) -> Trained:
    """Train, from the newest checkpoint of `store` if it has one, together with the peers.

    Args:
      job: the same in every process.
      store: where to save and resume; all processes must see the same folder.
      writer: gets a row per step in process 0: loss, balance, dropped, step_s, and valid_loss
        where it was evaluated.
      on_step: called with each step's number and row.

    Returns:
      The trained model.

    Raises:
      UserError: for a job that does not fit its devices, or a checkpoint of another run.
      NonFiniteError: if the loss stops being a number.

    >>> task = Task(width=8, heads=2, depth=1, experts=8, length=16, batch=1)
    >>> len(train(Job(task, steps=1)).losses)  # doctest: +SKIP
    1
    """
    member = join()
    if job.task.optimizer not in optimizers.PRESETS:
        raise UserError(
            f"optimizer {job.task.optimizer!r} is not known; expected one of "
            f"{', '.join(optimizers.PRESETS)}; choose one"
        )
    if job.steps < 1:
        raise UserError(f"steps is {job.steps}; a run needs at least 1; raise it")
    setup = set_up(job.task, job.seed)
    mesh = make_mesh(job.task.experts, job.data, job.tensor)
    check_mesh(mesh, AXES, setup.dims.experts, setup.dims.hidden)
    check_layers(job.plan, setup.config.layers)
    stream = TokenStream(
        setup.train,
        batch=job.task.batch * jax.local_device_count(),
        length=job.task.length,
        process_id=member.process_id,
        num_processes=member.num_processes,
        seed=job.seed,
    )
    run = _Run(job, setup, mesh)
    identity = json.loads(to_json({"job": _identity(job), "mesh": dict(mesh.shape)}))
    state, start = resume(store, run.init(), identity)
    writer = (writer or Tee()) if member.process_id == 0 else Tee()
    losses, before_s = [], time.perf_counter()
    valid_loss = float("nan")
    for i, after, info in iterate(
        run.step,
        state,
        lambda i: (run.to_batch(stream.batch_at(i)), np.int32(i)),
        start=start,
        steps=job.steps,
        save_every=job.save_every,
        store=store,
        meta=identity,
        guard=lambda i, info: check_finite(i, np.asarray(info["loss"])),
    ):
        state, now_s = after, time.perf_counter()
        row = {name: float(np.asarray(value)) for name, value in info.items()}
        row["step_s"] = now_s - before_s
        if i + 1 == job.steps or (job.eval_every and (i + 1) % job.eval_every == 0):
            row["valid_loss"] = valid_loss = run.valid_loss(state["params"])
        writer.write({"step": i, **row})
        on_step(i, row)
        losses.append(row["loss"])
        before_s = time.perf_counter()
    if start >= job.steps:
        valid_loss = run.valid_loss(state["params"])
    return Trained(state["params"], setup, mesh, tuple(losses), valid_loss)


def save_model(trained: Trained, task: Task, folder: str | Path) -> str:
    """Write a trained model: as a Mixtral that others open where it is one, else as safetensors.

    Args:
      trained: from `train`; called by all processes.
      task: what was trained.
      folder: made if need be; process 0 writes.

    Returns:
      ``mixtral``, or ``own``: tensors under the names of `model.init`, experts stacked.

    >>> import tempfile
    >>> task = Task(width=8, heads=2, depth=1, experts=8, length=16, batch=1)
    >>> save_model(train(Job(task, steps=1)), task, tempfile.mkdtemp())  # doctest: +SKIP
    'mixtral'
    """
    whole = jax.jit(lambda x: x, out_shardings=NamedSharding(trained.mesh, P()))
    params = jax.tree.map(np.asarray, whole(trained.params))
    config, form = trained.setup.config, "own"
    llama = config.model_type in ("llama", "mistral") and not config.qkv_bias
    if task.gate == "gshard" and not task.shared_hidden and llama:
        params, config = to_mixtral(params, config, task.k)
        form = "mixtral"
    if jax.process_index() == 0:
        if form == "mixtral":
            lm.save(folder, params, config)
        else:
            flat = flatten(params)
            write_safetensors(folder, flat, flat.__getitem__)
    return form


def _identity(job: Job) -> dict[str, Any]:
    free = ("steps", "save_every", "eval_every")  # a run may go on longer than was first asked
    return {k: v for k, v in dataclasses.asdict(job).items() if k not in free}


class _Run:
    """The compiled functions of a run."""

    def __init__(self, job: Job, setup: Setup, mesh: Mesh) -> None:
        self.job, self.setup, self.mesh = job, setup, mesh
        self.optimizer = optimizers.PRESETS[job.task.optimizer](lr=job.task.lr)
        self.params = setup.make()
        shapes = jax.eval_shape(lambda: self.params)
        self.specs = {name: jax.tree.map(lambda _: P(), tree) for name, tree in shapes.items()}
        self.specs["moe"] = {
            i: layer_specs(layer, setup.spec, AXES) for i, layer in shapes["moe"].items()
        }
        self.numbers = mixtures(shapes)
        self._root = jax.random.key(job.seed)
        mapped = partial(jax.shard_map, mesh=mesh)
        batch = P(AXES.tokens)
        self._grads = mapped(
            self._rank_grads, in_specs=(self.specs, batch, P()), out_specs=(P(), P(), self.specs)
        )
        options = separate_collectives(mesh)
        self.step = jax.jit(self._step, donate_argnums=0, compiler_options=options)
        self._loss = jax.jit(mapped(self._rank_loss, in_specs=(self.specs, batch), out_specs=P()))

    def init(self) -> dict[str, Any]:
        """Place fresh parameters over the mesh and make the optimiser's state beside them."""
        params = jax.tree.map(self._place, self.params, self.specs)
        self.params = None  # the copy on the mesh is the one that counts
        shapes = jax.eval_shape(self.optimizer.init, params)
        specs = optax.tree_map_params(
            self.optimizer, lambda _, spec: spec, shapes, self.specs,
            transform_non_params=lambda _: P(),
        )  # fmt: skip
        to_mesh = jax.tree.map(partial(NamedSharding, self.mesh), specs)
        memory = jax.jit(self.optimizer.init, out_shardings=to_mesh)(params)
        return {"params": params, "optimizer": memory}

    def to_batch(self, rows: np.ndarray) -> jax.Array:
        """Join every process's rows into one batch."""
        sharding = NamedSharding(self.mesh, P(AXES.tokens))
        return jax.make_array_from_process_local_data(sharding, rows)

    def valid_loss(self, params: Any) -> float:
        """Average the cross-entropy over held-out windows, a number that all ranks share."""
        ranks, rows = self.mesh.size, self.setup.valid
        each = -(-len(rows) // ranks)
        # Every rank needs as many windows: the first ones are taken again to fill up.
        padded = np.resize(rows, (each * ranks, rows.shape[1]))
        sharding = NamedSharding(self.mesh, P(AXES.tokens))
        placed = jax.make_array_from_callback(padded.shape, sharding, lambda at: padded[at])
        return float(np.asarray(self._loss(params, placed)))

    def _place(self, x: Any, spec: P) -> jax.Array:
        x = np.asarray(x)
        sharding = NamedSharding(self.mesh, spec)
        return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])

    def _stages(self, key: jax.Array | None) -> Any:
        setup, plan = self.setup, self.job.plan
        return lm_stages(setup.config, setup.spec, self.numbers, plan, AXES, key)

    def _rank_grads(self, params: Any, tokens: jax.Array, key: jax.Array) -> Any:
        stages = self._stages(jax.random.fold_in(key, jax.lax.axis_index(AXES.tokens)))
        setup, plan = self.setup, self.job.plan
        if any(layer.gradient_bytes for layer in plan.layers):
            parts = cut(params, setup.config)
            loss, found, infos = value_and_grad(stages, parts, tokens, setup.spec, plan, AXES)
            grads = paste(found, self.numbers)
        else:
            # JAX sums the gradients of what is on every rank by itself.
            def total(params: Any) -> Any:
                parts = cut(params, setup.config)
                share, infos = loss_of(stages, parts, tokens, setup.spec, plan, AXES)
                return jax.lax.psum(share, AXES.tokens), infos

            (loss, infos), grads = jax.value_and_grad(total, has_aux=True)(params)
        aux = sum((info.loss for info in infos), jnp.zeros(()))
        told = {
            "loss": loss - aux,
            "auxiliary": aux,
            "dropped": jnp.mean(jnp.stack([info.dropped for info in infos])),
            "entropy": jnp.mean(jnp.stack([info.entropy for info in infos])),
        }
        load = {str(i): info.load for i, info in zip(self.numbers, infos, strict=True)}
        return told, load, grads

    def _rank_loss(self, params: Any, tokens: jax.Array) -> jax.Array:
        setup, plan = self.setup, self.job.plan
        parts = cut(params, setup.config)
        share, infos = loss_of(self._stages(None), parts, tokens, setup.spec, plan, AXES)
        aux = sum((info.loss for info in infos), jnp.zeros(()))
        return jax.lax.psum(share, AXES.tokens) - aux

    def _step(self, state: Any, batch: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
        tokens, number = batch
        key = jax.random.fold_in(self._root, number)
        told, load, grads = self._grads(state["params"], tokens, key)
        updates, memory = self.optimizer.update(grads, state["optimizer"], state["params"])
        params: Any = optax.apply_updates(state["params"], updates)
        if self.job.task.gate == "bias":
            params = {**params, "moe": _move_biases(params["moe"], load)}
        experts = jnp.stack(list(load.values()))
        told["imbalance"] = jnp.max(experts) * experts.shape[-1]
        return {"params": params, "optimizer": memory}, told


def _move_biases(moe: Any, load: Any) -> Any:
    moved = {}
    for i, layer in moe.items():
        gate = {**layer["gate"], "bias": move_bias(layer["gate"]["bias"], load[i])}
        moved[i] = {**layer, "gate": gate}
    return moved
