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
# # Which one is meant?
#
# Somebody says "a tall blue chair", and two objects stand there. This notebook draws toy furniture
# from all around, lets a grounder learn which object a description means, asks what each view
# weighs, makes the task harder, and plugs in an encoder of its own. It takes a minute or two and
# downloads nothing. The toys are drawn by a few lines of JAX (`jaxsys.ground.scene`) and encoded by
# random features, so the figures show how things work, not how good a method is; real objects and
# real encoders are in `furniture.py`, SNARE in `jaxsys ground train --snare`.
#
# To run it: `jupyter notebook experiments/ground/notebook.ipynb`, or as a plain script
# `python experiments/ground/notebook.py`. The text of the `.ipynb` comes from the `.py`
# (`jupytext --to ipynb --execute experiments/ground/notebook.py`).

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display

from jaxsys.core.report import markdown_table
from jaxsys.ground.build import Choice, make_grounder
from jaxsys.ground.da4lg import Da4lgConfig, da4lg
from jaxsys.ground.evaluation import Condition, group_figures, keep_views, robustness, score
from jaxsys.ground.judge import examples_of
from jaxsys.ground.report import draw
from jaxsys.ground.runs import Job, Run
from jaxsys.ground.tables import gather, take_rows
from jaxsys.ground.toys import draw_toys, toy_questions
from jaxsys.ground.train import TrainConfig, fit, fit_seeds
from jaxsys.models.lm.linear import linear

jax.config.update("jax_platforms", "cpu")

# %% [markdown]
# ## 1. Objects, views, questions
#
# 48 toys: four kinds, six colours, two heights. 32 are for learning, 8 to stop by, 8 to be asked
# about; a question is a pair of toys and the name of one of them.

# %%
task = toy_questions(pixels=True, words=True)
pictures = draw_toys()
fig, axes = plt.subplots(3, 4, figsize=(6, 4.2))
for line, toy in zip(axes, (3, 20, 46), strict=True):
    for axis, view in zip(line, pictures[toy], strict=True):
        axis.imshow(view)
        axis.set_axis_off()
    line[0].set_title(task.names[toy], loc="left", fontsize=9)
plt.show()
print({name: len(rows.text) for name, rows in task.folds.items()}, "questions")

# %% [markdown]
# Everything is held once in tables; a batch is a gather from them, which training does inside the
# compiled program.

# %%
batch = gather(task.tables, take_rows(task.fold("test"), np.arange(2)))
for name, part in batch._asdict().items():
    if part is not None:
        print(f"{name:10} {np.shape(part)}")

# %% [markdown]
# ## 2. MATCH, three seeds in one program
#
# A grounder is three pure functions: `init`, `scores`, `loss`. `fit_seeds` trains all seeds side by
# side, stops each by its own validation accuracy and gives its best parameters back.

# %%
config = TrainConfig(epochs=8, lr=3e-3, round=2)
match, _ = make_grounder(Choice(grounder="match", hidden=(64,)), task)
train, valid, test = (task.fold(name) for name in ("train", "valid", "test"))
seeds = fit_seeds(match, {}, task.tables, train, valid, config, seeds=[0, 1, 2])
plt.figure(figsize=(5, 3))
plt.plot(seeds.accuracies.T)
plt.xlabel("epoch")
plt.ylabel("validation accuracy")
plt.legend([f"seed {i}" for i in range(3)])
plt.show()

# %%
rows = []
for i in range(3):
    params = jax.tree.map(lambda x, i=i: x[i], seeds.params)
    found = score(match, params, {}, task.tables, test)
    shares = group_figures(found, test.answer, task.groups["test"])
    rows.append({"seed": i} | {name: round(one.accuracy, 3) for name, one in shares.items()})
print(markdown_table(rows))

# %% [markdown]
# Right means strictly the highest score, so a tie is wrong, as in SNARE's own evaluation. Pairs of
# one kind that differ in a single word are the hard ones.
#
# ## 3. DA4LG: an encoder that adapts
#
# DA4LG puts a second copy of the vision encoder beside the frozen one and trains low-rank adapters
# in it, weighs views by how well they fit the description, and adds a contrastive task. Here the
# encoder is one matrix; any function of (parameters, pixels) will do.

# %%
choice = Choice(grounder="da4lg", hidden=(64,), rank=4, weighting="softmax", contrast=0.1)
model, frozen = make_grounder(choice, task)
tuned = TrainConfig(epochs=6, lr=3e-3, adapter_lr=1e-3, round=2)
one = jax.devices()[:1]
fitted = fit(model, frozen, task.tables, train, valid, tuned, devices=one)
print("validation accuracy of each epoch:", np.round(fitted.accuracies, 3))
adapter = fitted.params["domain"]["q_proj.weight"]
print("adapter:", adapter.a.shape, adapter.b.shape, f"|B| up to {np.abs(adapter.b).max():.3f}")

# %% [markdown]
# ## 4. What it looked at
#
# The number above a view is its weight (they average 1 over an object), the bar its score.

# %%
run = Run(Job(choice, tuned), task, model, frozen, [fitted.params])
examples, note = examples_of(run, "test", [0, 13])
print(note)
for example in examples:
    display(draw(example))

# %% [markdown]
# `jaxsys ground evaluate RUN --report 12` writes these, and one page of HTML with the pictures
# inside.
#
# ## 5. Harder conditions
#
# The same questions with fewer views, with a quarter of every view covered, seen from above, and
# lit from the other side. Intervals draw objects, not questions, since questions about one object
# are not independent.

# %%
harder = [
    Condition("2 of 4 views", change=keep_views(2)),
    Condition("1 of 4 views", change=keep_views(1)),
    *task.harder("test"),
]
table = robustness(model, fitted.params, frozen, task.tables, test, harder, passes=4)
shown = [{k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in table]
print(markdown_table(shown))

# %% [markdown]
# ## 6. Your own encoder
#
# An encoder is a function of its parameters and of what it sees. If its linear layers go through
# `jaxsys.models.lm.linear.linear`, adapters find them by their path.

# %%
key = jax.random.key(0)
own = {
    "first": {"weight": jax.random.normal(key, (24, 192)) / 8},
    "q_proj": {"weight": jax.random.normal(key, (32, 24)) / 4},
}


def encode(params, images):
    small = 1 - jax.image.resize(images, (images.shape[0], 8, 8, 3), "linear")
    hidden = jax.nn.relu(linear(params["first"], small.reshape(len(images), -1)))
    return jnp.tanh(linear(params["q_proj"], hidden))


mine = da4lg(
    Da4lgConfig(32, 32, "lora", rank=4, patterns=("*.weight",), hidden=(64,), shared=32), encode
)
tables = task.tables._replace(views=None)  # f_v comes from the encoder, too
result = fit(mine, {"vision": own}, tables, train, valid, tuned, devices=one)
found = score(mine, result.params, {"vision": own}, tables, test)
print(f"test accuracy {group_figures(found, test.answer, {})['all'].accuracy:.3f}")

# %% [markdown]
# The same from the command line: `jaxsys ground train --grounder da4lg --out RUN`, then
# `jaxsys ground evaluate RUN --fold test --robust --report 12`. With `--prepared FOLDER` the
# objects are real furniture, with `--snare FOLDER` the questions are SNARE's.
