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
# # Editing facts, and looking at the rest of the model
#
# A language model says something about a subject; we make it say something else by changing one
# matrix, look at what else that changed, take it back, and then see what many such edits do. It
# takes about half a minute on two idle cores and downloads nothing: `tiny` (2 million parameters,
# trained on the reference of Python's language) comes with the package. It knows next to nothing,
# so edits sit less well in it than in SmolLM2, GPT-2, Pythia or Llama, which the same calls edit
# (figures are in [README.md](README.md)).
#
# To run it: `jupyter notebook experiments/edit/notebook.ipynb`, or as a plain script
# `python experiments/edit/notebook.py`. The text of the `.ipynb` comes from the `.py`.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

from jaxsys.core.report import markdown_table
from jaxsys.data import python_docs
from jaxsys.edit import METHODS, Record, Request, undo
from jaxsys.edit.contract import Answering
from jaxsys.edit.curve import Chosen, CurveConfig, Grid
from jaxsys.edit.evaluation import EvaluationConfig, base_of_each, write
from jaxsys.edit.factors import keep
from jaxsys.edit.files import open_for_editing
from jaxsys.edit.protocol import configure, single_edits
from jaxsys.edit.summary import summarise
from jaxsys.edit.trace import trace
from jaxsys.edit.trace_figure import heat_map
from jaxsys.evaluate.protocol import from_lm
from jaxsys.evaluate.tasks import Task

model, params = open_for_editing("tiny")
print(model.config.layers, "layers of width", model.config.width)


def say(weights, prompts, tokens=4):
    """Let a model go on from some prompts, taking the likeliest token each time."""
    return write(Answering(from_lm(weights, model.config)), model.tokenizer, prompts, tokens)


# %% [markdown]
# ## 1. One fact
#
# A request is a prompt, the subject in it, and the new answer. ROME (2202.05262) seeks the value
# that one layer should write at the subject's last token so that the layers above give the new
# answer, and stores it with a change of rank one, ΔW = a bᵀ. It keeps what the matrix does to other
# keys as far as their second moments say so; here these are left out (`statistics=False`), which
# section 4 shows the price of.

# %%
request = Request("A generator is a", "generator", "module", truth="class")
near = ["The generator is a", "A list is a", "A function is a"]
settings = {
    "layer": 1,
    "statistics": False,
    "target": {"prefixes": ["So"], "lr": 0.5, "clamp": 10.0, "weight_decay": 1e-3, "steps": 25},
}
rome = configure("rome", METHODS["rome"], settings)
edited = METHODS["rome"].edit(model, rome, params, [request])

prompts = [request.prompt, *near]
before, after = (say(weights, prompts) for weights in (params, edited.params))
columns = zip(prompts, before, after, strict=True)
print(markdown_table([{"prompt": p, "before": b, "after": a} for p, b, a in columns]))
[(path, (a, b))] = edited.info.factors.items()
print(f"{path}: ΔW = A Bᵀ with A {a.shape} and B {b.shape}; nothing else was touched")

# %% [markdown]
# ## 2. Taking it back
#
# Parameters are values and an edit makes new ones, so the unedited model is still there. Where only
# the edited one is, the factors and the matrix's old bits undo the edit exactly. (For checkpoints:
# `jaxsys edit apply` and `jaxsys edit apply --undo`.)

# %%
restored = undo(model, edited.params, edited.info, keep(params, edited.info))
same = jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), restored, params)
print("every bit as before:", all(jax.tree.leaves(same)))

# %% [markdown]
# ## 3. Is it known in other words, and did the neighbours stay?
#
# Three facts, each edited alone from the unedited model, with a paraphrase and a neighbour.
# *Efficacy* and *paraphrase* ask whether the new answer is likelier than the old one,
# *neighbourhood* whether another subject's own answer still is, *locality* whether the model says
# there what it said before. What it said before is asked before the first edit. FT-M is plain
# fine-tuning of one layer on the request.

# %%
others = {"generator": ("module", "class"), "dictionary": ("number", "dictionary")}
others |= {"function": ("number", "string")}
records = [
    Record(
        Request(f"A {subject} is a", subject, new, old),
        (f"The {subject} is a",),
        (("A list is a", say(params, ["A list is a"], 1)[0].strip()),),
    )
    for subject, (new, old) in others.items()
]
base = base_of_each(from_lm(params, model.config), model.tokenizer, records)
how = EvaluationConfig(answer_tokens=0, fluency_tokens=0)
methods = {"rome": settings, "ft-m": {"layers": [1], "lr": 1e-3}}
chosen = [Chosen(k, METHODS[k], configure(k, METHODS[k], v)) for k, v in methods.items()]
shown = ("efficacy", "paraphrase", "neighbourhood", "locality")
rows = []
for name, method, config in chosen:
    found = single_edits(model, method, config, params, records, base, evaluation=how)
    means = summarise([single.row for single in found])
    rows.append({"method": name} | {k: round(means[k].value, 2) for k in shown})
print(markdown_table(rows))

# %% [markdown]
# ## 4. One edit after another
#
# The question of [2410.18785](https://arxiv.org/abs/2410.18785): what becomes of the rest of a
# model while edits pile up? The same facts one after the other, weights kept, and after some of
# them a look at something that no edit was about: the loss on Python's reference, in nats per
# token. `jaxsys edit curve` does this with questions, intervals and files that a stopped run goes
# on from.

# %%
text = Task("reference", (python_docs()[60_000:62_000],), "text that is about something else")
counts = CurveConfig((0, 1, 3), batch=1, probed=3, evaluation=EvaluationConfig(0, 0))
options = {"window": 128, "most_windows": 2}
grid = Grid(model, params, records, [text], counts, options=options)
cells = grid.run(chosen)
plt.figure(figsize=(5, 2.6), layout="constrained")
for name in methods:
    own = [cell for cell in cells if cell["method"] in ("unedited", name)]
    nats = [cell["abilities"]["reference"]["value"] for cell in own]
    plt.plot([cell["n"] for cell in own], nats, "o-", label=name)
plt.xlabel("edits")
plt.ylabel("nats per token of other text")
plt.xticks(range(4))
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# ## 5. Where a fact lies
#
# Noise on the subject takes the answer away; putting back one state of the clean run brings it
# back, or does not. Layers whose feed-forward part brings it back at the subject's last token are
# the ones to edit. `jaxsys edit trace` draws this for one fact and chooses layers from many.

# %%
found = trace(model, params, request, kinds=("layer", "mlp"), samples=4, window=1)
print(f"{found.answer!r}: {found.clean:.3f} clean, {found.corrupted:.3f} with noise")
heat_map(found)
