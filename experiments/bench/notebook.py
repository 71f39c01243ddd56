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
# # Where a training step's time goes
#
# `jaxsys.bench` (after arXiv 2311.03687) says which techniques to switch on for a model and a
# machine: from the whole step, over the parts of the model, down to single operators, with the
# least time that each could take beside what it takes. Here a small model, in under a minute; the
# times are this machine's, which may be busy.

# %%
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from IPython.display import Image

from jaxsys.bench import comm, ops, static, train
from jaxsys.bench.ablation import ablate
from jaxsys.bench.compare import compare
from jaxsys.bench.dissect import measure as dissect
from jaxsys.bench.modules import split
from jaxsys.bench.report import sections, write
from jaxsys.bench.roofline import peaks
from jaxsys.bench.step import Task
from jaxsys.bench.techniques import Technique
from jaxsys.core.report import append_jsonl, markdown_table
from jaxsys.models import lm

# Llama in form: vocabulary 512, width 128, 2 layers, 4 heads over 2 key/value heads of 32
config = lm.LMConfig("llama", 512, 128, 2, 4, 2, 32, 344, 256)
task = Task(batch=4, tokens=128)


def show(rows, number=1):
    print(markdown_table(sections(rows)[number].rows))


# %% [markdown]
# ## Before anything runs
#
# Operations by formula and as counted in the traced program, memory from the compiled program, and
# the roofline's least time, for three ways to run the step.

# %%
techniques = [Technique(), Technique(recompute="full"), Technique(donate=True)]
rows = static.measure("demo", config, techniques, task)
for row in rows:
    print(row["flags"]["technique"], f"counted over formula: {row['flops_ratio']:.4f}")

# %% [markdown]
# ## The same three, measured
#
# They take turns, so that a slow minute hits all alike.

# %%
measured = train.measure("demo", config, techniques, task, runs=5, memory=False)
show(measured)

# %% [markdown]
# ## Parts of the step
#
# The decoder names its parts by `jax.named_scope`; the profiler's events name instructions of the
# compiled program, which carry those scopes. Beside it, every part alone: its forward pass and its
# vjp as programs of their own.

# %%
row = dissect(config, Technique(), task, {"model": "demo"}, rounds=5)
show([row])
print(sections([row])[1].notes[0])

# %% [markdown]
# Any function with named scopes can be split so, not only our models.

# %%
names = ("up", "square")


def loss(w, x):
    for layer in w:
        with jax.named_scope("up"):
            x = jnp.tanh(x @ layer)
        with jax.named_scope("square"):
            x = x * x
    return jnp.sum(x)


w, x = jnp.ones((3, 256, 256)) / 256, jnp.ones((256, 256))
compiled = jax.jit(jax.grad(loss)).lower(w, x).compile()
found = split(lambda: compiled(w, x), compiled.as_text(), parts=names, rounds=5)
print({key: f"{1e3 * seconds[0]:.3f} ms" for key, seconds in found.seconds.items()})
alone = ablate(loss, w, (x,), step=lambda: compiled(w, x), parts=names, rounds=5)
print({key: f"{1e3 * seconds[0]:.3f} ms" for key, seconds in alone.seconds.items()})

# %% [markdown]
# ## Operators and the roofline
#
# Peaks come from a table for known GPUs and are measured elsewhere.

# %%
print(peaks(jax.devices()[0]))
sweep = ops.Sweep(("matmul", "softmax", "elementwise"), sizes=(64, 256), rows=(1, 16),
                  elements=2**20, dtypes=("float32",))  # fmt: skip
operators = ops.measure(sweep, runs=5)
show(operators)

# %% [markdown]
# ## Copies between host and device
#
# A line t = α + β·n is fitted to the times, and refused where it explains too little; on one device
# there is nobody to exchange with, which the rows say.

# %%
copies = comm.measure((4096, 65536, 2**20, 2**22), runs=5)
show(copies)

# %% [markdown]
# ## A report, and a comparison
#
# Rows go to JSON lines; a report is Markdown and one HTML page with the figures inside it. Two
# results are compared figure by figure, with Holm's correction. Below are the same steps a second
# time. The test knows nothing of what happened to the machine in between: a difference that it
# calls significant here is one of the machine, not of the program, so compare runs of a quiet one.

# %%
folder = Path(tempfile.mkdtemp())
for line in [*measured, row, *operators, *copies]:
    append_jsonl(folder / f"{line['kind']}.jsonl", line)
files = write([*measured, row, *operators, *copies], folder)
print([path.name for path in files])
Image(folder / "parts.png", width=600)

# %%
again = train.measure("demo", config, techniques, task, runs=5, memory=False)
for change in compare(measured, again).changes:
    verdict = {None: "not tested", True: "significant", False: "not significant"}
    print(f"{change.row}: {change.ratio:.2f}, {verdict[change.significant]}")
