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
# # A model that does not fit its accelerator
#
# ScheInfer (arXiv 2411.15715) runs a language model on a CPU and an accelerator at once, without
# changing its output. Only the paper's abstract could be read, so how modules are cut is our
# reconstruction. This notebook plans Mixtral-8x7B on a machine whose rates are assumed, looks at
# one token's schedule, and then runs a small model under such a plan on two virtual devices. It
# takes about half a minute and downloads nothing.
#
# To run it: `jupyter notebook experiments/offload/notebook.ipynb`, or as a plain script
# `python experiments/offload/notebook.py`. The text of the `.ipynb` comes from the `.py`.

# %%
from dataclasses import replace

import jax
import matplotlib.pyplot as plt
import numpy as np

from jaxsys.core.timeline import gantt
from jaxsys.models import lm
from jaxsys.offload.engine import make_engine
from jaxsys.offload.generate import generate
from jaxsys.offload.limit import limit
from jaxsys.offload.load import place_model
from jaxsys.offload.parts import cache_bytes, parts_of, workspace_bytes
from jaxsys.offload.place import find_devices
from jaxsys.offload.plan import describe, make_plan
from jaxsys.offload.simulate import STRATEGIES, simulate_run
from jaxsys.offload.traces import synthetic_trace
from jaxsys.offload.types import Machine, Processor

# Before JAX is used: two virtual devices, for the end of this notebook.
jax.config.update("jax_num_cpu_devices", 2)

# %% [markdown]
# ## What a machine allows
#
# A token of Mixtral reads 25.5 GB of bfloat16 weights. With 24 GB of accelerator memory most of
# them are read from the CPU's memory, by the CPU or over the link. The limit follows from four
# rates: the CPU's, the link's, the accelerator's and that of the memory that the first two share.

# %%
machine = Machine(
    Processor(55e9, 1e12, 1.28e11, launch_s=1e-5),
    Processor(900e9, 7e13, 24e9, launch_s=1e-5),
    link_bytes_per_s=25e9,
    link_latency_s=1.5e-5,
    dram_bytes_per_s=65e9,
    name="assumed: 24 GB, 900 GB/s, link 25 GB/s, CPU 55 GB/s",
)
config = lm.LMConfig(
    "mixtral", 32000, 4096, 32, 32, 8, 128, 14336, 32768,
    experts=8, experts_per_token=2, expert_width=14336,
)  # fmt: skip
parts = parts_of(config, weight_bytes=2)
for way in ("link", "cpu", "split", "resident"):
    found = limit(parts, machine, hit=54 / 256, way=way)
    print(f"{way:>8}: at most {found.tokens_per_s:5.2f} tokens/s")

# %% [markdown]
# ## A plan
#
# Attention and its cache come first, then experts by use per byte. What is left of an expert is
# cut by columns between the CPU and the link, so that both finish together.

# %%
sizes = {
    "cache_bytes": cache_bytes(config, 4096, number_bytes=2),
    "workspace_bytes": workspace_bytes(config, 512, 4096, number_bytes=2),
}
plan = make_plan(parts, machine, 24e9, cut_experts=True, prompt_tokens=0, **sizes)
print(describe(plan, machine))

# %% [markdown]
# ## One token, modelled
#
# The simulator runs the plan over routing that is drawn here. Above, the rule of Fiddler's code,
# which overlaps nothing; below, the cut experts. Times are modelled.

# %%
trace = synthetic_trace(8, config.layers, config.experts, config.experts_per_token, seed=1)
fiddler = next(strategy for strategy in STRATEGIES if strategy.name == "Fiddler")
figure, axes = plt.subplots(2, 1, figsize=(9, 4), constrained_layout=True)
cases = ((fiddler, "Fiddler's rule"), (None, "cut columns"))
for axis, (strategy, name) in zip(axes, cases, strict=True):
    own = make_plan(parts, machine, 24e9, cut_experts=strategy is None, prompt_tokens=0, **sizes)
    run = simulate_run(own, machine, trace, strategy)
    spans = [span for span in run.first.spans if span.start_s < 0.03]
    gantt(axis, spans, labels=False)
    axis.set_title(f"{name}: {run.tokens_per_s:.2f} tokens/s modelled, first 30 ms of a token")
plt.show()

# %% [markdown]
# ## The same on two virtual devices
#
# A small Mixtral form, half of each expert kept on the "accelerator", a quarter copied over at
# every use, a quarter computed by the "CPU". The tokens are those of the whole model.

# %%
small = lm.config_from_hf({
    "model_type": "mixtral", "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_local_experts": 4, "max_position_embeddings": 64,
})  # fmt: skip
params = jax.tree.map(lambda x: 4 * x if x.ndim == 2 else x, lm.init(jax.random.key(1), small))
devices = find_devices("virtual")
own = make_plan(parts_of(small), replace(machine, name=""), 0)
cut = replace(
    own,
    resident=tuple(part.columns // 2 if part.columns else 1 for part in own.parts),
    stream=tuple(part.columns // 4 for part in own.parts),
    cache_on=("accelerator",) * 2,
    budget_bytes=-1,
)
engine = make_engine(place_model(params, cut, devices, config=small), early=True)
prompt = [5, 6, 7, 8]
tokens = generate(engine, [prompt], max_tokens=8).tokens[0]
text = list(prompt)
for _ in range(8):
    text.append(int(lm.apply(params, small, np.array([text])).logits[0, -1].argmax()))
print("equal to the whole model's:", tokens == text[len(prompt) :])
print(
    f"moved over the link: {engine.monitor.moved_bytes / 1e3:.0f} kB; the next router run early "
    f"named {100 * engine.monitor.early_rate:.0f} % of its experts rightly"
)
