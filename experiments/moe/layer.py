"""How fast one mixture-of-experts layer is: orders, products, PyTorch, transformers, the floor.

    python experiments/moe/layer.py            about 3 minutes on 2 idle cores
    python experiments/moe/layer.py --smoke    seconds, one small size, nothing written

On a CPU three small sizes in float32; on a GPU the shapes of GPT-2 XL and Mixtral in bfloat16, with
Tokamax where it is installed. All contenders of a size run in turns, in one process, on the same
tokens, routers and matrices; where nothing is dropped, their outputs are compared first. The floor
is one expert's feed-forward part on all k·N rows: the same products, nothing routed. It is
measured, not a bound: eight products in a batch may run faster than one large one, and a layer then
comes to more than 100 % of it. PyTorch and transformers (extra `parity`) run with their own
settings, and are left out where they are not installed.

Written to `results/layer.md` and `results/layer.json`.

Expected on CPU: one-hot products take 1.5 to 2.2 times as long as the sparse order, XLA's
ragged_dot, a masked dense product there, 4 to 6.5 times, PyTorch's and transformers' layers 1.3 to
2.3 times; padding to f = 1.25 costs about what it adds.
"""

import argparse
import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.grouped import available
from jaxsys.core.measure import Timing, interleaved, machine, ratio
from jaxsys.core.report import atomic_write, markdown_table
from jaxsys.moe import Capacity, Dims, Experts, MoESpec, layer
from jaxsys.moe.experts import gpt_ffn, swiglu
from jaxsys.moe.gates import noisy_top_k, round_robin
from jaxsys.moe.order import einsum_order, sparse_order

RESULTS = Path(__file__).parent / "results"
BASE, FLOOR = "sparse order, einsum", "floor"
PASSES = ("forward", "forward and backward")


@dataclass(frozen=True)
class Shape:
    """A layer's sizes, and how many tokens it gets."""

    name: str
    width: int
    hidden: int
    tokens: int
    form: str = "swiglu"
    experts: int = 8
    k: int = 2
    dtype: str = "float32"

    @property
    def gigaflops(self) -> float:
        """Count the products of a forward pass without padding."""
        matmuls = 3 if self.form == "swiglu" else 2
        return 2e-9 * matmuls * self.k * self.tokens * self.width * self.hidden

    def make(self, backend: str = "einsum") -> Experts:
        """Make the experts."""
        return swiglu(backend=backend) if self.form == "swiglu" else gpt_ffn(backend=backend)


SMOKE = (Shape("smoke", 16, 24, 64),)
ON_CPU = (
    Shape("128 wide", 128, 448, 512),
    Shape("256 wide", 256, 896, 1024),
    Shape("512 wide", 512, 1792, 2048),
)
ON_GPU = (
    Shape("GPT-2 XL", 1600, 6400, 8192, "gpt", dtype="bfloat16"),
    Shape("Mixtral", 4096, 14336, 8192, dtype="bfloat16"),
)
Calls = dict[str, Callable[[], Any]]


def specs(shape: Shape) -> dict[str, MoESpec]:
    """List our contenders."""
    base = MoESpec(noisy_top_k(shape.k), sparse_order(), shape.make(), capacity=Capacity(1.25))
    even = round_robin(shape.k)
    dropless = Capacity(1, "dropless")
    found = {
        BASE: base,
        "one-hot order, einsum": replace(base, order=einsum_order()),
        "sparse order, einsum, even load, f = 1": replace(base, gate=even, capacity=Capacity(1)),
    }
    on_gpu = jax.default_backend() == "gpu"
    for backend in available():
        if backend != "pallas" or on_gpu:
            experts = shape.make(backend)
            found[f"sparse order, {backend}, dropless"] = replace(
                base, experts=experts, capacity=dropless
            )
    return found


def ours(shape: Shape, params: Any, x: jax.Array, backward: bool) -> Calls:
    """Compile our contenders and the floor."""
    calls: Calls = {}
    for name, spec in specs(shape).items():
        own = params
        if "even" in name:
            own = {**params, "gate": {"experts": jnp.zeros(shape.experts)}}
        calls[name] = _call(lambda p, x, spec=spec: layer.apply(p, x, spec)[0], own, x, backward)
    one = jax.tree.map(lambda leaf: leaf[:1], params["experts"])
    rows = jnp.tile(x[0], (shape.k, 1))[None]
    calls[FLOOR] = _call(shape.make().apply, one, rows, backward)
    return calls


def _call(apply: Callable[..., jax.Array], params: Any, x: jax.Array, backward: bool):
    run = jax.jit(apply)
    if backward:
        run = jax.jit(jax.grad(lambda p, x: jnp.sum(apply(p, x) ** 2), argnums=(0, 1)))
    return lambda: run(params, x)


def theirs(shape: Shape, params: Any, x: jax.Array, backward: bool) -> Calls:
    """Make PyTorch's and transformers' contenders, none where they are not installed."""
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = getattr(torch, shape.dtype)

    def tensor(a: jax.Array) -> Any:
        wide = np.array(a.astype(jnp.float32))
        return torch.tensor(wide, device=device).to(kind).requires_grad_(backward)

    rows = tensor(x[0])
    gate = tensor(params["gate"]["weight"])
    weights = {name: tensor(leaf) for name, leaf in params["experts"].items()}
    leaves = [rows, gate, *weights.values()]
    layers = {"PyTorch, a loop over experts": (_torch_loop(shape, gate, weights), leaves)}
    if importlib.util.find_spec("transformers") is not None and shape.form == "swiglu":
        blocks = _transformers(shape, gate, weights)
        layers |= {name: (run, [rows, *own]) for name, (run, own) in blocks.items()}

    def call(run: Callable[[Any], Any], leaves: list[Any]) -> Callable[[], Any]:
        def forward() -> Any:
            with torch.no_grad():
                y = run(rows)
            if device == "cuda":
                torch.cuda.synchronize()
            return y.float().cpu().numpy() if device == "cpu" else y

        def both() -> Any:
            for leaf in leaves:  # as JAX's, gradients are new ones and are not added to old ones
                leaf.grad = None
            (run(rows) ** 2).sum().backward()
            if device == "cuda":
                torch.cuda.synchronize()

        return both if backward else forward

    return {name: call(run, own) for name, (run, own) in layers.items()}


def _torch_loop(shape: Shape, gate: Any, weights: Any) -> Callable[[Any], Any]:
    import torch
    from torch.nn import functional

    def expert(own: dict[str, Any], rows: Any) -> Any:
        up = rows @ own["up"]
        if shape.form == "swiglu":
            return (functional.silu(rows @ own["gate"]) * up) @ own["down"]
        hidden = functional.gelu(up + own["up_bias"], approximate="tanh")
        return hidden @ own["down"] + own["down_bias"]

    def run(rows: Any) -> Any:
        top, chosen = (rows.float() @ gate.float().T).topk(shape.k, dim=-1)
        share = top.softmax(-1).to(rows.dtype)
        flat = chosen.reshape(-1)
        order = flat.argsort(stable=True)
        sizes = torch.bincount(flat, minlength=shape.experts).tolist()
        tokens = order // shape.k
        # Unbound in one go: the gradient of each weights[e] would be as large as all experts'.
        parts = [weights[name].unbind() for name in weights]
        each = [dict(zip(weights, own, strict=True)) for own in zip(*parts, strict=True)]
        groups = zip(each, rows[tokens].split(sizes), strict=True)
        outs = [expert(own, group) for own, group in groups if len(group)]
        scaled = torch.cat(outs) * share.reshape(-1)[order][:, None]
        return torch.zeros_like(rows).index_add(0, tokens, scaled)

    return run


def _transformers(shape: Shape, gate: Any, weights: Any) -> dict[str, tuple[Any, list[Any]]]:
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    found = {}
    for implementation in ("eager", "grouped_mm"):
        config = MixtralConfig(
            hidden_size=shape.width,
            intermediate_size=shape.hidden,
            num_local_experts=shape.experts,
            num_experts_per_tok=shape.k,
        )
        config._experts_implementation = implementation
        block = MixtralSparseMoeBlock(config).to(gate.device, gate.dtype)
        with torch.no_grad():
            block.gate.weight.copy_(gate)
            both = torch.cat([weights["gate"], weights["up"]], dim=-1)
            block.experts.gate_up_proj.copy_(both.transpose(1, 2))
            block.experts.down_proj.copy_(weights["down"].transpose(1, 2))
        block.train(gate.requires_grad)

        def run(rows: Any, block: Any = block) -> Any:
            y = block(rows[None])
            return (y[0] if isinstance(y, tuple) else y)[0]

        found[f"transformers, {implementation}"] = (run, list(block.parameters()))
    return found


def check(shape: Shape, calls: Calls, dropped: float) -> float:
    """Compare what drops nothing: the largest difference, relative to the largest value."""
    dropless = [name for name in calls if "dropless" in name or name.startswith(("Py", "transf"))]
    if dropped == 0:
        dropless += [BASE, "one-hot order, einsum"]
    outputs = [np.asarray(calls[name](), np.float32).reshape(shape.tokens, -1) for name in dropless]
    scale = max(float(np.abs(y).max()) for y in outputs)
    worst = max(float(np.abs(y - outputs[0]).max()) / scale for y in outputs)
    bound = 1e-4 if shape.dtype == "float32" else 5e-2
    if worst > bound:
        raise SystemExit(f"{shape.name}: outputs differ by {worst:.1e} of the largest: {dropless}")
    return worst


def measure(shape: Shape, runs: int) -> dict[str, Any]:
    """Time a size's contenders in turns."""
    dims = Dims(shape.width, shape.hidden, shape.experts)
    spec = specs(shape)[BASE]
    params = layer.init(jax.random.key(0), spec, dims)
    dtype = jnp.dtype(shape.dtype)
    params["experts"] = jax.tree.map(lambda a: a.astype(dtype), params["experts"])
    x = jax.random.normal(jax.random.key(1), (1, shape.tokens, shape.width), dtype)
    _, info = layer.apply(params, x, spec)
    result: dict[str, Any] = {"shape": asdict(shape), "dropped": float(info.dropped)}
    for name in PASSES:
        backward = name != "forward"
        calls = ours(shape, params, x, backward) | theirs(shape, params, x, backward)
        if not backward:
            result["difference"] = check(shape, calls, result["dropped"])
        result[name] = interleaved(calls, runs=runs)
    return result


def rows_of(shape: Shape, name: str, times: dict[str, Timing]) -> list[dict[str, Any]]:
    """Lay one size's times out as a table."""
    floor_s = times[FLOOR].median_s
    work = shape.gigaflops * (3 if name != "forward" else 1)
    rows = []
    for contender, own in times.items():
        beside = ratio(own, times[BASE])
        rows.append(
            {
                "layer": contender,
                "ms": f"{1e3 * own.median_s:.2f}",
                "GFLOP/s": f"{work / own.median_s:.0f}",
                "% of floor": f"{100 * floor_s / own.median_s:.0f}",
                "time over ours": f"{beside.median:.2f} [{beside.ci[0]:.2f}, {beside.ci[1]:.2f}]",
            }
        )
    return rows


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one small size")
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    shapes = ON_GPU if jax.default_backend() == "gpu" else ON_CPU
    shapes, runs = (SMOKE, 2) if options.smoke else (shapes, options.runs)
    parts, record = [], []
    for shape in shapes:
        result = measure(shape, runs)
        parts.append(
            f"## {shape.name}: {shape.width} × {shape.hidden}, {shape.form}, {shape.experts} "
            f"experts, {shape.k} per token, {shape.tokens} tokens, {shape.dtype}\n\n"
            f"Of the choices {100 * result['dropped']:.1f} % find no slot at f = 1.25; outputs "
            f"that drop nothing differ by {result['difference']:.0e} of the largest at most.\n"
        )
        for name in PASSES:
            table = markdown_table(rows_of(shape, name, result[name]))
            parts.append(f"### {shape.name}, {name}\n\n{table}")
            result[name] = {key: own.seconds for key, own in result[name].items()}
        record.append(result)
    head = (
        f"# One mixture-of-experts layer\n\nMedians of {runs} runs in turns; ratios are of paired "
        f"runs with 95 % intervals; ours is '{BASE}' with f = 1.25. The floor is one expert's "
        "feed-forward part on all k·N rows: measured, not a bound, as a batch of small products "
        "may run faster than one large one. Slots are padded to f; what is dropless is not.\n"
    )
    peers = [name for name in ("torch", "transformers") if importlib.util.find_spec(name)]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in peers)
    text = "\n".join([head, *parts, str(machine(devices=True)), *[versions] * bool(peers), ""])
    print(text)
    if not options.smoke:
        atomic_write(options.out / "layer.md", text)
        atomic_write(options.out / "layer.json", json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
