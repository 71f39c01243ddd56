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
# the handwritten 8×8 digits (`own_benchmark.py`). It takes about two minutes on two cores and
# downloads nothing.
#
# To run it: `jupyter notebook experiments/nas/notebook.ipynb`, or as a plain script
# `python experiments/nas/notebook.py`. The text of the `.ipynb` comes from the `.py`
# (`jupytext --to ipynb --execute experiments/nas/notebook.py`).

# %%
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxsys.core.report import markdown_table
from jaxsys.nas import predictor, search, space, tables
from jaxsys.nas.batches import image_batch
from jaxsys.nas.features import predictor_inputs
from jaxsys.nas.fit import FitConfig
from jaxsys.nas.model import any_model, cell_model
from jaxsys.nas.network import NetworkConfig
from jaxsys.nas.predictor import PredictorConfig
from jaxsys.nas.rank import kendall_tau, with_interval
from jaxsys.nas.run import draw_rows, fit_and_test
from jaxsys.nas.score import ScoreConfig, score, score_all

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
# ## 3. Many cells, one program
#
# In the cell space the architecture is data: one compiled program scores every cell. The table
# holds cells trained on the digits, so the same small network is scored.

# %%
results = Path("results") if Path("results").is_dir() else Path("experiments/nas/results")
table = tables.load(results / "digits_benchmark.npz")
chosen = np.random.default_rng(0).permutation(len(table.cells))[:200]
table = table.select(chosen)
test = table.column("test")
make = partial(cell_model, config=NetworkConfig(2, 1, image_channels=1))
config = ScoreConfig(("naswot", "synflow", "snip", "grad_norm"))
scores = score_all(make, table.cells, images, labels, config)
rows = []
for name, values in scores.totals.items():
    tau, (low, high) = with_interval(kendall_tau, values[:, 0], test)
    rows.append({"proxy": name, "Kendall's τ": f"{tau:.3f} [{low:.3f}, {high:.3f}]"})
print(markdown_table(rows))

# %% [markdown]
# ## 4. Layer by layer
#
# A total is a sum over layers with equal weights. The parts say more. One line of the picture is a
# cell, from the worst at the top to the best; a column is a place that can hold a layer.

# %%
synflow = scores.nodes["synflow"][:, 0]
figure, axis = plt.subplots(figsize=(7, 3))
axis.imshow(synflow[np.argsort(test)], aspect="auto", interpolation="nearest")
axis.set(xlabel="slot", ylabel="cell, worst to best", title="log synflow")
plt.show()

# %% [markdown]
# ## 5. A predictor that learns to rank
#
# ParZC's mixer with Bayesian layers (`mabn`), with a graph encoder beside it (`parzc`), and two
# baselines; three training sets of 60 cells each, tested on the others. All three are trained in
# one program.

# %%
inputs = predictor_inputs(table.cells, {k: v[:, 0] for k, v in scores.nodes.items()})
sizes = PredictorConfig(
    sequence=64, width=16, depth=1, heads=2, head_width=8, graph_width=16, inner=32
)
training = FitConfig(("mse", "pair"), epochs=60, lr=3e-3)
rows = []
for name in ("mabn", "parzc", "gcn", "trees"):
    found = fit_and_test(
        name, inputs, table.column("valid"), test, draw_rows(200, 60, 3), training, sizes=sizes
    )
    rows.append({"predictor": name, "τ on 140 others, by seed": str(found.tau.round(3).tolist())})
print(markdown_table(rows))

# %% [markdown]
# ## 6. Searching
#
# Every search asks for 60 of the 200 cells; ten seeds. The guided one trains a predictor on what it
# knows before it asks for the next twenty.

# %%
valid = search.from_table(table, "valid")
final = search.from_table(table, "test")
model = predictor.make("gcn", 0, sizes)
seeds = range(10)
guided = search.guided_search(
    valid, table.cells, model, inputs, training, queries=60, start=20, step=20, seeds=seeds
)
blind = [search.random_search(valid, 60, pool=table.cells, seed=s) for s in seeds]
for name, traces in (("random", blind), ("guided", guided)):
    curve = np.mean([search.kept_so_far(t, final) for t in traces], 0)
    plt.plot(np.arange(1, 61), curve, label=name)
plt.xlabel("cells asked for")
plt.ylabel("test accuracy of the cell kept, %")
plt.legend()
plt.show()

# %% [markdown]
# With the benchmark's own tables (`JAXSYS_DATA`) the same calls give the figures of the README:
# `jaxsys nas score`, `fit` and `search` do it from the command line.
