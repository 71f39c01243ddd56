"""What the experts of five gates learn on a text of four domains, beside an equally dear dense FFN.

    JAXSYS_DATA=DIR python experiments/moe/specialise.py            about 12 minutes on 2 cores
    JAXSYS_DATA=DIR python experiments/moe/specialise.py --smoke    seconds, kept nowhere

stories260K is upcycled (all five feed-forward parts become eight copies, two per token) and trained
on windows of TinyStories, Shakespeare, WikiText-2 and Python's documentation, equally many of each.
The dense model's feed-forward parts are twice as wide, which costs a token the same products.
Written to `results/`: `specialise.jsonl` (a line per run; those found there are not run again),
`specialise.md` and `specialise.png`.

Expert choice and SoftMoE read the tokens that they are to predict, so two losses are given: over
whole windows, where they cheat, and at the last token of windows that end there, where nobody can.
Sequences end at tokens 32, 64, 96 and 128 for the second.

Found so far, in the first runs that ended (seed 0): after 614,400 tokens the dense model is ahead
(2.249 nats held out, GShard's gate 2.308), and the experts hardly follow domains (information 0.05
nats of at most 1.386). Which holds of the other gates and seeds, `results/specialise.jsonl` will
tell; the causal gates' two losses at the ends must agree.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.measure import machine
from jaxsys.core.report import append_jsonl, atomic_write, figure, markdown_table, save_figure
from jaxsys.core.tree import flatten, unflatten
from jaxsys.data import TokenStream, load_tokenizer, python_docs, read_text
from jaxsys.models import lm
from jaxsys.moe import Capacity, ExpertChoice, Gate, Mixing, MoESpec, Routed
from jaxsys.moe.experts import swiglu
from jaxsys.moe.gates import cosine, noisy_top_k, sigmoid
from jaxsys.moe.gates_dense import expert_choice, soft_moe
from jaxsys.moe.model import apply, loss, routes
from jaxsys.moe.order import sparse_order
from jaxsys.moe.upcycle import upcycle
from jaxsys.train.optimizers import adamw

RESULTS = Path(__file__).parent / "results"
DOMAINS = ("stories", "shakespeare", "wikitext", "python")
LENGTH, EXPERTS, PER_TOKEN = 128, 8, 2
NOISE = 0.05  # of copies, relative: else the halves of a widened dense part stay equal for ever


@dataclass(frozen=True)
class Size:
    """Say how much is run."""

    seeds: int = 3
    steps: int = 300
    rows: int = 4  # of each domain in a batch
    held: int = 24  # held-out windows of each domain
    every: int = 50  # steps between evaluations
    letters: int = 600_000  # of each domain
    ends: tuple[int, ...] = (32, 64, 96, LENGTH)


GATES: dict[str, Callable[[], Gate]] = {
    "gshard": lambda: noisy_top_k(PER_TOKEN),
    "sigmoid": lambda: sigmoid(PER_TOKEN),
    "x-moe": lambda: cosine(PER_TOKEN, projected=64),
    "expert choice": lambda: expert_choice(PER_TOKEN),
    "softmoe": lambda: soft_moe(PER_TOKEN * LENGTH // EXPERTS),
}
# What a token's weights add up to before training: σ(0) · 2 = 1, but expert choice's 2 · 1/8.
SCALES = {"expert choice": EXPERTS / PER_TOKEN}
CAUSAL = ("dense", "gshard", "sigmoid", "x-moe")


def texts(letters: int) -> dict[str, np.ndarray]:
    """Read the domains as tokens of stories260K."""
    folder = lm.find_model("stories260k").parent.parent / "text"
    encode = load_tokenizer(lm.find_model("stories260k")).encode
    raw = {
        "stories": read_text(folder / "tinystories_sample.txt"),
        "shakespeare": read_text(folder / "tinyshakespeare.txt"),
        "wikitext": read_text(folder / "wikitext2_valid.txt"),
        "python": python_docs(),
    }
    return {name: np.asarray(encode(raw[name][:letters])) for name in DOMAINS}


class Text:
    """Batches to train on, and windows held out: the last tenth of each domain."""

    def __init__(self, tokens: Mapping[str, np.ndarray], size: Size, seed: int):
        cut = {name: round(0.9 * ids.size) for name, ids in tokens.items()}
        self.streams = [
            TokenStream(tokens[name][: cut[name]], size.rows, LENGTH, seed=seed) for name in DOMAINS
        ]
        held = [
            TokenStream(tokens[name][cut[name] :], size.held, LENGTH, seed=0).batch_at(0)
            for name in DOMAINS
        ]
        # Domains in turns: no drop policy that goes by position may favour one.
        self.held = np.stack(held, axis=1).reshape(-1, LENGTH + 1)
        self.domain = np.tile(np.arange(len(DOMAINS)), size.held)

    def batch(self, step: int) -> np.ndarray:
        """Give a step's rows, domains in turns."""
        rows = np.stack([stream.batch_at(step) for stream in self.streams], axis=1)
        return rows.reshape(-1, LENGTH + 1)


def widened(params: Any, key: jax.Array) -> Any:
    """Double the width of the feed-forward parts: two noisy copies of every hidden unit."""
    flat = flatten(params)
    for i, name in enumerate(sorted(flat)):
        if ".mlp." not in name:
            continue
        is_down = "down_proj" in name
        twice = jnp.concatenate([flat[name]] * 2, axis=1 if is_down else 0) / (1 + is_down)
        drawn = jax.random.normal(jax.random.fold_in(key, i), twice.shape)
        flat[name] = twice + NOISE * jnp.std(twice) * drawn
    return unflatten(flat)


class Model:
    """A gate's model, or the dense one, behind the same functions."""

    def __init__(self, name: str):
        self.name = name
        self.base, self.config = lm.load(lm.find_model("stories260k"))
        if name == "dense":
            self.config = replace(self.config, ffn_width=2 * self.config.ffn_width)
            return
        self.spec = MoESpec(GATES[name](), sparse_order(), swiglu(), capacity=Capacity(1.25))
        # What is measured should not depend on what a full batch drops.
        self.roomy = replace(self.spec, capacity=Capacity(2.0))

    def start(self, seed: int) -> Any:
        """Make parameters out of stories260K's."""
        key = jax.random.key(seed)
        if self.name == "dense":
            return widened(self.base, key)
        scale = SCALES.get(self.name, 1.0)
        options = {"noise": NOISE, "gate_scale": 0.1, "scale": scale}
        return upcycle(self.base, self.config, self.spec, EXPERTS, key, **options)

    def loss(self, params: Any, tokens: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        """Give the loss to train on, and the mixtures' loads and drop rates."""
        if self.name == "dense":
            return lm.loss(params, self.config, tokens), (jnp.ones((1, 1)), jnp.zeros(1))
        total, (_, infos) = loss(params, self.config, self.spec, tokens, key=key)
        loads = jnp.stack([info.load for info in infos])
        return total, (loads, jnp.stack([info.dropped for info in infos]))

    def nats(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Give the cross-entropy of every next token, [B, T]."""
        if self.name == "dense":
            logits = lm.apply(params, self.config, tokens[:, :-1]).logits
        else:
            logits = apply(params, self.config, self.roomy, tokens[:, :-1]).logits
        chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    def visits(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Give how much of each token goes to each expert of each mixture, [L, N, E]."""
        found = routes(params, self.config, self.roomy, tokens[:, :-1])
        return jnp.stack([mass(routed) for routed in found])


def mass(routed: Routed) -> jax.Array:
    """Count a gate's choices, or SoftMoE's weights, per token and expert."""
    if isinstance(routed, Mixing):
        return routed.combine.sum(-1).reshape(-1, routed.combine.shape[2])
    n_experts = routed.logits.shape[-1]
    if isinstance(routed, ExpertChoice):
        return jax.nn.one_hot(routed.tokens, routed.logits.shape[0]).sum(1).T
    return jax.nn.one_hot(routed.experts, n_experts).sum(1)


def information(visits: np.ndarray, domain: np.ndarray) -> tuple[float, np.ndarray]:
    """Compute I(domain; expert) in nats, averaged over mixtures, and P(domain, expert) of each."""
    of_token = np.repeat(domain, LENGTH)
    joint = np.stack([visits[:, of_token == d].sum(1) for d in range(len(DOMAINS))], axis=1)
    joint = joint / joint.sum((1, 2), keepdims=True)
    free = joint.sum(1, keepdims=True) * joint.sum(2, keepdims=True)
    terms = np.where(joint > 0, joint * np.log(np.maximum(joint, 1e-30) / free), 0.0)
    return float(terms.sum((1, 2)).mean()), joint


class Programs(NamedTuple):
    """Compiled once for all seeds of a model."""

    model: Model
    init: Callable[..., Any]
    step: Callable[..., Any]
    nats: Callable[..., jax.Array]
    visits: Callable[..., jax.Array]


@lru_cache
def programs(name: str, steps: int) -> Programs:
    """Make the functions of a model."""
    model = Model(name)
    optimizer = adamw(2e-3, warmup_steps=min(20, steps // 2), total_steps=steps, clip_norm=1.0)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, tokens, key):
        grads, seen = jax.grad(model.loss, has_aux=True)(params, tokens, key)
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state, seen

    return Programs(model, optimizer.init, step, jax.jit(model.nats), jax.jit(model.visits))


def train(name: str, seed: int, text: Text, size: Size) -> dict[str, Any]:
    """Train one model and record what became of it."""
    model, init, step, nats, visits = programs(name, size.steps)
    start = time.perf_counter()

    def measure(at: int) -> dict[str, Any]:
        losses = np.asarray(nats(params, text.held)).mean(1)
        by_domain = [float(losses[text.domain == d].mean()) for d in range(len(DOMAINS))]
        row = {"step": at, "nats": float(losses.mean()), "by_domain": by_domain}
        if name != "dense":
            row["information"], joint = information(
                np.asarray(visits(params, text.held)), text.domain
            )
            row["joint"] = joint.round(4).tolist()
        return row

    params = jax.tree.map(jnp.copy, model.start(seed))  # the step donates; the base is kept
    state = init(params)
    curve, balance = [measure(0)], []
    for i in range(size.steps):
        key = jax.random.fold_in(jax.random.key(seed), i)
        params, state, (loads, dropped) = step(params, state, text.batch(i), key)
        loads = np.asarray(loads)
        variation = float((loads.std(1) / loads.mean(1)).mean())
        balance.append([variation, float(dropped.mean())])
        if (i + 1) % size.every == 0 or i + 1 == size.steps:
            curve.append(measure(i + 1))
    for row in curve[:-1]:
        row.pop("joint", None)
    return {
        "gate": name,
        "seed": seed,
        "steps": size.steps,
        "curve": curve,
        "balance": balance,
        "ends": at_ends(nats, params, text.held, size.ends),
        "seconds": round(time.perf_counter() - start, 1),
    }


def at_ends(nats, params, held: np.ndarray, ends: tuple[int, ...]) -> dict[str, float]:
    """Compare the loss of some tokens with and without the tokens behind them."""
    whole = np.asarray(nats(params, held))
    cut = [np.asarray(nats(params, held[:, : end + 1]))[:, -1] for end in ends]
    return {
        "whole": float(np.mean([whole[:, end - 1].mean() for end in ends])),
        "cut": float(np.mean(cut)),
    }


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Average the runs of each gate; ± is half the spread of the seeds."""
    rows = []
    for name in ("dense", *GATES):
        own = [run for run in runs if run["gate"] == name]
        if not own:
            continue
        last = [run["curve"][-1] for run in own]
        dense = {run["seed"]: run["curve"][-1]["nats"] for run in runs if run["gate"] == "dense"}
        less = [
            run["curve"][-1]["nats"] - dense[run["seed"]] for run in own if run["seed"] in dense
        ]
        row = {
            "gate": name,
            "seeds": len(own),
            "held-out nats": _spread([row["nats"] for row in last]),
            "less than dense": _spread([-x for x in less]) if name != "dense" and less else "",
            "at ends, whole": _spread([run["ends"]["whole"] for run in own]),
            "at ends, cut": _spread([run["ends"]["cut"] for run in own]),
        }
        if name != "dense":
            late = [np.mean(np.array(run["balance"])[-50:], axis=0) for run in own]
            row |= {
                "load variation": _spread([x[0] for x in late]),
                "dropped %": _spread([100 * x[1] for x in late]),
                "information, start": _spread([run["curve"][0]["information"] for run in own]),
                "information, end": _spread([row["information"] for row in last]),
            }
        rows.append(row)
    return rows


def _spread(values: list[float]) -> str:
    half = (max(values) - min(values)) / 2
    return f"{np.mean(values):.3f} ± {half:.3f}"


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw loss, load and information over training, and who goes where in the last mixture."""
    fig, axes = figure(2, 4, width=3.6, height=2.9)
    for name in ("dense", *GATES):
        own = [run for run in runs if run["gate"] == name]
        if not own:
            continue
        steps = [row["step"] for row in own[0]["curve"]]
        style = "-" if name in CAUSAL else "--"
        curve = np.mean([[row["nats"] for row in run["curve"]] for run in own], axis=0)
        axes[0, 0].plot(steps[1:], curve[1:], style, label=name)
        if name == "dense":
            for axis in axes[0, 1:3]:
                axis.plot([], [])  # the same colours in every panel
            continue
        load = np.mean([run["balance"] for run in own], axis=0)[:, 0]
        width = max(1, len(load) // 30)
        smooth = np.convolve(load, np.ones(width) / width, "valid")
        axes[0, 1].plot(np.arange(len(smooth)) + width, smooth, style)
        info = np.mean([[row["information"] for row in run["curve"]] for run in own], axis=0)
        axes[0, 2].plot(steps, info, style)
    axes[0, 0].set(title="held-out loss (dashed: not causal)", ylabel="nats per token")
    axes[0, 0].legend(fontsize=7)
    axes[0, 1].set(title="variation of the load", ylabel="std / mean over experts")
    axes[0, 2].set(title="I(domain; expert), at most ln 4", ylabel="nats")
    for axis in axes[0, :3]:
        axis.set_xlabel("step")
    for axis, name in zip([axes[0, 3], *axes[1]], GATES, strict=True):
        own = [run for run in runs if run["gate"] == name]
        axis.grid(visible=False)
        axis.set(title=f"{name}: P(expert | domain)", xlabel="expert", ylabel="")
        if own:
            joint = np.array(own[0]["curve"][-1]["joint"])
            best = int(np.argmax([_bits(layer) for layer in joint]))
            share = joint[best] / joint[best].sum(1, keepdims=True)
            axis.imshow(share, aspect="auto", cmap="Blues", vmin=0, vmax=0.5)
            axis.set_title(f"{name}, block {best}: P(expert | domain)")
        axis.set_yticks(range(len(DOMAINS)), DOMAINS, fontsize=7)
    save_figure(fig, path)


def _bits(joint: np.ndarray) -> float:
    free = joint.sum(0, keepdims=True) * joint.sum(1, keepdims=True)
    return float(np.sum(np.where(joint > 0, joint * np.log(np.maximum(joint, 1e-30) / free), 0)))


def report(runs: list[dict[str, Any]], size: Size, out: Path) -> None:
    """Write the table and the figure."""
    tokens = size.steps * size.rows * len(DOMAINS) * LENGTH
    text = f"""# What experts learn on four domains

stories260K upcycled to {EXPERTS} experts, {PER_TOKEN} per token, in all five blocks; {size.steps}
steps of {size.rows * len(DOMAINS)} windows of {LENGTH} tokens ({tokens:,} tokens); capacity factor
1.25 in training, 2.0 when measured. Dense: feed-forward parts twice as wide, the same products per
token. Means over seeds ± half their range; on {4 * size.held} held-out windows. "Less than dense"
is paired by seed. "At ends": the loss of tokens {", ".join(map(str, size.ends))} in whole windows,
and in windows that end there. Load variation (std / mean) and drops are those of the last 50 steps.
Information is I(domain; expert) in nats, of at most ln 4 = 1.386, averaged over blocks.

{markdown_table(table(runs))}
{machine(devices=True)}
"""
    atomic_write(out / "specialise.md", text)
    draw(runs, out / "specialise.png")
    print(text)


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few steps, one seed")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, default=Size.seeds)
    parser.add_argument("--steps", type=int, default=Size.steps)
    options = parser.parse_args()
    size = Size(seeds=options.seeds, steps=options.steps)
    names = ("dense", *GATES)
    if options.smoke:
        import tempfile

        size = Size(seeds=1, steps=3, rows=1, held=2, every=3, letters=20_000, ends=(LENGTH,))
        options.out = Path(tempfile.mkdtemp())
        names = ("dense", "expert choice")
    log = options.out / "specialise.jsonl"
    runs = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    runs = [run for run in runs if run["steps"] == size.steps]
    done = {(run["gate"], run["seed"]) for run in runs}
    tokens = texts(size.letters)
    for seed in range(size.seeds):
        for name in names:
            if (name, seed) in done:
                continue
            run = train(name, seed, Text(tokens, size, seed), size)
            last = run["curve"][-1]
            print(name, seed, f"{last['nats']:.3f} nats, {run['seconds']} s", flush=True)
            append_jsonl(log, run)
            runs.append(run)
    report(runs, size, options.out)


if __name__ == "__main__":
    main()
