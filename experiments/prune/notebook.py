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
# # Pruning a language model, and searching for a metric that says what to prune
#
# Which weights can go? Every pruning method is an answer: a score for each weight, and perhaps new
# values for those that stay. This notebook scores one layer, prunes a whole model by several
# methods, writes it in a smaller form, and then lets a genetic search look for a score of its own.
# It takes about half a minute on two idle cores and downloads nothing: `tiny` (2 million
# parameters) comes with the package and has read Python's language reference, which calibrates it
# here. Its figures show how things are done; those of larger models are in the README.
#
# To run it: `jupyter notebook experiments/prune/notebook.ipynb`, or as a plain script
# `python experiments/prune/notebook.py`. The text of the `.ipynb` comes from the `.py`.

# %%
import tempfile
from dataclasses import replace

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxsys.core.report import markdown_table
from jaxsys.core.tree import flatten
from jaxsys.data import python_docs
from jaxsys.evaluate.open import open_model
from jaxsys.prune import (
    METHODS,
    Method,
    Pattern,
    calibration,
    compare,
    dense_stats,
    lm_blocks,
    parse,
    prune_linear,
    read_pruned,
    sequential,
    write_pruned,
)
from jaxsys.prune.compare import held_out_perplexity
from jaxsys.prune.genetic import EVOLVE, GeneticConfig
from jaxsys.prune.population import Scoring
from jaxsys.prune.search_model import LmLoss, draw_texts, search_lm

jax.config.update("jax_platforms", "cpu")

# %% [markdown]
# ## 1. One layer
#
# A layer's weight is `[outputs, inputs]`. What a method wants to know of the layer's inputs is
# gathered beforehand: here `X`, the squared norm of each input. Magnitude removes small weights,
# Wanda small |W|·√X. A metric may be any expression over W, X and the gradient G.

# %%
opened = open_model("tiny")
blocks, params = lm_blocks(opened.config), flatten(opened.model.params)
text = python_docs()
cut = len(text) * 4 // 5
tokens = calibration(opened.tokenizer, text[:cut], 4, 64)
[first, *_] = dense_stats(blocks, params, tokens)
name = "model.layers.0.mlp.up_proj"
weight, stats = jnp.asarray(params[f"{name}.weight"]), first[name]
masks = {
    metric: prune_linear(weight, stats, Method(metric), Pattern(0.5, "row")).mask
    for metric in ("magnitude", "wanda", "W*sqrt(X)", "abs(W)*X")
}
for metric, mask in masks.items():
    alike = float((mask == masks["wanda"]).mean())
    print(f"{metric:<12} keeps {int(mask.sum())} of {mask.size}; {alike:6.1%} as Wanda does")
print("as a tree:", parse("W*sqrt(X)").tree)

# %% [markdown]
# ## 2. A whole model, block after block
#
# Each block is pruned on what the pruned blocks before it put out. With the same share everywhere
# every row loses half; OWL gives blocks with more outliers more room, and together it is still
# exactly half.

# %%
shares = {}
for method in ("wanda", "owl"):
    gone, total = [], 0
    for found in sequential(blocks, params, tokens, METHODS[method], Pattern(0.5), batch=4):
        sizes = [mask.size for mask in found.masks.values()]
        gone.append(sum(sizes) - sum(int(mask.sum()) for mask in found.masks.values()))
        total += sum(sizes)
    shares[method] = np.array(gone) / (total / len(gone))
    print(f"{method}: {sum(gone)} of {total} removed, by block {shares[method].round(3).tolist()}")

# %% [markdown]
# ## 3. Methods beside each other
#
# Perplexity on the last fifth of the text, which no method has seen (the model has: it was trained
# on all of it).

# %%
evaluate = held_out_perplexity(opened.config, opened.tokenizer, text[cut:], length=128, windows=8)
names = ("dense", "magnitude", "wanda", "sparsegpt", "pruner_zero")
patterns = (Pattern(0.5), Pattern(nm=(2, 4)))
rows = list(compare(blocks, opened.model.params, {0: tokens}, names, patterns, evaluate, batch=4))
table = {name: {"method": name} for name in names}
for row in rows:
    table[row["method"]][row["pattern"]] = f"{row['perplexity']:.2f}"
print(f"dense: {rows[0]['perplexity']:.2f}\n")
print(markdown_table([row for name, row in table.items() if name != "dense"]))

# %% [markdown]
# ## 4. A smaller file
#
# Zeros take room too. Kept values with a bit for each weight, or values with their places in each
# group of four, do not (at 2:4 both take a bit for each weight); loading gives the dense tree back.

# %%
two_of_four, tree = {}, dict(params)
for found in sequential(blocks, params, tokens, Method("sparsegpt"), Pattern(nm=(2, 4)), batch=4):
    tree, two_of_four = tree | found.tensors, two_of_four | found.masks
for form, nm in (("packed", None), ("2:4", (2, 4))):
    folder = tempfile.mkdtemp()
    files = write_pruned(folder, tree, two_of_four, nm=nm, dtype=jnp.bfloat16)
    again, _ = read_pruned(folder)
    same = all((again[n] == np.asarray(tree[n], jnp.bfloat16)).all() for n in tree)
    size = sum(file.stat().st_size for file in files)
    dense = sum(2 * np.size(leaf) for leaf in tree.values())
    print(f"{form}: {size:,} bytes, {size / dense:.0%} of dense bfloat16; the same weights: {same}")

# %% [markdown]
# ## 5. A search for a metric
#
# Programs are arrays of numbers, so one compiled program scores a whole population: masks, and the
# loss of the model under each mask. The search below is tiny. It minimises the loss of one stretch
# of text; what it found is then scored on another.

# %%
ids = opened.tokenizer.encode(text)
texts = draw_texts(ids, (4, 2, 8), 64)
scoring = Scoring(LmLoss(opened.config), pattern=Pattern(0.5))
config = GeneticConfig(replace(EVOLVE, population=24), generations=6)
found, rows = search_lm(opened.model.params, opened.config, texts, scoring, config, top=3)
print(markdown_table(rows))
plt.figure(figsize=(5, 3))
plt.plot(
    [entry["evaluations"] for entry in found.history],
    [entry["best"] for entry in found.history],
    marker="o",
    label="best so far",
)
for row in rows:
    if row["metric"] in ("wanda", "pruner_zero"):
        plt.axhline(row["loss"], linestyle=":", color="grey")
        plt.annotate(row["metric"], (16, row["loss"]), fontsize=8)
plt.xlabel("expressions scored")
plt.ylabel("loss of the pruned model, nats")
plt.legend()
plt.show()

# %% [markdown]
# From the command line:
#
# ```
# jaxsys prune run tiny --metric sparsegpt --pattern 2:4 --form nm --out pruned
# jaxsys prune compare tiny --methods dense magnitude wanda sparsegpt
# jaxsys prune search tiny --population 24 --generations 6 --out search
# ```
