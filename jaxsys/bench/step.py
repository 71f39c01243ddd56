"""One training step from a technique: pre-training, full fine-tuning, LoRA, QLoRA, prompt tuning.

A state is a dict of three trees of one structure each: what is trained, what is frozen, and the
optimizer's memory. A leaf that is in one of the first two is None in the other. Where these trees
lie (split over devices, in host memory) is what distinguishes the stages of ZeRO and offloading;
the collectives and copies come from XLA.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsys.bench.techniques import Method, Technique, Where, why_not
from jaxsys.core.errors import UserError
from jaxsys.models import lm, lora
from jaxsys.models.lm.execution import STACKED, bring
from jaxsys.models.lm.families import layout_of
from jaxsys.models.lm.layout import join
from jaxsys.models.quantise import quantise
from jaxsys.train.optimizers import adamw

DATA = "data"
_TRAINED = (".adapter.a", ".adapter.b")


@dataclass(frozen=True)
class Task:
    """Say what a step trains and on how much.

    Attributes:
      method: ``pretrain`` and ``full`` train every parameter (``full`` counts the last three
        quarters of each row only, as the answer to the first), ``lora`` adapters, ``prompt``
        vectors before the text.
      batch: rows of a step, over all devices and micro-batches.
      tokens: T that are read in a row.
      rank: of adapters.
      alpha: α of adapters.
      prompt_tokens: vectors of a prompt.
      lr: learning rate of AdamW.
      seed: of parameters and data.

    >>> Task("lora", batch=2).rank
    8
    """

    method: Method = "pretrain"
    batch: int = 1
    tokens: int = 128
    rank: int = 8
    alpha: float = 16.0
    prompt_tokens: int = 20
    lr: float = 1e-4
    seed: int = 0


class Built(NamedTuple):
    """A step that is ready to be compiled, and what it takes.

    Attributes:
      step: jitted ``(state, batch) -> (state, info)``; ``info`` has the loss.
      init: makes a state, from the model's parameters or, without, from random ones.
      state: its shapes and shardings.
      batch: likewise of a batch: tokens [A, B/A, T+1] and mask.
      data: makes a batch of random tokens.

    >>> Built._fields
    ('step', 'init', 'state', 'batch', 'data')
    """

    step: Callable[..., Any]
    init: Callable[..., Any]
    state: Any
    batch: Any
    data: Callable[[int], Any]


def build(
    config: lm.LMConfig, technique: Technique, task: Task, devices: Any = None, given: Any = None
) -> Built:
    """Build the step of a technique; nothing is allocated or compiled.

    Args:
      config: the model.
      technique: how.
      task: what.
      devices: to run on; all by default where the technique splits anything, else the first.
      given: shapes of the model's own parameters, where they are not those of a random model.

    Returns:
      The step.

    Raises:
      UserError: if the technique cannot be used here, with the reason.

    >>> config = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> built = build(config, Technique(donate=True), Task(batch=2, tokens=8))
    >>> state, info = built.step(built.init(), built.data(0))
    >>> abs(float(info["loss"]) - 4.57) < 0.5
    True
    """
    chosen = list(jax.devices() if devices is None else devices)
    chosen = chosen if technique.zero or devices is not None else chosen[:1]
    where = Where.here(chosen)
    reason = why_not(technique, config, where, method=task.method, batch=task.batch)
    if reason:
        raise UserError(
            f"technique {technique.name!r} cannot be used here: {reason}; choose another"
        )
    mesh = Mesh(np.array(chosen), (DATA,), axis_types=(AxisType.Auto,))
    optimizer = adamw(task.lr, decays=_decays)
    make = partial(_state, config, technique, task, optimizer)
    params = given or lm.shapes(config, _stored(technique, task))
    abstract = jax.eval_shape(make, _tree(params))
    places = _places(abstract, technique, mesh)
    rows = (technique.accumulate, task.batch // technique.accumulate, task.tokens + 1)
    split = NamedSharding(mesh, P(None, DATA))
    batch = {
        "tokens": jax.ShapeDtypeStruct(rows, jnp.int32, sharding=split),
        "mask": jax.ShapeDtypeStruct(rows, jnp.bool_, sharding=split),
    }
    run = partial(_step, config, technique, optimizer, mesh)
    step = jax.jit(
        run,
        in_shardings=(places, {"tokens": split, "mask": split}),
        out_shardings=(places, NamedSharding(mesh, P())),
        donate_argnums=(0,) if technique.donate else (),
    )
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, places
    )

    def init(params: Any = None) -> Any:
        if params is None:
            params = lm.init(jax.random.key(task.seed), config, _stored(technique, task))
        made = make(params, place=places)
        return jax.tree.map(jax.device_put, made, places)

    return Built(step, init, state, batch, partial(_data, config, technique, task, split))


def _tree(named: Mapping[str, Any]) -> Any:
    from jaxsys.core.tree import unflatten

    return unflatten(named) if any("." in name for name in named) else named


def _stored(technique: Technique, task: Task) -> Any:
    """Type in which the model rests: frozen weights are never needed wider than the computation."""
    frozen = task.method in ("lora", "prompt")
    bf16 = technique.dtype == "bf16" or (frozen and technique.dtype == "mixed")
    return jnp.bfloat16 if bf16 else jnp.float32


def _decays(params: Any) -> Any:
    """Matrices, whether or not their blocks are stacked along one more axis."""

    def decays(path: Any, x: Any) -> bool:
        stacked = any(getattr(key, "key", None) == STACKED for key in path)
        return x.ndim - stacked >= 2

    return jax.tree_util.tree_map_with_path(decays, params)


# State: what is trained, what is frozen, what the optimizer remembers.


def _state(config, technique, task, optimizer, params, place=None) -> dict[str, Any]:
    layout = layout_of(config)
    if technique.weights != "full":
        bits = 8 if technique.weights == "int8" else 4
        params = quantise(params, bits=bits, in_out=layout.in_out)
    if task.method == "lora":
        adapters = lora.init(
            jax.random.key(task.seed + 1),
            params,
            rank=task.rank,
            alpha=task.alpha,
            in_out=layout.in_out,
        )
        narrow = jnp.bfloat16 if technique.dtype == "bf16" else jnp.float32
        adapters = jax.tree.map(lambda x: x.astype(narrow), adapters)
        params = lora.apply(params, adapters, in_out=layout.in_out)
    if technique.layers == "scan":
        params = lm.stack(params, config)
    params = {"model": params}
    if task.method == "prompt":
        wide = jnp.float32 if technique.dtype != "bf16" else jnp.bfloat16
        shape = (task.prompt_tokens, config.width)
        start = config.init_std * jax.random.normal(jax.random.key(task.seed + 1), shape)
        params["prompt"] = start.astype(wide)
    trained, frozen = _part(params, task.method)
    return {"trained": trained, "frozen": frozen, "memory": optimizer.init(trained)}


def _part(params: Any, method: Method) -> tuple[Any, Any]:
    def is_trained(path: Any) -> bool:
        name = jax.tree_util.keystr(path)
        if method == "lora":
            return name.endswith(_TRAINED)
        return method != "prompt" or name == "['prompt']"

    def keep(wanted: bool):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x if is_trained(path) is wanted else None, params
        )

    return keep(True), keep(False)


def _join(trained: Any, frozen: Any) -> Any:
    return jax.tree.map(
        lambda t, f: f if t is None else t, trained, frozen, is_leaf=lambda x: x is None
    )


def _places(state: Any, technique: Technique, mesh: Mesh) -> Any:
    """Give every leaf's sharding: split by the stage of ZeRO, in host memory where offloaded."""
    here = jax.sharding.SingleDeviceSharding(mesh.devices.flat[0]).memory_kind

    def place(tree: Any, *, split: bool, host: bool) -> Any:
        kind = "pinned_host" if host else here

        def one(path: Any, x: Any) -> NamedSharding:
            stacked = any(getattr(key, "key", None) == STACKED for key in path)
            spec = _spec(x.shape, mesh.size, int(stacked)) if split else P()
            return NamedSharding(mesh, spec, memory_kind=kind if x.ndim else here)

        return jax.tree_util.tree_map_with_path(one, tree)

    offload, zero = technique.offload, technique.zero
    return {
        "trained": place(state["trained"], split=zero == 3, host=offload == "parameters"),
        "frozen": place(state["frozen"], split=zero == 3, host=False),
        "memory": place(state["memory"], split=zero >= 1, host=offload != "none"),
    }


def _spec(shape: tuple[int, ...], n: int, skip: int) -> P:
    """Split the longest axis that n divides; the axis of stacked blocks stays whole."""
    axes = [axis for axis in range(skip, len(shape)) if shape[axis] % n == 0]
    if not axes:
        return P()
    best = max(axes, key=lambda axis: shape[axis])
    return P(*(DATA if axis == best else None for axis in range(len(shape))))


def _data(config, technique, task, split, seed: int) -> dict[str, Any]:
    shape = (technique.accumulate, task.batch // technique.accumulate, task.tokens + 1)
    # Row by row, so that every division into micro-batches has the same rows.
    rows = np.random.default_rng((task.seed, seed)).integers(
        config.vocab_size, size=(task.batch, task.tokens + 1), dtype=np.int32
    )
    counts = np.arange(task.tokens + 1) >= (
        0 if task.method == "pretrain" else 1 + task.tokens // 4
    )
    mask = np.broadcast_to(counts, rows.shape)
    batch = {"tokens": rows.reshape(shape), "mask": mask.reshape(shape)}
    return jax.tree.map(lambda x: jax.device_put(x, split), batch)


# The step.


def _step(config, technique, optimizer, mesh, state, batch) -> tuple[Any, dict[str, Any]]:
    places = _places(state, technique, mesh)
    near = _places(state, Technique(zero=technique.zero), mesh)  # the same, on the devices
    far = technique.offload == "parameters"
    objective = jax.value_and_grad(partial(_objective, config, technique, mesh))
    trained, frozen = state["trained"], state["frozen"]

    def grad_fn(trained: Any, frozen: Any, micro: Any) -> Any:
        loss, grads = objective(trained, frozen, micro)
        return loss, jax.device_put(grads, near["trained"]) if far else grads

    loss, grads = _accumulated(grad_fn, trained, frozen, batch)
    if far:
        trained = jax.device_put(trained, near["trained"])
    if technique.zero >= 2:
        kept = _places({**state, "trained": grads}, Technique(zero=3), mesh)["trained"]
        grads = jax.lax.with_sharding_constraint(grads, kept)
    memory = state["memory"]
    if technique.offload != "none":
        memory = jax.device_put(memory, near["memory"])
    with jax.named_scope("optimizer"):
        updates, memory = optimizer.update(grads, memory, trained)
        trained = optax.apply_updates(trained, updates)
    if technique.offload != "none":
        memory = jax.device_put(memory, places["memory"])
    if far:
        trained = jax.device_put(trained, places["trained"])
    return {"trained": trained, "frozen": frozen, "memory": memory}, {"loss": loss}


def _accumulated(grad_fn, trained, frozen, batch) -> tuple[Any, Any]:
    """Sum losses and gradients of micro-batches, each by its share of the tokens that count."""
    counts = jnp.sum(batch["mask"][:, :, 1:], axis=(1, 2), dtype=jnp.float32)
    shares = counts / jnp.sum(counts)
    if shares.shape[0] == 1:
        return grad_fn(trained, frozen, jax.tree.map(lambda x: x[0], batch))

    def add(total, given):
        micro, share = given
        found = grad_fn(trained, frozen, micro)
        return jax.tree.map(lambda a, b: a + share.astype(a.dtype) * b, total, found), None

    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (jnp.zeros(()), trained))
    return jax.lax.scan(add, zero, (batch, shares))[0]


def _objective(config, technique, mesh, trained, frozen, batch) -> Any:
    params = _join(trained, frozen)
    if technique.dtype == "mixed":
        params = jax.tree.map(_narrow, params)
    far = technique.offload == "parameters"
    kind = "device" if far else None
    moved = far or technique.zero == 3
    home = NamedSharding(mesh, P(), memory_kind=kind) if moved else None
    execution = lm.Execution(technique.attention, technique.recompute, home)
    model = _bring_outside(params["model"], config, home)
    prompt = bring(params["prompt"], home) if "prompt" in params else None
    tokens, mask = batch["tokens"], batch["mask"]
    return lm.loss(model, config, tokens, mask, execution=execution, prompt=prompt)


def _narrow(x: Any) -> Any:
    return x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x


def _bring_outside(tree: Any, config: lm.LMConfig, home: Any, prefix: str = "") -> Any:
    """Bring what lies outside the blocks at once; a block's weights come when it is run."""
    blocks = join(config.prefix, layout_of(config).blocks)
    if prefix == blocks or home is None:
        return tree
    if not blocks.startswith(prefix):
        return bring(tree, home)
    return {k: _bring_outside(v, config, home, join(prefix, k)) for k, v in tree.items()}
