"""What the experiment on Mediator shares: held-out rows, scores, routed requests, records."""

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from family import PROMPT, TEXTS, Batch, Family, base, held_out, load_experts, prompts

from jaxsys.core.report import atomic_write, to_json
from jaxsys.merge.route import hidden_fn, logits_fn
from jaxsys.merge.routed import Routed, materialise, round_weights
from jaxsys.merge.router import (
    BlendConfig,
    HeadConfig,
    blend,
    calibrate,
    pool,
    posterior,
    train_head,
    uncertainty_logits,
)
from jaxsys.models import lm

RESULTS = Path(__file__).parent / "results"
LEVELS = 16


class Score(NamedTuple):
    """Held-out score of one task: nats per token, and the share of tokens that come first."""

    nats: float
    accuracy: float


class Bench:
    """A family's base, experts and held-out rows, and how a model is scored on them."""

    def __init__(self, family: Family, tasks: Sequence[str], seed: int, work: Path, rows: dict):
        self.family, self.tasks, self.seed, self.rows = family, tuple(tasks), seed, rows
        self.base, self.config, self.tokenizer = base(family)
        self.experts = load_experts(family, seed, work, self.tasks)

    @property
    def n(self) -> int:
        """Count the experts."""
        return len(self.tasks)

    def batch(self, task: str, split: str) -> Batch:
        """Give held-out rows; those of `train` are for routers and statistics."""
        kind = "text" if task in TEXTS else "rule"
        return held_out(self.family, task, split, self.rows[split][kind])

    @cached_property
    def score_rows(self) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
        """Make (params, tokens, mask) to sums over each row: nats, hits, tokens."""
        config = self.config

        @jax.jit
        def score(params: Any, tokens: Any, mask: Any) -> Any:
            logits = lm.apply(params, config, tokens[:, :-1]).logits.astype(jnp.float32)
            goal, counts = tokens[:, 1:], mask[:, 1:].astype(jnp.float32)
            chosen = jnp.take_along_axis(logits, goal[..., None], axis=-1)[..., 0]
            nats = jax.nn.logsumexp(logits, axis=-1) - chosen
            hits = (logits.argmax(-1) == goal).astype(jnp.float32)
            return tuple(jnp.sum(x * counts, axis=1) for x in (nats, hits, jnp.ones_like(hits)))

        return score

    def scores(self, params: Any, split: str = "test") -> dict[str, Score]:
        """Score one model on all tasks, or a list of models on one task each."""
        models = params if isinstance(params, list) else [params] * self.n
        found = {}
        for task, model in zip(self.tasks, models, strict=True):
            found[task] = summed(*self.score_rows(model, *self.batch(task, split)))
        return found

    def routed_scores(
        self, routed: Routed, weights: dict[str, np.ndarray], split: str = "test"
    ) -> dict[str, Score]:
        """Score a routed family, each row served with its own rounded weights [rows, N]."""
        return {
            task: self.served(routed, weights[task], self.batch(task, split)) for task in self.tasks
        }

    def served(self, routed: Routed, weights: np.ndarray, batch: Batch) -> Score:
        """Score rows, making each distinct set of parameters once."""
        codes = np.stack([round_weights(w, LEVELS) for w in weights])
        total = np.zeros((3, len(codes)))
        for code in np.unique(codes, axis=0):
            here = (codes == code[None]).all(1)
            params = make_params(routed, jnp.asarray(code / LEVELS, jnp.float32))
            sums = self.score_rows(params, *batch)
            total[:, here] = np.stack([np.asarray(s) for s in sums])[:, here]
        return summed(*total)


@jax.jit
def make_params(routed: Routed, weights: Any) -> Any:
    """Make the parameters of a request in float32."""
    return materialise(routed, weights, dtype=jnp.dtype(jnp.float32))


def summed(nats: Any, hits: Any, count: Any) -> Score:
    """Average over the tokens of all rows."""
    total = float(np.sum(count))
    return Score(float(np.sum(nats)) / total, float(np.sum(hits)) / total)


def mean(found: dict[str, Score]) -> Score:
    """Average over tasks."""
    return Score(
        float(np.mean([s.nats for s in found.values()])),
        float(np.mean([s.accuracy for s in found.values()])),
    )


def prompt_of(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Give what a router may read, all cut to one width."""
    width = PROMPT + 1
    tokens, mask = batch.tokens[:, :width], prompts(batch)[:, :width]
    pad = ((0, 0), (0, max(width - tokens.shape[1], 0)))
    return jnp.asarray(np.pad(tokens, pad)), jnp.asarray(np.pad(mask, pad))


class Routing(NamedTuple):
    """A router as one function: a batch to posteriors [rows, N]."""

    posterior: Callable[[Batch], jax.Array]
    stored_bytes: int


def head_routing(bench: Bench, shared: Any, head: HeadConfig) -> Routing:
    """Train a head on prompts of the training split, reading the shared model."""
    hidden = hidden_fn(bench.config)

    def features(batch: Batch) -> jax.Array:
        tokens, mask = prompt_of(batch)
        return pool(hidden(shared, tokens, mask), mask)

    x = [np.asarray(features(bench.batch(task, "train"))) for task in bench.tasks]
    labels = np.repeat(np.arange(bench.n), [len(rows) for rows in x])
    router = train_head(np.concatenate(x), labels, bench.n, head, key=jax.random.key(bench.seed))
    size = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(router))
    return Routing(lambda batch: posterior(router, features(batch)), 4 * size)


def own_routing(bench: Bench, routed: Routed, kind: str) -> Routing:
    """Route by the experts' own uncertainty; only a temperature is fitted."""

    def logits(batch: Batch) -> jax.Array:
        tokens, mask = prompt_of(batch)
        return uncertainty_logits(
            logits_fn(bench.config),
            lambda i: make_params(routed, jnp.eye(bench.n)[i]),
            bench.n,
            tokens,
            mask,
            "nll" if kind == "nll" else "entropy",
        )

    rows = [np.asarray(logits(bench.batch(task, "valid"))) for task in bench.tasks]
    labels = np.repeat(np.arange(bench.n), [len(r) for r in rows])
    temperature = calibrate(np.concatenate(rows), labels)
    return Routing(lambda batch: jax.nn.softmax(logits(batch) / temperature, axis=-1), 4)


def weights_of(
    bench: Bench, routing: Routing, config: BlendConfig, split: str = "test"
) -> tuple[dict[str, np.ndarray], float]:
    """Give every row's weights, and the share of rows whose heaviest expert is the right one."""
    found, right = {}, []
    for i, task in enumerate(bench.tasks):
        w, _ = blend(routing.posterior(bench.batch(task, split)), config)
        found[task] = np.asarray(w)
        right.append(float((found[task].argmax(1) == i).mean()))
    return found, float(np.mean(right))


def ideal(bench: Bench, split: str = "test") -> dict[str, np.ndarray]:
    """Give the weights of a router that is never wrong."""
    return {
        task: np.tile(np.eye(bench.n)[i], (len(bench.batch(task, split).tokens), 1))
        for i, task in enumerate(bench.tasks)
    }


class Records:
    """Results by key in one JSON file, so that a run that was stopped goes on."""

    def __init__(self, file: Path):
        self.file = file
        self.found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """Give what is there, or make and keep it."""
        if key not in self.found:
            self.found[key] = json.loads(to_json(make()))
            lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in self.found.items()]
            atomic_write(self.file, "{\n" + ",\n".join(lines) + "\n}\n")
        return self.found[key]
