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
# # From a loss to a plan over unequal devices, and a run of it
#
# `jaxsys.pipeline` (FusionLLM, arXiv 2410.12707) takes any JAX loss, cuts its operation graph over
# devices of different speed and links of different rate, and trains it in pieces that exchange
# compressed activations and gradients. Here all of it on one process, in a few seconds.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

from jaxsys.core.graph import dag
from jaxsys.core.stages import cut_at
from jaxsys.core.timeline import gantt
from jaxsys.pipeline.choice import Choice, compare, plan_rows
from jaxsys.pipeline.devices import Device, Fleet
from jaxsys.pipeline.estimate import costs_of
from jaxsys.pipeline.job import Task, set_up
from jaxsys.pipeline.local import local_run
from jaxsys.pipeline.timing import predict
from jaxsys.pipeline.work import work_of
from jaxsys.train import optimizers

# %% [markdown]
# ## The graph
#
# A small GPT-2. Nothing is computed: the loss is traced on shapes. A node is a layer, with its
# FLOPs, what later nodes read of it, and what its backward pass keeps.

# %%
task = Task(blocks=4, width=32, heads=2, length=16, batch=8)
setup = set_up(task)
graph = dag(setup.loss_fn, setup.shapes(), *setup.micro_batch(4))
for node in graph.nodes[:5]:
    print(
        f"{node.name:16} {node.flops / 1e6:7.3f} MFLOP {node.output_bytes:7} bytes to later nodes"
    )
print(len(graph.nodes), "nodes")

# %% [markdown]
# ## A fleet
#
# Four devices, listed in the order in which they joined: two in each of two sites, 1 Gbit/s inside
# and 20 Mbit/s between, the second of each half as fast. Speeds and rates are made up here;
# `jaxsys pipeline train` measures them.

# %%
site = np.array([0, 1, 0, 1])
rate = np.where(site[:, None] == site[None], 1e9, 2e7) / 8
speeds = (1e9, 1e9, 5e8, 5e8)
devices = tuple(Device(f"site {site[i]}, device {i}", speeds[i], 1e9) for i in range(4))
fleet = Fleet(devices, np.full((4, 4), 1e-4), rate, tuple(site))

# %% [markdown]
# ## Plans
#
# Equal-number and equal-compute take the devices as they come; OP-Fence finds the sites and crosses
# between them once; exact is the best partition for that order, search also looks for other orders
# and may leave devices out.

# %%
work = work_of(graph)
rows = compare(work, fleet, Choice(micro_batches=4, ratio=16.0))
for row in rows:
    milliseconds = f"{row['predicted_s'] * 1e3:7.2f} ms"
    print(f"{row['method']:14} {row['codec']:8} {milliseconds}  x{row['speedup']:.2f}")

# %%
plan = next(r["plan"] for r in rows if (r["method"], r["codec"]) == ("exact", "adatopk"))
for row in plan_rows(plan, fleet, work):
    print(row)

# %%
fig, axes = plt.subplots(2, 1, figsize=(9, 6), layout="constrained")
for axis, each in zip(axes, (rows[0]["plan"], plan), strict=True):
    timeline = predict(each, costs_of(work, fleet, each), fleet)
    gantt(axis, timeline, labels=False)
    axis.set_title(f"{each.method}, {each.codec}: {timeline.makespan_s * 1e3:.1f} ms, modelled")
plt.show()

# %% [markdown]
# ## The run
#
# `local_run` holds all workers in this process: the programs, messages and numbers are those of
# four processes. Without compression the losses are those of the whole model.


# %%
def losses_of(plan, steps=6):
    staged = cut_at(setup.loss_fn, setup.shapes(), setup.micro_batch(4), plan.boundaries)
    run = local_run(staged, plan, optimizers.adamw(lr=1e-3), setup.shapes())
    states, found = run.init(setup.init(jax.random.key(0))), []
    for step in range(steps):
        states, infos = run.step(states, setup.data(step))
        found.append(infos[0].loss)
    return found, sum(sum(info.sent_bytes.values()) for info in infos)


dense = next(r["plan"] for r in rows if (r["method"], r["codec"]) == ("exact", "dense"))
for each in (dense, plan):
    found, sent = losses_of(each)
    print(each.codec, [round(loss, 4) for loss in found], sent, "bytes a step")

# %% [markdown]
# Over processes, with measured speeds, checkpoints and a standby for lost devices:
#
#     jaxsys pipeline train --devices 4 --standby 1 --codec adatopk --ratio 16
