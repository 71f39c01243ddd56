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
# # A mixture of experts, from one layer to a planned training step
#
# A mixture-of-experts layer sends every token to a few of many experts. On several machines the
# tokens travel there and back through all-to-alls, and most of the time goes into waiting for them.
# FSMoE (arXiv 2501.10714) cuts the work into chunks so that the links and the experts run side by
# side, and computes from fitted costs how many. This notebook builds a layer from parts, cuts it,
# checks that nothing changes, and plans a step. It takes about a minute and downloads nothing.
#
# To run it: `jupyter notebook experiments/moe/notebook.ipynb`, or as a plain script
# `python experiments/moe/notebook.py`. The text of the `.ipynb` comes from the `.py`.

# %%
from dataclasses import replace

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxsys.core.report import markdown_table
from jaxsys.core.timeline import gantt, simulate
from jaxsys.moe import Axes, Capacity, Dims, LayerPlan, MoESpec
from jaxsys.moe.cases import chunk_times
from jaxsys.moe.compare import compare_systems, comparison_rows, uniform
from jaxsys.moe.costs import TESTBED_B
from jaxsys.moe.degrees import tabulate
from jaxsys.moe.dispatch import TRANSPORTS
from jaxsys.moe.experts import swiglu
from jaxsys.moe.figures import step_timeline
from jaxsys.moe.gates import cosine, noisy_top_k, sigmoid
from jaxsys.moe.layer import apply, init
from jaxsys.moe.online import current, drifted, observe, start
from jaxsys.moe.order import sparse_order
from jaxsys.moe.planner import rivals
from jaxsys.moe.profile import expert_mesh
from jaxsys.moe.recurrence import chunk_tasks
from jaxsys.moe.sharding import layer_specs
from jaxsys.moe.volumes import Shape, volumes

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)  # before JAX is first used

# %% [markdown]
# ## 1. A layer from parts
#
# A `MoESpec` names the parts: who goes where (gate), how tokens are laid out (order), what the
# experts are, how many slots each has, how slots travel. All are pure functions, so any can be your
# own. `apply` also tells how evenly the experts are used and how many choices found no slot.

# %%
dims = Dims(width=32, hidden=64, experts=8)
x = jax.random.normal(jax.random.key(1), (8, 16, dims.width))
flat = TRANSPORTS["flat"]


def spec_of(gate):
    return MoESpec(
        gate, sparse_order(), swiglu(), flat.dispatch, flat.combine, capacity=Capacity(1.25)
    )


rows = []
for name, gate in {
    "GShard (noisy top-2)": noisy_top_k(2),
    "sigmoid": sigmoid(2),
    "X-MoE": cosine(2),
}.items():
    params = init(jax.random.key(0), spec_of(gate), dims)
    _, info = apply(params, x, spec_of(gate), key=jax.random.key(2))
    rows.append(
        {
            "gate": name,
            "busiest expert's share": float(info.load.max()),
            "dropped choices": float(info.dropped),
            "balance loss": float(info.losses["balance"]),
        }
    )
print(markdown_table(rows))

# %% [markdown]
# ## 2. The same layer on eight devices, in chunks
#
# Experts spread over four ranks, each split over two (`expert` and `tensor`). The plan says into
# how many chunks the slots are cut, forward and backward separately. Output and gradients stay the
# same.

# %%
spec = replace(spec_of(noisy_top_k(2)), capacity=Capacity(policy="dropless"))
params = init(jax.random.key(0), spec, dims)
mesh = expert_mesh(jax.devices(), expert=4, tensor=2)
axes = Axes(expert="expert", tensor="tensor")
specs = layer_specs(params, spec, axes)
tokens = P(("expert", "tensor"))


def loss_on_mesh(plan):
    def local(params, x):
        y, _ = apply(params, x, spec, plan, axes=axes)
        return jax.lax.psum(jnp.sum(y**2), axes.tokens)

    return jax.shard_map(local, mesh=mesh, in_specs=(specs, tokens), out_specs=P())


def loss_here(params, x):
    return jnp.sum(apply(params, x, spec)[0] ** 2)


expected = jax.jit(jax.grad(loss_here))(params, x)
for plan in (LayerPlan(1, 1), LayerPlan(4, 2)):
    found = jax.jit(jax.grad(loss_on_mesh(plan)))(params, x)
    error = max(
        jax.tree.leaves(
            jax.tree.map(lambda a, b: float(abs(a - b).max() / abs(b).max()), found, expected)
        )
    )
    print(f"degrees {plan.forward}/{plan.backward}: gradients differ by {error:.1e}")

# %% [markdown]
# ## 3. How many chunks?
#
# Cutting hides communication, but every message costs its latency again. Each operation's time is
# a line, `t = α + β·n`; here those published for eight nodes of four RTX 2080 Ti (`jaxsys moe
# profile` measures yours). From these follows what every degree takes: alone on one link (Tutel),
# and with the links between and inside nodes side by side (FSMoE). Everything from here on is
# modelled.

# %%
shape = Shape(4, 1024, width=1600, hidden=6400, expert_ranks=4, dense_ranks=4)
degrees = (1, 2, 4, 8, 16)
times = {
    order: tabulate(TESTBED_B, volumes(shape), degrees, order=order).least_s * 1e3
    for order in ("one_link", "in_order", "relaxed")
}
fig, axis = plt.subplots(figsize=(5, 3))
for order, ms in times.items():
    axis.plot(degrees, ms, marker="o", label=order)
axis.set(xscale="log", xlabel="degree", ylabel="forward pass of a layer, ms (modelled)")
axis.legend()
plt.show()

# %% [markdown]
# Why: the three streams of one layer with four chunks. Dispatches (D) and combines share one link,
# gathers and scatters another; experts run as soon as a chunk has arrived.

# %%
fig, axis = plt.subplots(figsize=(9, 2))
gantt(axis, simulate(chunk_tasks(chunk_times(TESTBED_B, volumes(shape), 4), 4)), labels=False)
plt.show()

# %% [markdown]
# ## 4. Plan a training step
#
# The dense parts' gradients have to be reduced too, over the same link. The planner puts them into
# the gaps that the backward pass leaves, inside the MoE layers and behind the dense parts, and
# picks the degrees that make gaps where they pay. The result is a value (hashable, JSON) with its
# prediction; the other systems' schedules are there to compare with.

# %%
layers = uniform(TESTBED_B, shape, 4)
plans = compare_systems(
    TESTBED_B, layers, systems=("tutel", "tutel-improved", "fsmoe-exact", "jaxsys")
)
print(markdown_table(comparison_rows(plans)))
fig, panels = plt.subplots(2, 1, figsize=(10, 3.6), sharex=True, layout="constrained")
for axis, name in zip(panels, ("tutel", "jaxsys"), strict=True):
    gantt(axis, step_timeline(TESTBED_B, layers, plans[name], system=name), labels=False)
    axis.set_title(f"{name}: {plans[name].predicted_s * 1e3:.0f} ms (modelled)")
plt.show()

# %% [markdown]
# ## 5. Let measurements decide
#
# A model is a model. `rivals` lists the best predicted plans; run your training step under
# `current(state)`, hand its seconds to `observe`, and the measured winner stays. When the machine
# changes, `drifted` says so, and it is time to profile and plan again. Here a made-up machine on
# which the second plan happens to be faster, and which slows down later.

# %%
candidates = rivals(
    TESTBED_B,
    [volumes(shape)] * 4,
    [1e6] * 4,
    degrees=(1, 2),
    dense_backward_s=1e-3,
)
truth_s = dict(zip(candidates, (1.00, 0.93, 1.10), strict=True))
noise = np.random.default_rng(0)
state = start(candidates, trials=5, window=10)
for step in range(60):
    slow = 1.4 if step >= 40 else 1.0
    state = observe(state, truth_s[current(state)] * slow * noise.lognormal(0.0, 0.02))
    if drifted(state):
        print(f"step {step}: the machine has changed; profile and plan again")
        break
print("kept the plan of predicted rank", 1 + candidates.index(current(state)))

# %% [markdown]
# `jaxsys moe plan --help` and `jaxsys moe profile --help` do the same from the shell; `jaxsys moe
# train --plan plan.json` trains a language model with a plan. What was measured, and what was only
# modelled: [README.md](README.md).
