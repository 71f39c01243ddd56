# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own model under partial local SGD
#
# Eight workers train one model. Each takes its own steps on its own data, and now and then they
# average their parameters. This notebook wraps a `flax.nnx` model that jaxsys has never seen,
# simulates the eight workers on one device and on eight, plans what to send when, and compares five
# strategies. It takes about a minute on two cores and downloads nothing.
#
# To run it: `jupyter notebook experiments/localsgd/notebook.ipynb`, or as a plain script
# `python experiments/localsgd/notebook.py`. The text of the `.ipynb` comes from the `.py`
# (`jupytext --to ipynb --execute experiments/localsgd/notebook.py`).

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

from jaxsys.core.cost import LinearCost
from jaxsys.core.mesh import DevicePair, replica_mesh
from jaxsys.core.report import format_seconds, markdown_table
from jaxsys.data import python_docs
from jaxsys.localsgd.host import cut_loss, overlapped_local_sgd
from jaxsys.localsgd.layers import find_layers, layer_bytes
from jaxsys.localsgd.plan import plan_sync
from jaxsys.localsgd.profile import make_profile
from jaxsys.localsgd.profiling import measure_compute
from jaxsys.localsgd.simulate import mean_params, simulate
from jaxsys.localsgd.strategy import choose
from jaxsys.localsgd.wire import Wire

# Eight virtual devices on the CPU, for the `pmap` part below; before JAX is first used.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

WORKERS, STEPS, PERIOD = 8, 120, 5

# %% [markdown]
# ## 1. The model: any function of parameters and a batch
#
# A network that reads sixteen bytes and guesses the next. All that jaxsys asks for is
# `loss_fn(params, batch) -> scalar`. A `flax.nnx` module is split **once** into a static
# description and a tree of arrays; after that everything is a pure function of the tree.


# %%
class NextByte(nnx.Module):
    def __init__(self, context: int, width: int, depth: int, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(256, 32, rngs=rngs)
        self.inner = nnx.Linear(32 * context, width, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(depth)])
        self.head = nnx.Linear(width, 256, rngs=rngs)

    def __call__(self, tokens):
        x = self.inner(self.embed(tokens).reshape(tokens.shape[0], -1))
        for block in self.blocks:
            x = x + block(nnx.relu(x))
        return self.head(nnx.relu(x))


CONTEXT = 16
model = NextByte(CONTEXT, width=128, depth=3, rngs=nnx.Rngs(0))
graphdef, parameters = nnx.split(model, nnx.Param)
params = nnx.as_pure(parameters)  # a nested dictionary of arrays


def loss_fn(params, batch):
    logits = nnx.merge(graphdef, params)(batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, -1]).mean()


print(f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters")

# %% [markdown]
# ## 2. The data: one batch for each worker
#
# The text is the language reference that comes with Python. Worker $r$ reads only the $r$-th eighth
# of it, so the workers see different data and drift apart. `batch_at(step)` returns arrays whose
# first axis counts the workers, and is a function of the step alone: a run can be continued from
# any step.

# %%
text = np.frombuffer(python_docs().encode(), np.uint8).astype(np.int32)
held_out, text = text[-20_000:], text[:-20_000]
shards = np.array_split(text, WORKERS)


def windows(tokens, starts):
    return tokens[starts[:, None] + np.arange(CONTEXT + 1)[None]]


def batch_at(step):
    rng = np.random.default_rng(step)
    return np.stack([windows(s, rng.integers(len(s) - CONTEXT - 1, size=32)) for s in shards])


valid = jnp.asarray(windows(held_out, np.arange(0, 19_000, 10)))
evaluate = jax.jit(loss_fn)
print("one batch for all workers:", batch_at(0).shape)

# %% [markdown]
# ## 3. The layers
#
# What is sent as one message is a *layer*: here the arrays of one module. They are found by tracing
# the loss and come in backward order, because the gradient of the last module is known first.

# %%
layers = find_layers(loss_fn, params, batch_at(0)[0])
for layer, size in zip(layers, layer_bytes(params, layers), strict=True):
    print(f"{layer.name:10} {size / 1e3:8.1f} kB")

# %% [markdown]
# ## 4. Eight workers on one device
#
# `simulate` runs the same step that real processes run, written against an axis name and mapped
# over eight copies by `jax.vmap`. First with the default plan, as if all layers cost the same.

# %%
optimizer = optax.adam(2e-3, eps=1e-5)
strategies = choose(["ssgd", "local", "equal", "dreamddp", "diloco"], PERIOD)


def run(name, plan=None, driver="vmap", steps=STEPS):
    return simulate(
        loss_fn,
        params,
        optimizer,
        batch_at,
        workers=WORKERS,
        steps=steps,
        strategy=strategies[name],
        plan=plan,
        layers=layers,
        driver=driver,
        divergence_every=1,
    )


first = run("dreamddp")
print("loss of the workers, first step:", first.loss[0].mean().round(3))
print("loss of the workers, last step: ", first.loss[-1].mean().round(3))
print("loss of their mean, held out:   ", f"{evaluate(mean_params(first.state), valid):.3f}")

# %% [markdown]
# ## 5. The same on eight devices
#
# With `driver="pmap"` each worker has a device of its own (with `"shard_map"` these may be spread
# over many hosts) and the mean over workers is a real collective. The results are the same up to
# the order of floating-point sums.

# %%
for name in ("local", "dreamddp"):
    one, eight = run(name, steps=12), run(name, steps=12, driver="pmap")
    pairs = zip(jax.tree.leaves(one.state.params), jax.tree.leaves(eight.state.params), strict=True)
    difference = max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)
    np.testing.assert_allclose(one.loss, eight.loss, rtol=1e-4)
    print(f"{name:10} largest difference of any parameter after 12 steps: {difference:.1e}")

# %% [markdown]
# ## 6. A plan from times
#
# What should be sent in which step depends on how long each layer computes and how long its message
# takes. The compute is measured here, layer by layer. The link is assumed, and chosen so that one
# message of everything takes as long as a whole period of compute: the rate at which planning
# matters most. (`jaxsys localsgd compare` measures both, between real processes.)

# %%
device = jax.devices()[0]
wire = Wire(DevicePair(device, device, replica_mesh([device])))
batch = batch_at(0)[0]
staged = cut_loss(loss_fn, params, batch, layers)
one = overlapped_local_sgd(loss_fn, optimizer, layers, strategies["dreamddp"], staged, wire)
compute = measure_compute(one, staged, params, batch, wire)
wire.close()
forward_s, backward_s, tail_s = compute[:3]
step_s = forward_s.sum() + backward_s.sum() + tail_s
all_bytes = 2 * (WORKERS - 1) / WORKERS * sum(layer_bytes(params, layers))


def at_rate(bytes_per_s):
    link = LinearCost(alpha_s=0.0, beta_s_per_unit=1 / bytes_per_s, r2=1.0, residual=0.0, n=2)
    return make_profile(layers, params, compute, link, WORKERS)


matched = all_bytes / (PERIOD * step_s)
profile = at_rate(matched)
plans = {name: profile.plan(strategy) for name, strategy in strategies.items()}
print(f"one step computes for {format_seconds(step_s)}; link of {8 * matched / 1e6:.0f} Mbit/s")
for h, phase in enumerate(plans["dreamddp"].phases):
    print(f"step {h} of each period sends:", ", ".join(layers[i].name for i in phase) or "nothing")

# %% [markdown]
# The planner is an ordinary function; with times from anywhere else it needs no model at all.

# %%
print(plan_sync([1] * 6, [2, 1, 1, 3, 1, 1], 3).phases)

# %% [markdown]
# ## 7. The strategies side by side
#
# Loss at equal steps comes from the simulation, step time from the plan: it is a prediction, for
# the assumed link. Γ is the root mean square distance of a worker from the mean of all.

# %%
runs = {name: run(name, plans[name]) for name in strategies}
rows = [
    {
        "strategy": name,
        "held-out loss": float(evaluate(mean_params(runs[name].state), valid)),
        "largest Γ": float(runs[name].divergence.mean(axis=1).max()),
        "step, predicted": format_seconds(plans[name].predicted_s),
        "communication hidden": f"{plans[name].hidden_share:.0%}",
        "speed-up over ssgd": plans["ssgd"].predicted_s / plans[name].predicted_s,
    }
    for name in strategies
]
print(markdown_table(rows))

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
for name, one in runs.items():
    mean = np.convolve(one.loss.mean(axis=1), np.ones(5) / 5, mode="valid")
    left.plot(np.arange(len(mean)) + 5, mean, label=name)
    middle.plot(np.arange(20, 50), one.divergence.mean(axis=1)[20:50], label=name)
left.set(xlabel="step", ylabel="loss of the workers (5-step mean)", title="loss at equal steps")
middle.set(xlabel="step", ylabel="Γ, mean over layers", title="how far the workers drift apart")
rates = np.geomspace(matched / 100, matched * 100, 25)
for name, strategy in strategies.items():
    seconds = [at_rate(rate).plan(strategy).predicted_s for rate in rates]
    right.loglog(rates * 8 / 1e6, np.array(seconds) / step_s, label=name)
right.axvline(matched * 8 / 1e6, color="grey", linewidth=0.8)
right.set(
    xlabel="link, Mbit/s", ylabel="step time / compute time", title="predicted, by rate of the link"
)
right.legend()
plt.show()

# %% [markdown]
# What to see: `local` lets the workers drift for a whole period and then pulls all layers together
# at once (the saw-tooth), while the partial strategies keep pulling some layer back, and their
# communication hides behind the compute. Where the link is fast nothing needs hiding; where it is
# hopelessly slow nothing can be hidden; in between the plan pays.
#
# To run this between real processes over shaped links, with measured times:
# `jaxsys localsgd compare`.
