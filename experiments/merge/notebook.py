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
# # Merging models: where experts conflict, and what to do about it
#
# Three experts are tuned from one small base. This notebook merges them in several ways, looks at
# where they pull apart, and builds Mediator: layers that agree are averaged, the others are kept as
# one dense and three sparse parts, and a router blends these for each request. It takes about a
# minute on two idle cores and downloads nothing; `tiny` (2 million parameters) comes with the
# package. Everything works on dictionaries of arrays whose paths are a checkpoint's tensor names,
# so your own models go in as they are, and the same methods run over files of any size.
#
# To run it: `jupyter notebook experiments/merge/notebook.ipynb`, or as a plain script
# `python experiments/merge/notebook.py`. The text of the `.ipynb` comes from the `.py`.

# %%
import json
import random
import sysconfig
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxsys.core.report import markdown_table
from jaxsys.core.tree import flatten
from jaxsys.data import TokenStream, save_tokenizer
from jaxsys.evaluate.open import open_model
from jaxsys.merge import (
    LayerChoice,
    MediatorConfig,
    conflicts,
    materialise,
    mediate,
    merge_files,
    merge_tree,
    parse_recipe,
)
from jaxsys.merge.files import plan_files
from jaxsys.merge.linear import TaskArithmetic
from jaxsys.merge.route import Route, RouterPlan, build_route
from jaxsys.merge.space import Range, parameter_space
from jaxsys.merge.ties import Dare, Ties
from jaxsys.merge.tune import TuneConfig, merge_objective, tune
from jaxsys.models import lm
from jaxsys.train.finetune import Recipe, finetune
from jaxsys.train.optimizers import adamw

# %% [markdown]
# ## 1. Three experts
#
# One learns Python's source code, one JSON records, one sums; each from the same base, all of its
# parameters trained. Parts that the training never sees are kept to measure on.

# %%
opened = open_model("tiny", dtype=jnp.float32)
base, config, tokenizer = opened.model.params, opened.config, opened.tokenizer
draw = random.Random(0)


def source_code():
    folder = Path(sysconfig.get_path("stdlib"))
    names = ("argparse", "ast", "calendar", "csv", "difflib", "doctest", "heapq", "inspect")
    text = "\n".join((folder / f"{name}.py").read_text(encoding="utf-8") for name in names)
    return text[:300_000]


def records():
    towns = ("Bonn", "Lund", "Pisa", "Cork", "Bern", "Graz")
    rows = (
        {
            "id": i,
            "town": draw.choice(towns),
            "open": draw.random() < 0.5,
            "size": draw.randint(1, 99),
        }
        for i in range(3000)
    )
    return "\n".join(map(json.dumps, rows))


def sums():
    pairs = ((draw.randint(0, 99), draw.randint(0, 99)) for _ in range(9000))
    return "\n".join(f"{a} + {b} = {a + b}" for a, b in pairs)


LENGTH, STEPS = 64, 50
tasks = {"code": source_code(), "records": records(), "sums": sums()}
ids = {
    name: np.concatenate([tokenizer.encode(text[i : i + 4000]) for i in range(0, len(text), 4000)])
    for name, text in tasks.items()
}
held_out = {
    name: jnp.asarray(x[-16 * LENGTH :].reshape(16, LENGTH), jnp.int32) for name, x in ids.items()
}


def loss_fn(params, tokens):
    return lm.loss(params, config, tokens)


def tune_on(name):
    stream = TokenStream(ids[name][: -21 * LENGTH], batch=8, length=LENGTH, seed=0)
    optimizer = adamw(6e-4, warmup_steps=10, total_steps=STEPS, clip_norm=1.0)
    return finetune(base, loss_fn, stream.batch_at, optimizer, Recipe(STEPS, "full")).params


experts = {name: tune_on(name) for name in tasks}
score = jax.jit(loss_fn)


def row(title, params_for):
    """Held-out nats per token of what serves each task."""
    found = {name: float(score(params_for(name), tokens)) for name, tokens in held_out.items()}
    return {"model": title, **found, "mean": float(np.mean(list(found.values())))}


def table(rows):
    return markdown_table(
        [{k: f"{v:.3f}" if k != "model" else v for k, v in row.items()} for row in rows]
    )


rows = [row("base", lambda name: base)]
rows += [row(f"expert of {own}", lambda name, own=own: experts[own]) for own in tasks]
print(table(rows))

# %% [markdown]
# Each expert is good at its own task and worse at the others. The best that any combination can
# hope for is the right expert for every request; what one model of the same size reaches by merging
# is the question.
#
# ## 2. One model of the same size
#
# A method is a pure function of one tensor: of the base, the stack of experts and their weights.
# `merge_tree` applies it to trees; the names are mergekit's.

# %%
models = list(experts.values())
merged = {
    "average": merge_tree("linear", models),
    "task arithmetic, 0.5": merge_tree(
        "task_arithmetic", models, base=base, config=TaskArithmetic(lambda_=0.5)
    ),
    "TIES, density 0.2": merge_tree("ties", models, base=base, config=Ties(density=0.2)),
    "DARE, density 0.5": merge_tree(
        "dare_linear",
        models,
        base=base,
        config=Dare(density=0.5, lambda_=0.5),
        key=jax.random.key(0),
    ),
}
rows += [row(name, lambda _, params=params: params) for name, params in merged.items()]
print(table(rows[-4:]))

# %% [markdown]
# ## 3. The same from files
#
# For models that do not fit in memory: a recipe as mergekit's users write it, streamed from
# memory-mapped files, one tensor at a time. What it will read, write and need is known before it
# starts (`jaxsys merge run recipe.yaml --out DIR` prints it), and the result is the one above.

# %%
work = Path(tempfile.mkdtemp())
for name, params in {"base": base, **experts}.items():
    lm.save(work / name, params, config)
    save_tokenizer(work / name, tokenizer)
entries = "\n".join(f"  - model: {work / name}" for name in tasks)
text = f"""
merge_method: ties
base_model: {work / "base"}
models:
{entries}
parameters: {{weight: 1, density: 0.2}}
"""
recipe = parse_recipe(text)
print(str(plan_files(recipe)[1]).replace(str(work), "WORK"))
merge_files(recipe, work / "ties")
streamed, in_memory = lm.load(work / "ties")[0], merged["TIES, density 0.2"]
same = [np.array_equal(a, flatten(in_memory)[path]) for path, a in flatten(streamed).items()]
print(f"{sum(same)} of {len(same)} tensors are equal to the last bit")

# %% [markdown]
# ## 4. Search the weights
#
# One weight for each expert, chosen by CMA-ES on rows that the table above does not use. The merge
# is part of the jitted objective, so a candidate costs one forward pass and no compilation.

# %%
unused = [x[-20 * LENGTH : -16 * LENGTH].reshape(4, LENGTH) for x in ids.values()]
tuning = jnp.asarray(np.concatenate(unused), jnp.int32)
space = parameter_space(list(flatten(base)), len(models), {"weight": Range(0.0, 1.0, 0.5)})
found = tune(
    merge_objective("task_arithmetic", space, loss_fn),
    space.coordinates,
    (models, base, tuning),
    TuneConfig(generations=10),
)
weights = [found.named[c.name] for c in space.coordinates]
print(", ".join(f"{name} {w:.2f}" for name, w in zip(tasks, weights, strict=True)), end="; ")
print(f"nats per token {found.start_value:.3f} -> {found.value:.3f}", end=" ")
print(f"with {found.evaluations} candidates")
tuned = merge_tree("task_arithmetic", models, base=base, weights=weights)
rows += [row("task arithmetic, searched", lambda _: tuned)]
print(table(rows[-1:]))

# %% [markdown]
# ## 5. Where they conflict
#
# The share of coordinates where two experts moved in opposite directions, of those where both moved
# much. Three definitions are measured in one pass; here the first two and, for each layer, all
# tensors together. (`jaxsys merge conflicts` draws the same for files.)

# %%
where = conflicts(base, models)
layers = list(where.layers)
plt.figure(figsize=(6, 2.6), layout="constrained")
for definition in ("pairwise_sign", "magnitude"):
    plt.plot(layers, list(where.of_layers(definition).values()), "o-", label=definition)
plt.ylabel("conflict d")
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# ## 6. Mediator
#
# The layers that conflict most keep their experts, as one dense part and three sparse ones; the
# rest is averaged. The density of the sparse parts and the number of routed layers set the size;
# with everything routed and nothing left out, every expert would come back exactly.

# %%
truth = dict(zip(tasks, jnp.eye(len(tasks)), strict=True))
for routed_layers, density in ((2, 0.1), (4, 0.2), (len(layers), 0.3)):
    choice = LayerChoice("topk", routed_layers)
    built = mediate(base, models, MediatorConfig(choice=choice, density=density))
    size = f"{density:g} ({built.cost.ratio:.2f}×)"
    title = f"Mediator, {routed_layers} of {len(layers)} layers, {size}"
    rows += [row(title, lambda name, b=built: materialise(b.routed, truth[name]))]
rows += [row(f"the right expert ({len(tasks)}×)", lambda name: experts[name])]
print(table(rows[-4:]))

# %% [markdown]
# These rows tell the router the right answer. In use it reads the prompt: a head on the shared
# model's hidden states, trained on a few prompts of each task, blends experts where it is unsure.
# Everything goes into one folder, which is served without the experts.

# %%
for name, text in tasks.items():
    (work / f"{name}.txt").write_text(text[:60_000], encoding="utf-8")
build_route(
    work / "base",
    [work / name for name in tasks],
    work / "mediator",
    MediatorConfig(choice=LayerChoice("topk", len(layers)), density=0.3),
    RouterPlan("head", tuple(work / f"{name}.txt" for name in tasks), prompts=64, prompt_tokens=16),
)
server = Route(work / "mediator", dtype=jnp.float32)
for prompt in ("    def __init__(self, name):\n", '{"id": 7, "town": "', "17 + 25 ="):
    told = server.answer(prompt, max_tokens=12)
    served = ", ".join(f"{name} {w:.2f}" for name, w in told.weights.items())
    print(f"{prompt!r} -> {told.text!r}   ({served}; uncertainty {told.uncertainty:.2f})")

# %% [markdown]
# ## 7. All of it
#
# Held-out nats per token, lower is better; one seed, small texts, a two-million-parameter model: an
# illustration. What was measured on a family with more tasks is in
# [README.md](README.md) beside this notebook.

# %%
print(table(rows))
