"""Fine-tuning as an editing method: FT, FT-L, FT-M, and LoRA; a batch of requests at once.

FT follows the gradient of the requests' loss in the down-projections of a few layers. FT-L keeps
every entry within ε of its old value and predicts the whole target from the prompt's last token;
FT-M predicts each token of the target after those before it (teacher forcing).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsys.core.errors import UserError
from jaxsys.edit.contract import Editable, Edited, Info, Request
from jaxsys.edit.editable import get_matrix, matrix_path, with_leaf
from jaxsys.edit.factors import apply
from jaxsys.edit.rows import Rows, checked, log_probs, mean_nll, rows_of
from jaxsys.models import lm, lora
from jaxsys.models.lm.families import layout_of
from jaxsys.models.lm.layout import join, subtree
from jaxsys.train.optimizers import PRESETS


@dataclass(frozen=True)
class FT:
    """Set fine-tuning of the down-projections of some layers.

    Attributes:
      layers: whose matrix is tuned; None: the one at a third of the depth. On SmolLM2-135M it kept
        all of five neighbourhood prompts where two thirds of the depth, the peers' choice for
        models of seven billion parameters, kept two.
      loss: ``last``: all tokens of the target are predicted from the prompt's last token, as the
        peers have it for FT-L; ``target``: teacher-forced.
      clamp: ε, the farthest that an entry may move; None for no bound.
      lr: of Adam.
      steps: at most.
      stop: mean loss, in nats per token, below which no further step is taken.

    Raises:
      UserError: for numbers that are not positive.

    >>> FT().clamp is None, FTL().clamp, FTM().loss
    (True, 0.005, 'target')
    """

    layers: tuple[int, ...] | None = None
    loss: Literal["target", "last"] = "last"
    clamp: float | None = None
    lr: float = 5e-4
    steps: int = 25
    stop: float = 1e-2

    def __post_init__(self) -> None:
        if min(self.steps, self.lr, 1.0 if self.clamp is None else self.clamp) <= 0:
            raise UserError(
                f"steps is {self.steps}, lr {self.lr} and clamp {self.clamp}; expected positive "
                "numbers; correct them"
            )


@dataclass(frozen=True)
class FTL(FT):
    """Set FT-L: FT with every entry kept within ε of its old value.

    The authors' bounds for GPT-2 go from 2e-3 (medium) to 5e-4 (XL); 5e-4 changed no answer of
    SmolLM2-135M, and 5e-3 changed nine of ten.

    >>> FTL(clamp=2e-3).loss
    'last'
    """

    clamp: float | None = 5e-3


@dataclass(frozen=True)
class FTM(FT):
    """Set FT-M: FT with the loss of the target's tokens, each after those before it.

    >>> FTM().loss
    'target'
    """

    loss: Literal["target", "last"] = "target"


@dataclass(frozen=True)
class LoRA:
    """Set editing by adapters that are trained on the requests and then merged.

    Attributes:
      layers: that get adapters; None for all.
      modules: roles that get them: ``q``, ``k``, ``v``, ``out``, ``gate``, ``up``, ``down``.
      rank: r.
      alpha: α; an adapter counts α / r times.
      lr: of AdamW without decay. The peers' 5e-3 needed three steps on SmolLM2-135M and kept no
        neighbourhood prompt; 1e-3 needs five to eleven and keeps one of six, where FT-M keeps all
        that the model had: adapters in every layer are no local edit.
      steps: at most.
      stop: mean loss, in nats per token, below which no further step is taken.
      seed: of the matrices A.

    Reference: arXiv 2106.09685.

    >>> LoRA().modules
    ('q', 'v')
    """

    layers: tuple[int, ...] | None = None
    modules: tuple[str, ...] = ("q", "v")
    rank: int = 8
    alpha: float = 32.0
    lr: float = 1e-3
    steps: int = 70
    stop: float = 1e-2
    seed: int = 0


def edit_finetune(
    model: Editable,
    config: FT,
    params: Any,
    requests: Sequence[Request],
    stats: Any = None,
    state: Any = None,
) -> Edited:
    """Follow the gradient of a batch of requests in a few matrices, with Adam.

    min_W (1/N) Σ_i −(1/|o_i|) Σ_t log p_W(o_it | …), with ‖W − W_0‖∞ ≤ ε after every step if there
    is a bound (Zhu et al. 2020, equation 3; ROME's authors run it so: arXiv 2202.05262, E.1).

    Args:
      model: configuration and tokenizer.
      config: `FT`, `FTL` or `FTM`.
      params: not changed.
      requests: one batch, fitted jointly.
      stats: not used.
      state: not used; edits follow one another in the parameters alone.

    Returns:
      The edited parameters; the factors are (I, ΔWᵀ), as ΔW has any rank.

    Raises:
      UserError: for requests that cannot be edited, or a fit that is no longer finite.

    Reference: arXiv 2012.00363; FT-M: arXiv 2401.01286.

    >>> from jaxsys.data import ByteTokenizer
    >>> lm_config = lm.LMConfig("llama", 256, 16, 2, 2, 2, 8, 24, 64)
    >>> params, facts = lm.init(jax.random.key(0), lm_config), [Request("Rome is", "Rome", "big")]
    >>> done = edit_finetune(Editable(lm_config, ByteTokenizer()), FTL(steps=2), params, facts)
    >>> [a.shape for a in done.info.factors["model.layers.0.mlp.down_proj.weight"]]
    [(16, 16), (24, 16)]
    """
    del stats, state
    layers = _layers(config.layers, model.config)
    paths = [matrix_path(model.config, i) for i in layers]
    old = {path: get_matrix(model.config, params, path) for path in paths}
    rows = rows_of(model, params, checked(model, requests), min(layers), config.loss)
    trained = {path: subtree(params, path).astype(jnp.float32) for path in paths}
    clamp = np.inf if config.clamp is None else config.clamp
    trained, notes = _descend(params, trained, rows, model.config, config, clamp)
    factors = {}
    for path, matrix in trained.items():
        new = matrix.T if layout_of(model.config).in_out else matrix
        delta = new - old[path].astype(jnp.float32)
        factors[path] = (jnp.eye(delta.shape[0], dtype=jnp.float32), delta.T)
    info = Info(factors, notes)
    return Edited(apply(model, params, info), None, info)


def edit_lora(
    model: Editable,
    config: LoRA,
    params: Any,
    requests: Sequence[Request],
    stats: Any = None,
    state: Any = None,
) -> Edited:
    """Train adapters on a batch of requests and merge them: ΔW = (α / r) B A.

    Args:
      model: configuration and tokenizer.
      config: see `LoRA`.
      params: not changed.
      requests: one batch, fitted jointly, each token of a target after those before it.
      stats: not used.
      state: not used; edits follow one another in the parameters alone.

    Returns:
      The edited parameters, with the adapters as factors.

    Raises:
      UserError: for requests that cannot be edited, modules that the model lacks, or a fit that
        is no longer finite.

    Reference: arXiv 2106.09685.

    >>> lm_config = lm.LMConfig("llama", 256, 16, 2, 2, 2, 8, 24, 64)
    >>> edit_lora(Editable(lm_config, None), LoRA(modules=("qk",)), {}, [])
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: 'qk' is no role of a matrix; ...
    """
    del stats, state
    layers = tuple(range(model.config.layers)) if config.layers is None else config.layers
    paths = _adapted(model.config, _layers(layers, model.config), config.modules)
    flip = layout_of(model.config).in_out
    for path in paths:
        get_matrix(model.config, params, path)
    fresh = lora.init(
        jax.random.key(config.seed),
        params,
        paths,
        rank=config.rank,
        alpha=config.alpha,
        in_out=flip,
    )
    rows = rows_of(model, params, checked(model, requests), min(layers))
    trained, notes = _descend(params, fresh, rows, model.config, config)
    factors = {path: (each.scale * each.b, each.a.T) for path, each in trained.items()}
    info = Info(factors, notes)
    return Edited(apply(model, params, info), None, info)


def default_layer(config: Any) -> int:
    """Give the layer at a third of the depth: 10 of 30.

    >>> default_layer(lm.LMConfig("llama", 97, 32, 30, 4, 2, 8, 48, 64))
    10
    """
    return config.layers // 3


def _layers(layers: tuple[int, ...] | None, config: Any) -> tuple[int, ...]:
    chosen = (default_layer(config),) if layers is None else layers
    bad = [i for i in chosen if not 0 <= i < config.layers]
    if bad or not chosen:
        raise UserError(
            f"layers is {chosen}; expected some of 0 to {config.layers - 1}; correct them"
        )
    return tuple(chosen)


def _adapted(config: Any, layers: Sequence[int], roles: Sequence[str]) -> list[str]:
    layout, paths = layout_of(config), []
    for i in layers:
        for role in roles:
            if role not in ("q", "k", "v", "out", "gate", "up", "down"):
                raise UserError(
                    f"{role!r} is no role of a matrix; expected some of q, k, v, out, gate, up, "
                    "down; correct modules"
                )
            # One fused matrix stands for queries, keys and values in some families.
            name = layout.qkv if layout.qkv and role in "qkv" else getattr(layout, role)
            if not name or (config.is_sparse(i) and role in ("gate", "up", "down")):
                raise UserError(
                    f"layer {i} of this {config.model_type} model has no single matrix in the role "
                    f"{role!r}; choose others in modules"
                )
            paths.append(join(lm.layer_prefix(config, i), name, "weight"))
    return list(dict.fromkeys(paths))


def _descend(
    params: Any, trained: Any, rows: Rows, lm_config: Any, config: FT | LoRA, clamp: float = np.inf
) -> tuple[Any, dict[str, Any]]:
    """Take steps of Adam on matrices or adapters until the loss is low enough."""
    optimizer = _adam(config.lr)
    start, memory = trained, jax.jit(optimizer.init)(trained)
    steps = 0
    while True:
        values, grads = _gradient(
            trained, params, rows.x, rows.answers, lm_config=lm_config, layer=rows.layer
        )
        losses = np.asarray(values, np.float64)
        if not np.isfinite(losses).all():
            raise UserError(
                f"the loss after {steps} steps is not finite; expected a number; lower lr or set a "
                "clamp"
            )
        if losses.mean() < config.stop or steps == config.steps:
            return trained, {"loss": losses, "steps": steps}
        trained, memory = _step(optimizer.update, trained, grads, memory, start, clamp)
        steps += 1


@lru_cache(maxsize=16)
def _adam(lr: float) -> optax.GradientTransformation:
    # One object for one rate: it is a static argument of a compiled step.
    return PRESETS["adamw"](lr, b2=0.999, weight_decay=0.0)


@partial(jax.jit, static_argnames=("lm_config", "layer"))
def _gradient(trained, params, x, answers, *, lm_config, layer):
    def objective(trained):
        log_p, _ = log_probs(
            _join(params, trained, lm_config), lm_config, x, answers.at, layer=layer
        )
        losses = mean_nll(log_p, answers.ids, answers.mask)
        return losses.mean(), losses

    grads, losses = jax.grad(objective, has_aux=True)(trained)
    return losses, grads


def _join(params: Any, trained: Any, lm_config: Any) -> Any:
    if any(isinstance(leaf, lora.Adapter) for leaf in trained.values()):
        return lora.apply(params, trained, in_out=layout_of(lm_config).in_out)
    for path, matrix in trained.items():
        params = with_leaf(params, path, matrix.astype(subtree(params, path).dtype))
    return params


@partial(jax.jit, static_argnums=0)
def _step(update, trained, grads, memory, start, clamp):
    updates, memory = update(grads, memory, trained)
    moved = optax.apply_updates(trained, updates)
    kept = jax.tree.map(lambda new, old: jnp.clip(new, old - clamp, old + clamp), moved, start)
    return kept, memory
