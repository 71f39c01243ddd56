"""Mediator for language models in files: build a folder from checkpoints, and answer from it.

The mathematics takes functions and trees (`mediator`, `router`, `routed`); here they meet
`models.lm`, its tokenizers and `evaluate.generate`.
"""

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.core.report import atomic_write
from jaxsys.data import TokenStream, load_tokenizer, read_text, save_tokenizer
from jaxsys.evaluate import from_lm, generate
from jaxsys.evaluate.open import encode_prompt
from jaxsys.merge.artefact import Artefact, load_artefact, save_artefact
from jaxsys.merge.mediator import Mediated, MediatorConfig, mediate
from jaxsys.merge.routed import Answer, Server, count_experts, materialise
from jaxsys.merge.router import (
    BlendConfig,
    HeadConfig,
    Router,
    blend,
    calibrate,
    pool,
    posterior,
    train_head,
    uncertainty_logits,
)
from jaxsys.models import lm

By = Literal["head", "entropy", "nll"]


@dataclass(frozen=True)
class RouterPlan:
    """Say how requests are routed.

    Attributes:
      by: ``head``: a head trained on `texts`; ``entropy`` or ``nll``: the experts' own uncertainty,
        whose temperature is calibrated on `texts` where there are any.
      texts: a text file of each expert's task.
      prompts: how many prompts are cut from each text.
      prompt_tokens: tokens of such a prompt.
      head: of the training.
      blend: how a posterior becomes weights.

    >>> RouterPlan("entropy").prompts
    128
    """

    by: By = "head"
    texts: tuple[Path, ...] = ()
    prompts: int = 128
    prompt_tokens: int = 32
    head: HeadConfig = field(default_factory=HeadConfig)
    blend: BlendConfig = field(default_factory=BlendConfig)


class Told(NamedTuple):
    """Hold an answer and how it came about.

    >>> Told("text", {"a": 1.0}, 0.0, False, 0.1).weights
    {'a': 1.0}
    """

    text: str
    weights: dict[str, float]
    uncertainty: float
    cached: bool
    route_s: float


@functools.cache
def hidden_fn(config: lm.LMConfig) -> Callable[[Any, Any, Any], jax.Array]:
    """Make (params, tokens [B, T], mask [B, T]) to what the output matrix reads, [B, T, D].

    >>> config = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> tokens = jnp.ones((2, 5), jnp.int32)
    >>> hidden_fn(config)(lm.init(jax.random.key(0), config), tokens, tokens == 1).shape
    (2, 5, 32)
    """
    point = f"{lm.modules(config)[-1]}:in"

    @jax.jit
    def hidden(params: Any, tokens: Any, mask: Any) -> jax.Array:
        return lm.apply(params, config, tokens, mask=mask, taps=(point,)).taps[point]

    return hidden


@functools.cache
def logits_fn(config: lm.LMConfig) -> Callable[[Any, Any, Any], jax.Array]:
    """Make (params, tokens [B, T], mask [B, T]) to logits [B, T, V].

    >>> config = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> tokens = jnp.ones((2, 5), jnp.int32)
    >>> logits_fn(config)(lm.init(jax.random.key(0), config), tokens, tokens == 1).shape
    (2, 5, 97)
    """
    return jax.jit(lambda params, tokens, mask: lm.apply(params, config, tokens, mask=mask).logits)


def text_prompts(
    tokenizer: Any, path: str | Path, count: int, length: int, seed: int = 0
) -> np.ndarray:
    """Cut prompts from a text, in an order drawn at random.

    Args:
      tokenizer: of the model.
      path: UTF-8 text.
      count: prompts at most.
      length: tokens of each.
      seed: of the order.

    Returns:
      [prompts, length] token ids, of which the first is the begin token if the tokenizer has one.

    Raises:
      UserError: if the text is too short for four prompts.

    >>> from jaxsys.data import ByteTokenizer
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "a.txt")
    >>> _ = file.write_text("abcd" * 20)
    >>> text_prompts(ByteTokenizer(), file, 5, 8).shape
    (5, 8)
    """
    ids = np.asarray(tokenizer.encode(read_text(path)), np.int32)
    begin = getattr(tokenizer, "bos_id", None)
    body = length - (begin is not None)
    windows = (ids.size - 1) // max(body, 1)
    if windows < 4:
        raise UserError(
            f"{path} has {ids.size} tokens, which is {windows} prompts of {length}; four or more "
            "are needed to train a router; give a longer text or shorter prompts"
        )
    rows = TokenStream(ids, min(count, windows), body, seed=seed).batch_at(0)[:, :-1]
    return rows if begin is None else np.pad(rows, ((0, 0), (1, 0)), constant_values=begin)


def build_route(
    base: str | Path,
    models: Sequence[str | Path],
    out: str | Path,
    config: MediatorConfig | None = None,
    plan: RouterPlan | None = None,
    *,
    names: Sequence[str] = (),
    dtype: Any = None,
    seed: int = 0,
) -> Mediated:
    """Build Mediator from checkpoints of language models and write it as one folder.

    Args:
      base: name or path, as `models.lm.find_model` takes it.
      models: N of the same architecture.
      out: folder; gets the artefact, the model's configuration and the base's tokenizer.
      config: of Mediator.
      plan: of the router.
      names: of the experts; their paths' last parts by default.
      dtype: of the dense parts; the base's by default.
      seed: of everything random.

    Returns:
      What was built.

    Raises:
      UserError: for models of another architecture, or texts that are missing or too short.

    >>> build_route("no/such/base", ["a"], "out")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: no/such/base is neither ...
    """
    config, plan = config or MediatorConfig(), plan or RouterPlan()
    paths = [lm.find_model(name) for name in (base, *models)]
    names = tuple(names) or tuple(path.stem for path in paths[1:])
    _check_plan(plan, names, len(models))
    tokenizer = load_tokenizer(paths[0])
    opened = [lm.open_tensors(path) for path in paths]
    lm_config = opened[0][0]
    _check_alike(paths, [found for found, _ in opened])
    key = jax.random.key(seed)
    built = mediate(opened[0][1], [t for _, t in opened[1:]], config, key=key, dtype=dtype)
    tokens = [
        text_prompts(tokenizer, text, plan.prompts, plan.prompt_tokens, seed) for text in plan.texts
    ]
    head, temperature = _make_router(built, lm_config, plan, tokens, key)
    notes = {
        "config": asdict(config),
        "layers": built.layers,
        "conflicts": built.conflicts.layers,
        "by": plan.by,
    }
    made = Artefact(built.routed, names, "mediator", head, plan.blend, temperature, notes)
    folder = save_artefact(out, made)
    save_tokenizer(folder, tokenizer)
    hf = lm.config_to_hf(lm_config)
    atomic_write(folder / "config.json", json.dumps(hf, indent=2) + "\n")
    return built


def _check_alike(paths: Sequence[Path], configs: Sequence[lm.LMConfig]) -> None:
    """Refuse models that compute something else with tensors of the same shapes."""

    def mathematics(config: lm.LMConfig) -> lm.LMConfig:
        return replace(config, bos_id=None, eos_ids=(), pad_id=None, max_positions=1)

    for path, config in zip(paths[1:], configs[1:], strict=True):
        if mathematics(config) != mathematics(configs[0]):
            raise UserError(
                f"{path} is configured otherwise than the base {paths[0]}; expected the same "
                "family, sizes, positions and norms; merge models that were tuned from this base"
            )


def _check_plan(plan: RouterPlan, names: Sequence[str], experts: int) -> None:
    if len(names) != experts or len(set(names)) != experts:
        raise UserError(
            f"the names {', '.join(names)} are not those of {experts} experts; name each once"
        )
    if (plan.texts and len(plan.texts) != experts) or (plan.by == "head" and not plan.texts):
        raise UserError(
            f"got {len(plan.texts)} texts for {experts} experts; a head is trained on one text of "
            "each expert's task; give them in the experts' order, or route by entropy"
        )


def _make_router(
    built: Mediated,
    config: lm.LMConfig,
    plan: RouterPlan,
    tokens: list[np.ndarray],
    key: jax.Array,
) -> tuple[Router | None, float]:
    if not tokens:
        return None, 1.0
    n, rows = len(tokens), np.concatenate(tokens)
    labels = np.repeat(np.arange(n), [len(t) for t in tokens])
    mask = jnp.ones(rows.shape, bool)
    if plan.by == "head":
        shared = materialise(built.routed._replace(parts={}), jnp.ones(1))
        features = pool(hidden_fn(config)(shared, jnp.asarray(rows), mask), mask)
        return train_head(np.asarray(features), labels, n, plan.head, key=key), 1.0
    if not built.routed.parts:
        return None, 1.0
    logits = _expert_logits(built.routed, config, jnp.asarray(rows), mask, plan.by)
    return None, calibrate(np.asarray(logits), labels)


def _expert_logits(routed: Any, config: lm.LMConfig, tokens: Any, mask: Any, by: str) -> jax.Array:
    n = count_experts(routed)
    make = jax.jit(materialise)
    kind: Literal["entropy", "nll"] = "nll" if by == "nll" else "entropy"
    return uncertainty_logits(
        logits_fn(config), lambda i: make(routed, jnp.eye(n)[i]), n, tokens, mask, kind
    )


class Route:
    """Answer prompts from a folder that `build_route` wrote.

    Args:
      folder: its path.
      capacity: parameter sets kept ready.
      dtype: of the parameters; as stored by default.

    Raises:
      UserError: if the folder holds no routed merge of a language model.

    >>> Route("nowhere")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: nowhere holds no routed merge ...
    """

    def __init__(self, folder: str | Path, *, capacity: int = 4, dtype: Any = None):
        self.artefact = load_artefact(folder)
        self.config = lm.load_config(folder)
        self.tokenizer = load_tokenizer(folder)
        routed = self.artefact.routed
        self._shared = materialise(routed._replace(parts={}), jnp.ones(1), dtype=dtype)
        self.server = Server(routed, self.route, capacity=capacity, dtype=dtype)

    def route(self, tokens: Any, mask: Any = None) -> tuple[np.ndarray, float]:
        """Give a prompt's weights and uncertainty.

        Args:
          tokens: [T].
          mask: [T] what is no padding.
        """
        rows = jnp.asarray(tokens, jnp.int32)[None]
        kept = jnp.ones(rows.shape, bool) if mask is None else jnp.asarray(mask)[None]
        made = self.artefact
        if not made.routed.parts:
            return np.ones(1), 0.0
        if made.router is not None:
            features = pool(hidden_fn(self.config)(self._shared, rows, kept), kept)
            p = posterior(made.router, features)
        else:
            by = str(made.notes.get("by", "entropy"))
            logits = _expert_logits(made.routed, self.config, rows, kept, by)
            p = jax.nn.softmax(logits / made.temperature, axis=-1)
        weights, unsure = blend(p, made.blend)
        return np.asarray(weights[0]), float(unsure[0])

    def answer(self, prompt: str, *, max_tokens: int = 64, weights: Any = None) -> Told:
        """Continue a prompt with the parameters that its weights give.

        Args:
          prompt: text.
          max_tokens: at most.
          weights: [N] in place of the router's.
        """
        ids = encode_prompt(self.tokenizer, prompt)
        started_s = time.perf_counter()
        served: Answer = self.server.serve(np.asarray(ids), weights=weights)
        jax.block_until_ready(served.params)
        route_s = time.perf_counter() - started_s
        ends = frozenset(self.config.eos_ids)
        model = from_lm(served.params, self.config)
        found = generate(
            model, [ids], max_tokens=max_tokens, end_ids=ends, tokenizer=self.tokenizer
        )
        shown: Mapping[str, float] = dict(
            zip(self.artefact.names, map(float, served.weights), strict=False)
        )
        return Told(found.texts[0], dict(shown), served.uncertainty, served.cached, route_s)
