"""What partial local SGD does to the loss: 32 simulated workers on one device, three problems.

    python experiments/localsgd/convergence.py            about 8 minutes on 2 idle cores
    python experiments/localsgd/convergence.py --smoke    half a minute, nothing written

1. Least squares with a ridge, strongly convex and smooth, other data on every worker, step size
   η_r = 4/(μ(a+r)) with a = max(16β/μ, H), iterates of the mean weighted by (a+r)² (the conditions
   of Stich's theorem for local SGD, arXiv 1805.09767; those of DreamDDP, arXiv 2502.11058, could
   not be read in full). The slope of log suboptimality over log R should be -1: the rate O(1/R).
2. A small GPT-2 on the bytes of Python's language reference, AdamW.
3. A small ResNet on 8×8 digits, 45 of them on each worker, SGD with momentum.

Each with 5 seeds (of data order, and of the initial weights in 2 and 3) for S-SGD, full local SGD,
equal-number partial and DreamDDP. DreamDDP is planned for *assumed* times: each layer's backward
pass in proportion to its size, all communication together H times the whole backward pass.
Nothing here is timed.

Expected: slopes within 0.1 of -1 for all strategies; at equal steps DreamDDP's loss is not worse
than that of full local SGD (the interval of the paired difference does not lie above 0; five seeds
make that interval rather too narrow) and its divergence peaks lower; S-SGD, which averages H times
as often, is best at equal steps. Against it: equal-number partial is a little worse than full local
SGD on the GPT-2, and in the first 300 steps of the ridge problem both partial strategies are behind
it. With this much communication, bubble filling finds no room on the ridge problem.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxsys.core.errors import UserError
from jaxsys.core.measure import bootstrap_ci, machine
from jaxsys.core.mesh import REPLICA
from jaxsys.core.report import atomic_write, figure, markdown_table, save_figure
from jaxsys.core.tree import Layer
from jaxsys.data import ByteTokenizer, TokenStream, python_docs, train_valid_split
from jaxsys.data.images import digits, train_valid
from jaxsys.localsgd.exchange import divergence
from jaxsys.localsgd.layers import find_layers, layer_bytes
from jaxsys.localsgd.simulate import mean_params, simulate
from jaxsys.localsgd.step import due, partial_local_sgd
from jaxsys.localsgd.strategy import choose, make_plan
from jaxsys.models import gpt2, resnet
from jaxsys.train import optimizers

RESULTS = Path(__file__).parent / "results"
NAMES = ("ssgd", "local", "equal", "dreamddp")
LEVELS = {"loss": "held-out loss of the mean model", "accuracy": "held-out accuracy"}


class Setting(NamedTuple):
    """How much to run."""

    workers: int = 32
    period: int = 5
    seeds: int = 5
    convex_steps: int = 30_000
    steps: int = 250
    names: tuple[str, ...] = NAMES


class Curves(NamedTuple):
    """What one strategy did, over seeds S."""

    loss: np.ndarray  # [S, steps], mean over workers
    gamma: np.ndarray  # [S, steps], mean over layers
    held_out: dict[str, np.ndarray]  # name -> [S]


def plan_for(strategy: Any, params: Any, layers: tuple[Layer, ...]) -> Any:
    """Plan with assumed times: backward in proportion to size, communication H times that."""
    sizes = np.array(layer_bytes(params, layers), float)
    backward_s = sizes / sizes.sum()
    return make_plan(strategy, backward_s, strategy.period * backward_s, forward_s=0.5)


class Ridge(NamedTuple):
    """f(x) = mean_k 1/(2m) ||A_k x - b_k||² + λ/2 ||x||², with its constants."""

    a: np.ndarray  # [R, m, d]
    b: np.ndarray  # [R, m]
    ridge: float
    hessian: np.ndarray  # [d, d]
    optimum: np.ndarray  # [d]
    mu: float
    beta: float


def make_ridge(workers: int, dim: int = 288, rows: int = 512, seed: int = 0) -> Ridge:
    """Draw a problem whose workers have different optima."""
    rng = np.random.default_rng(seed)
    scale = np.sqrt(np.linspace(0.4, 1.0, dim))
    a = rng.standard_normal((workers, rows, dim)) * scale
    truth = 1.0 + rng.standard_normal((workers, dim))
    b = np.einsum("kmd,kd->km", a, truth) + 0.5 * rng.standard_normal((workers, rows))
    ridge = 0.1
    each = np.einsum("kmd,kme->kde", a, a) / rows + ridge * np.eye(dim)
    hessian = each.mean(0)
    optimum = np.linalg.solve(hessian, np.einsum("kmd,km->d", a, b) / rows / workers)
    mu, beta = float(np.linalg.eigvalsh(hessian)[0]), float(np.linalg.eigvalsh(each).max())
    return Ridge(a, b, ridge, hessian, optimum, mu, beta)


def run_convex(problem: Ridge, name: str, setting: Setting) -> dict[str, np.ndarray]:
    """Run all seeds at once; returns R [T], suboptimality [S, T] and Γ of each step [S, steps]."""
    strategy = choose([name], setting.period)[name]
    dim, workers = len(problem.optimum), setting.workers
    # Eight layers of which the last is eight times as large as the first.
    params = {str(i): jnp.zeros((i + 1) * dim // 36) for i in range(8)}
    layers = tuple(Layer(str(i), (i,)) for i in reversed(range(8)))
    phases = plan_for(strategy, params, layers).phases
    offset = max(16 * problem.beta / problem.mu, setting.period)
    hessian, optimum = (jnp.asarray(x, jnp.float32) for x in (problem.hessian, problem.optimum))

    def join(tree: Any) -> jax.Array:
        return jnp.concatenate([tree[str(i)] for i in range(8)])

    def loss_fn(params: Any, rows: Any) -> jax.Array:
        x = join(params)
        misfit = rows[0] @ x - rows[1]
        return 0.5 * jnp.mean(misfit**2) + 0.5 * problem.ridge * x @ x

    algorithm = partial_local_sgd(
        loss_fn, optax.sgd(lambda r: 4 / (problem.mu * (offset + r))), layers, strategy
    )

    def one_period(data: Any, key: jax.Array, carry: Any, p: jax.Array) -> Any:
        (state, average), gammas = carry, []
        own = jax.random.fold_in(jax.random.fold_in(key, p), jax.lax.axis_index(REPLICA))
        picks = jax.random.randint(own, (len(phases), 4), 0, data[1].shape[0])
        for h in range(len(phases)):
            rows = (data[0][picks[h]], data[1][picks[h]])
            state, _ = algorithm.step(state, rows, due(phases, strategy, h))
            r = (p * len(phases) + h).astype(jnp.float32)
            weight = (offset + r) ** 2
            total = ((offset + r) ** 3 - offset**3) / 3 + (offset**2 + weight) / 2
            mean = jax.lax.pmean(join(state.params), REPLICA)
            average = average + (mean - average) * (weight / total)
            gammas.append(jnp.mean(divergence(state.params, layers)))
        gap = average - optimum
        return (state, average), (0.5 * gap @ hessian @ gap, jnp.stack(gammas))

    def one_replica(data: Any, key: jax.Array) -> Any:
        start = (algorithm.init(params, key), jnp.zeros(dim))
        periods = jnp.arange(setting.convex_steps // len(phases))
        return jax.lax.scan(partial(one_period, data, key), start, periods)[1]

    data = (jnp.asarray(problem.a, jnp.float32), jnp.asarray(problem.b, jnp.float32))
    keys = jax.random.split(jax.random.key(1), setting.seeds)
    replicas = jax.vmap(one_replica, in_axes=(0, None), axis_name=REPLICA, axis_size=workers)
    gap, gamma = jax.jit(jax.vmap(replicas, in_axes=(None, 0)))(data, keys)
    gap, gamma = np.asarray(gap[:, 0]), np.asarray(gamma[:, 0]).reshape(setting.seeds, -1)
    rounds = (np.arange(gap.shape[1]) + 1) * len(phases)
    return {"R": rounds, "gap": gap, "gamma": gamma, "offset": np.float64(offset)}


def slopes(found: dict[str, np.ndarray]) -> np.ndarray:
    """Fit log suboptimality over log R from R = 10 a on, for each seed."""
    rounds, gap = found["R"], found["gap"]
    first = np.searchsorted(rounds, min(10 * found["offset"], rounds[-1] / 4))
    places = np.geomspace(first, len(rounds) - 1, 200).astype(int)
    return np.array([np.polyfit(np.log(rounds[places]), np.log(g[places]), 1)[0] for g in gap])


class Learner(NamedTuple):
    """A model with data: what `simulate` and the evaluation need."""

    loss_fn: Callable[[Any, Any], jax.Array]
    init: Callable[[int], Any]  # seed -> params
    batches: Callable[[int], Callable[[int], Any]]  # seed -> batch_at
    held_out: Callable[[Any], dict[str, float]]  # mean params -> figures
    optimizer: optax.GradientTransformation


def language_model(setting: Setting, config: gpt2.GPT2Config, batch: int) -> Learner:
    """Make the GPT-2 on Python's reference; workers see disjoint windows of each epoch."""
    text = ByteTokenizer().encode(python_docs())
    train, valid = train_valid_split(text)
    length = config.n_positions
    rows = np.stack([valid[i : i + length + 1] for i in range(0, len(valid) - length, length)])
    loss_fn = partial(_lm_loss, config)
    evaluate, init = jax.jit(loss_fn), jax.jit(partial(gpt2.init, config=config))

    def batches(seed: int) -> Callable[[int], Any]:
        stream = TokenStream(train, batch=batch * setting.workers, length=length, seed=seed)
        return lambda step: stream.batch_at(step).reshape(setting.workers, batch, length + 1)

    return Learner(
        loss_fn,
        lambda seed: init(jax.random.key(seed)),
        batches,
        lambda params: {"loss": float(evaluate(params, rows[:512].astype(np.int32)))},
        optimizers.adamw(3e-3),
    )


def _lm_loss(config: gpt2.GPT2Config, params: Any, tokens: Any) -> jax.Array:
    return gpt2.loss(params, config, tokens)


def digit_classifier(setting: Setting, width: int, batch: int) -> Learner:
    """Make the ResNet on digits; each worker draws from its own share of the training images."""
    train, valid = train_valid(digits())
    share = len(train.labels) // setting.workers
    images = train.images[: share * setting.workers].reshape(setting.workers, share, 8, 8, 1)
    labels = train.labels[: share * setting.workers].reshape(setting.workers, share)
    config = resnet.ResNetConfig(width=width)
    graphdef, _ = resnet.split(nnx.eval_shape(lambda: resnet.ResNet(config, rngs=nnx.Rngs(0))))
    # One program instead of one for each operation.
    init = jax.jit(lambda key: resnet.split(resnet.ResNet(config, rngs=nnx.Rngs(key)))[1])
    loss_fn = partial(resnet.loss, graphdef)
    classify = jax.jit(partial(resnet.apply, graphdef))

    def batches(seed: int) -> Callable[[int], Any]:
        def batch_at(step: int) -> Any:
            rng = np.random.default_rng([seed, step])
            picks = rng.integers(share, size=(setting.workers, batch))
            return tuple(
                np.take_along_axis(x, picks.reshape(*picks.shape, *[1] * (x.ndim - 2)), 1)
                for x in (images, labels)
            )

        return batch_at

    def held_out(params: Any) -> dict[str, float]:
        logits = classify(params, valid.images)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, valid.labels).mean()
        hits = np.argmax(logits, -1) == valid.labels
        return {"loss": float(loss), "accuracy": float(hits.mean())}

    return Learner(
        loss_fn,
        lambda seed: init(jax.random.key(seed, impl="rbg")),  # compiles three times as fast
        batches,
        held_out,
        optimizers.sgd(0.05, 0.9),
    )


def run_learner(learner: Learner, name: str, setting: Setting) -> Curves:
    """Train one strategy with every seed."""
    strategy = choose([name], setting.period)[name]
    losses, gammas, figures = [], [], []
    for seed in range(setting.seeds):
        params, batch_at = learner.init(seed), learner.batches(seed)
        layers = find_layers(learner.loss_fn, params, jax.tree.map(lambda x: x[0], batch_at(0)))
        run = simulate(
            learner.loss_fn,
            params,
            learner.optimizer,
            batch_at,
            workers=setting.workers,
            steps=setting.steps,
            strategy=strategy,
            plan=plan_for(strategy, params, layers),
            layers=layers,
            seed=seed,
            divergence_every=1,
        )
        losses.append(run.loss.mean(1))
        gammas.append(run.divergence.mean(1))
        figures.append(learner.held_out(mean_params(run.state)))
    held_out = {key: np.array([f[key] for f in figures]) for key in figures[0]}
    return Curves(np.stack(losses), np.stack(gammas), held_out)


def interval(samples: np.ndarray, digits: int = 4) -> str:
    """Write a mean over seeds with its bootstrap interval."""
    low, high = bootstrap_ci(samples, statistic=np.mean)
    return f"{np.mean(samples):.{digits}g} [{low:.{digits}g}, {high:.{digits}g}]"


def peaks(gamma: np.ndarray, period: int) -> np.ndarray:
    """Average the largest divergence of each period over the second half of a run, [S]."""
    whole = gamma[:, gamma.shape[1] // 2 :]
    whole = whole[:, : whole.shape[1] // period * period]
    return whole.reshape(len(whole), -1, period).max(2).mean(1)


def learner_tables(found: dict[str, Curves], setting: Setting) -> str:
    """Write the table of one model, and the paired differences to full local SGD."""
    rows, pairs = [], []
    for name, c in found.items():
        half = c.gamma[:, c.gamma.shape[1] // 2 :]
        rows.append(
            {"strategy": name}
            | {LEVELS[key]: interval(values) for key, values in c.held_out.items()}
            | {
                "training loss, last 20 steps": interval(c.loss[:, -20:].mean(1)),
                "Γ, mean": interval(half.mean(1), 3),
                "Γ, mean of the peaks": interval(peaks(c.gamma, setting.period), 3),
            }
        )
    for name in (n for n in found if n not in ("local", "ssgd")):
        gap = found[name].held_out["loss"] - found["local"].held_out["loss"]
        low, high = bootstrap_ci(gap, statistic=np.mean)
        pairs.append(
            {
                "paired over seeds": f"{name} minus local, held-out loss",
                "difference": interval(gap, 3),
                "relative to local": f"{gap.mean() / found['local'].held_out['loss'].mean():+.2%}",
                "verdict": "worse" if low > 0 else "better" if high < 0 else "no difference found",
            }
        )
    return markdown_table(rows) + "\n" + markdown_table(pairs)


def draw(convex: dict[str, Any], learned: dict[str, dict[str, Curves]], setting: Setting) -> Any:
    """Draw losses above and divergence below, one column for each problem."""
    fig, axes = figure(2, 1 + len(learned), width=4.4)
    for name, one in convex.items():
        places = np.unique(np.geomspace(1, len(one["R"]) - 1, 150).astype(int))
        axes[0, 0].loglog(one["R"][places], one["gap"].mean(0)[places], label=name, linewidth=1)
        window = one["gamma"][:, 20 * setting.period : 24 * setting.period].mean(0)
        axes[1, 0].plot(20 * setting.period + np.arange(len(window)) + 1, window, linewidth=1)
    one = convex["local"]
    rounds = one["R"][len(one["R"]) // 20 :]
    level = 0.3 * one["gap"].mean(0)[-1] * rounds[-1]
    axes[0, 0].loglog(rounds, level / rounds, "k:", linewidth=1, label="slope -1")
    axes[0, 0].set(title="ridge regression", xlabel="steps R", ylabel="f(weighted mean) - f*")
    for column, (title, found) in enumerate(learned.items(), start=1):
        for name, c in found.items():
            smooth = np.stack([np.convolve(x, np.ones(5) / 5, "valid") for x in c.loss])
            steps = np.arange(smooth.shape[1]) + 5
            axes[0, column].plot(steps, smooth.mean(0), label=name, linewidth=1)
            axes[0, column].fill_between(steps, smooth.min(0), smooth.max(0), alpha=0.15)
            first = c.gamma.shape[1] // 2 // setting.period * setting.period
            window = c.gamma[:, first : first + 4 * setting.period].mean(0)
            axes[1, column].plot(first + np.arange(len(window)) + 1, window, linewidth=1)
        axes[0, column].set(title=title, xlabel="step", ylabel="training loss (5-step mean)")
    for axis in axes[1]:
        axis.set(title="divergence over four periods", xlabel="step", ylabel="Γ, mean over layers")
    axes[0, 0].legend(fontsize=7)
    return fig


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true")
    smoke = parser.parse_args().smoke
    setting = Setting(4, 1, 2, 400, 4, ("local", "dreamddp")) if smoke else Setting()
    config = gpt2.tiny() if not smoke else gpt2.GPT2Config(256, 8, 16, n_layer=1, n_head=1)
    began = time.perf_counter()
    try:
        learners = {
            f"GPT-2 of {config.n_layer} layers, width {config.n_embd}": language_model(
                setting, config, 2
            ),
            "ResNet on 8×8 digits": digit_classifier(setting, 8, 8),
        }
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    problem = make_ridge(setting.workers)
    convex = {}
    for name in (*setting.names, *(() if smoke else ("dreamddp-nofill",))):
        convex[name] = run_convex(problem, name, setting)
        print(f"ridge {name}: slope {slopes(convex[name]).mean():.3f}", flush=True)
    learned: dict[str, dict[str, Curves]] = {}
    for title, learner in learners.items():
        learned[title] = {}
        for name in setting.names:
            learned[title][name] = c = run_learner(learner, name, setting)
            spent = time.perf_counter() - began
            print(
                f"{title} {name}: loss {c.held_out['loss'].mean():.4f} ({spent:.0f} s)", flush=True
            )
    rows = [
        {
            "strategy": name,
            "slope of log suboptimality over log R": interval(slopes(one)),
            f"suboptimality after {setting.convex_steps} steps": interval(one["gap"][:, -1], 3),
            "Γ, mean of the peaks": interval(peaks(one["gamma"], setting.period), 3),
        }
        for name, one in convex.items()
    ]
    text = (
        f"{setting.workers} workers under vmap on one device, period {setting.period}, seeds 0 to "
        f"{setting.seeds - 1}; {machine()}. Means over seeds with 95 % bootstrap intervals over "
        f"seeds; Γ over the second half of each run. DreamDDP is planned for assumed times "
        f"(backward in proportion to size, communication {setting.period} times the backward).\n\n"
        f"## Ridge regression, η = 4/(μ(a+r))\n\nμ = {problem.mu:.3f}, β = {problem.beta:.2f}, "
        f"a = {float(convex['local']['offset']):.0f}; slope from R = 10 a to "
        f"{setting.convex_steps}.\n\n" + markdown_table(rows)
    )
    for title, found in learned.items():
        text += f"\n## {title}, {setting.steps} steps\n\n{learner_tables(found, setting)}"
    print(text)
    if not smoke:
        RESULTS.mkdir(exist_ok=True)
        atomic_write(RESULTS / "convergence.md", text)
        save_figure(draw(convex, learned, setting), RESULTS / "convergence.png")
    else:
        draw(convex, learned, setting)
    return 0


if __name__ == "__main__":
    sys.exit(main())
