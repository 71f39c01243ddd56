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
# # Ranking networks without training them
#
# How good will a network be, before any training? This notebook scores cells of the NAS-Bench-201
# space with zero-cost proxies, looks at them layer by layer, teaches a small predictor to rank, and
# searches with it. The accuracies come from a table of our own: small cells trained to the end on
# the handwritten 8×8 digits, which the package carries (`own_benchmark.py` made it). It takes about
# two minutes on two cores and downloads nothing.
#
# To run it: `jupyter notebook experiments/nas/notebook.ipynb`, or as a plain script
# `python experiments/nas/notebook.py`. The text of the `.ipynb` comes from the `.py`
# (`jupytext --to ipynb --execute experiments/nas/notebook.py`).

# %%
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxsys.core.report import markdown_table
from jaxsys.nas import predictor, search, space, tables
from jaxsys.nas.batches import image_batch
from jaxsys.nas.features import predictor_inputs
from jaxsys.nas.fit import FitConfig
from jaxsys.nas.model import any_model
from jaxsys.nas.predictor import PredictorConfig
from jaxsys.nas.rank import kendall_tau, with_interval
from jaxsys.nas.run import draw_rows, fit_and_test
from jaxsys.nas.score import ScoreConfig, score, score_all
from jaxsys.nas.small import SmallConfig, small_model

jax.config.update("jax_platforms", "cpu")

# %% [markdown]
# ## 1. A cell, written three ways
#
# Six edges between four nodes, five operations: 15,625 cells. A cell is six numbers; it has an
# index, and the benchmark's arch string.

# %%
cell = space.from_string(
    "|nor_conv_3x3~0|+|skip_connect~0|nor_conv_1x1~1|+|none~0|avg_pool_3x3~1|skip_connect~2|"
)
print(
    cell, space.to_index(cell), f"{space.params_m(cell)} M parameters, {space.mflops(cell)} MFLOPs"
)
print("edges that carry something:", space.reaches(cell))

# %% [markdown]
# ## 2. Any network has proxies
#
# All that a proxy of weights and gradients needs is a function that draws parameters and one that
# gives logits. Here a two-layer network that jaxsys has never seen:


# %%
def draw(key):
    k1, k2 = jax.random.split(key)
    return {
        "hidden": jax.random.normal(k1, (64, 32)) / 8,
        "out": jax.random.normal(k2, (32, 10)) / 6,
    }


own = any_model(draw, lambda p, x: jax.nn.relu(x.reshape(x.shape[0], -1) @ p["hidden"]) @ p["out"])
images, labels = image_batch("digits", 16)
key = jax.random.key(0)
names = ["params", "snip", "grad_norm", "synflow", "jacob_cov"]
for name, s in score(own, own.init(key), jnp.asarray(images), labels, key, names).items():
    by_layer = "no parts" if s.nodes is None else np.round(s.nodes, 3).tolist()
    print(f"{name:<10} {float(s.total):8.3f}   by layer: {by_layer}")

# %% [markdown]
# ## 3. Thousands of cells, trained to the end
#
# Two seeds each, on 256 digits; few images, few channels and a mean over the image before the
# classifier make the cell matter. Can the ranking be repeated? One seed against the other:

# %%
table = tables.load("digits")
test, (first, second) = table.column("test"), table.column("test_seeds").T
print(f"{len(test)} cells, test accuracy {test.min():.1f} to {test.max():.1f} %")
print(f"Kendall's τ between the seeds {kendall_tau(first, second):.3f}")
plt.figure(figsize=(4, 4))
plt.plot(first, second, ".", markersize=2, alpha=0.4)
plt.xlabel("test accuracy of seed 0, %")
plt.ylabel("of seed 1, %")
plt.show()

# %% [markdown]
# ## 4. Many cells, one program
#
# In the cell space the architecture is data: one compiled program scores every cell. Here 200 cells
# in the network of the table, untrained. The table holds the same proxies for all its cells, on
# other images.

# %%
sample = table.select(np.random.default_rng(0).permutation(len(test))[:200])
make = partial(small_model, config=SmallConfig())
config = ScoreConfig(("synflow", "snip", "grad_norm"))
scores = score_all(make, sample.cells, images, labels, config)
rows = []
for name, values in scores.totals.items():
    tau, (low, high) = with_interval(kendall_tau, values[:, 0], sample.column("test"))
    every = kendall_tau(table.column(name), test)
    rows.append({"proxy": name, "τ, 200 cells": f"{tau:.3f} [{low:.3f}, {high:.3f}]", "all": every})
print(markdown_table(rows))

# %% [markdown]
# ## 5. Layer by layer
#
# A total is a sum over layers with equal weights. The parts say more. One line of the picture is a
# cell, from the worst at the top to the best; a column is a place that can hold a layer.

# %%
figure, axis = plt.subplots(figsize=(5, 3))
nodes = table.column("synflow_nodes")[np.argsort(test)]
axis.imshow(nodes, aspect="auto", interpolation="nearest")
axis.set_xticks(
    range(8), ["stem", *[f"{a}→{b}" for a, b in space.EDGES], "classifier"], rotation=45
)
axis.set(ylabel="cell, worst to best", title="log synflow")
plt.show()

# %% [markdown]
# ## 6. A predictor that learns to rank
#
# ParZC's mixer with Bayesian layers and a graph encoder beside it (`parzc`), and two baselines: a
# graph network on the operations alone, and boosted trees. They see the parts of synflow and snip,
# and the operations. Three training sets of 100 cells each, all three in one program; the
# validation accuracy is learned, the test accuracy of all other cells is ranked.

# %%
inputs = predictor_inputs(
    table.cells, {name: table.column(f"{name}_nodes") for name in ("synflow", "snip")}
)
sizes = PredictorConfig(
    sequence=64, width=16, depth=1, heads=2, head_width=8, graph_width=16, inner=32
)
training = FitConfig(("mse", "pair"), epochs=40, batch=20, lr=5e-3)
valid, drawn = table.column("valid"), draw_rows(len(test), 100, 3)
rows = []
for name in ("parzc", "gcn", "trees"):
    found = fit_and_test(name, inputs, valid, test, drawn, training, sizes=sizes)
    rows.append({"predictor": name, "τ on all others, by seed": str(found.tau.round(3).tolist())})
print(markdown_table(rows))

# %% [markdown]
# ## 7. Searching
#
# Every search asks for 80 of the cells; five seeds. The guided one trains a predictor on what it
# knows before it asks for the next twenty. A search sees the validation accuracy; what counts is
# the test accuracy of the cell that it would keep.

# %%
seen, final = search.from_table(table, "valid"), search.from_table(table, "test")
model, seeds = predictor.make("gcn", 0, sizes), range(5)
guided = search.guided_search(
    seen, table.cells, model, inputs, training, queries=80, start=40, step=20, seeds=seeds
)
blind = [search.random_search(seen, 80, pool=table.cells, seed=s) for s in seeds]
for name, traces in (("random", blind), ("guided", guided)):
    curve = np.mean([search.kept_so_far(t, final) for t in traces], 0)
    plt.plot(np.arange(1, 81), curve, label=name)
    print(f"{name}: {curve[-1]:.2f} % after 80 of {len(test)} cells, the best has {test.max():.2f}")
plt.xlabel("cells asked for")
plt.ylabel("test accuracy of the cell kept, %")
plt.legend()
plt.show()

# %% [markdown]
# From the command line, and equally from nothing:
#
# ```
# jaxsys nas fit --table digits --target valid --test test --columns synflow_nodes snip_nodes
# jaxsys nas search --table digits --target valid --test test --columns synflow_nodes
# ```
#
# With the benchmark's own tables (`JAXSYS_DATA`) the same calls give the figures of the README.
