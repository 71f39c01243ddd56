"""Seconds of a training step and of rendering.

    python experiments/ground/throughput.py                 (results/throughput.md, six minutes)
    python experiments/ground/throughput.py --parts Adapters Rendering      (others are kept)
    python experiments/ground/throughput.py --smoke

A step of MATCH on features that are fixed, a whole epoch in one compiled program, beside a
PyTorch transcription of the released step (gather, maximum of views, head, smoothed cross entropy,
Adam) on the same machine in alternating rounds; five seeds in one program beside five runs; DA4LG
with adapters on an encoder beside the same with the encoder frozen; rendering of the toys and of
meshes. Expected on two shared cores: see the file; ratios, not times, are what carries over. On a
machine with an accelerator JAX takes it by itself, and PyTorch stays on the CPU.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.core.measure import interleaved, machine, ratio
from jaxsys.core.report import atomic_write, markdown_table
from jaxsys.ground import scene
from jaxsys.ground.contract import Grounder
from jaxsys.ground.da4lg import Da4lgConfig, da4lg
from jaxsys.ground.match import MatchConfig, match
from jaxsys.ground.program import Task, TrainConfig, program
from jaxsys.ground.spread import replicate, row_mesh
from jaxsys.ground.tables import Rows, Tables
from jaxsys.models.lm.linear import linear

RESULTS = Path(__file__).parent / "results"
SIZES = {  # name: batch, views, image width, text width
    "SNARE (batch 64, 8 views, 512 + 512)": (64, 8, 512, 512),
    "furniture (batch 64, 8 views, 1280 + 384)": (64, 8, 1280, 384),
    "large batch (512, 8 views, 512 + 512)": (512, 8, 512, 512),
}


def data(n: int, views: int, width: int, text: int, rows: int) -> tuple[Tables, Rows]:
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    tables = Tables(np.ones((n, views), bool), draw(n, text), np.arange(n), draw(n, views, width))
    objects = np.stack([rng.choice(n, 2, replace=False) for _ in range(rows)]).astype(np.int32)
    answer = rng.integers(2, size=rows).astype(np.int32)
    return tables, Rows(objects, objects[:, 0], answer)


def epoch_of(
    model: Grounder, frozen: dict, tables: Tables, rows: Rows, batch: int, seeds: int = 0
) -> Callable[[], object]:
    """Give a function that trains one epoch and keeps its state."""
    many = seeds > 0
    mesh, count = row_mesh(batch, jax.devices()[:1]), len(rows.text)
    run = program(model, TrainConfig(epochs=1000, batch=batch), mesh, 0, many)
    number = np.arange(seeds, dtype=np.int32) if many else np.int32(0)
    stack = lambda x: np.stack([x] * seeds) if many else x  # noqa: E731
    parts = (Rows(*map(stack, rows)), stack(np.int32(count)), None, None)
    task = Task(*replicate((frozen, tables, *parts), mesh))
    held = {"state": run.init(number, task.frozen, None), "epoch": 0}

    def epoch() -> object:
        span = np.array([held["epoch"], held["epoch"] + 1], np.int32)
        held["state"], _, _ = run.advance(held["state"], task, number, span, count // batch)
        held["epoch"] += 1
        return held["state"]["losses"]

    return epoch


def torch_epoch(tables: Tables, rows: Rows, batch: int) -> Callable[[], object]:
    import torch
    from torch import nn
    from torch.nn import functional as F

    views, text = torch.from_numpy(tables.views), torch.from_numpy(tables.text)
    objects, said = (torch.from_numpy(np.int64(x)) for x in (rows.objects, rows.text))
    answer = torch.from_numpy(np.int64(rows.answer))
    width = views.shape[-1] + text.shape[-1]
    head = nn.Sequential(
        nn.Linear(width, 512), nn.ReLU(), nn.Dropout(0.1),
        nn.Linear(512, 256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, 1),
    )  # fmt: skip
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)

    def epoch() -> object:
        for at in torch.randperm(len(answer)).split(batch):
            seen = F.normalize(views[objects[at]].amax(2), dim=-1)
            line = F.normalize(text[said[at]], dim=-1)[:, None].expand(-1, 2, -1)
            scores = head(torch.cat([seen, line], -1))[..., 0]
            loss = F.cross_entropy(scores, answer[at], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    return epoch


def row_of(what: str, times: dict, steps: int, base: str, unit: str = "ms a step") -> dict:
    """Tell medians, and how much longer each takes than the first."""
    found = {"what": what}
    for name, one in times.items():
        found[f"{name}, {unit}"] = f"{1e3 * one.median_s / steps:.3g}"
    for name, one in times.items():
        if name != base:
            found[f"{name} / {base}"] = f"{ratio(one, times[base]):.2f}"
    return found


def steps_table(runs: int, steps: int, sizes: dict) -> list[dict]:
    try:
        import torch  # noqa: F401

        peer = True
    except ImportError:
        peer = False
    table = []
    for name, (batch, views, width, text) in sizes.items():
        tables, rows = data(400, views, width, text, steps * batch)
        model = match(MatchConfig(width, text))
        functions = {"ours": epoch_of(model, {}, tables, rows, batch)}
        if peer:
            functions["PyTorch"] = torch_epoch(tables, rows, batch)
        table.append(row_of(name, interleaved(functions, runs=runs), steps, "ours"))
    return table


def seeds_table(runs: int, steps: int, size: tuple) -> list[dict]:
    batch, views, width, text = size
    tables, rows = data(400, views, width, text, steps * batch)
    model = match(MatchConfig(width, text))
    together = epoch_of(model, {}, tables, rows, batch, seeds=5)
    singles = [epoch_of(model, {}, tables, rows, batch) for _ in range(5)]
    functions = {
        "5 seeds in one program": together,
        "one after another": lambda: [one() for one in singles],
    }
    times = interleaved(functions, runs=runs)
    return [row_of("MATCH, five seeds", times, steps, "5 seeds in one program")]


def adapters_table(runs: int, steps: int, batch: int, width: int, pixels: int) -> list[dict]:
    """Time DA4LG on a toy encoder of two matrices: what adapting costs beside reading features."""
    tables, rows = data(100, 8, width, width, steps * batch)
    rng = np.random.default_rng(1)
    raw = rng.normal(size=(100, 8, pixels)).astype(np.float32)
    names = {"q_proj": (width, pixels), "v_proj": (width, width)}
    vision = {
        name: {"weight": jnp.asarray(rng.normal(size=shape) / 30, jnp.float32)}
        for name, shape in names.items()
    }

    def encode(params, x):
        return linear(params["v_proj"], jnp.tanh(linear(params["q_proj"], x)))

    functions = {}
    for domain in ("frozen", "lora", "full"):
        model = da4lg(Da4lgConfig(width, width, domain), encode)
        seen = tables._replace(pixels=raw)
        functions[domain] = epoch_of(model, {"vision": vision}, seen, rows, batch)
    what = f"DA4LG, encoder {pixels} → {width} → {width}"
    return [row_of(what, interleaved(functions, runs=runs), steps, "frozen")]


def grid(side: int) -> object:
    """Make a hilly sheet of 2 · side² triangles."""
    from jaxsys.ground.mesh import Mesh

    x, z = np.meshgrid(*[np.linspace(-1, 1, side + 1)] * 2)
    points = np.stack([x, 0.3 * np.sin(5 * x) * np.cos(4 * z), z], -1).astype(np.float32)
    a, b, c, d = points[:-1, :-1], points[1:, :-1], points[1:, 1:], points[:-1, 1:]
    faces = np.concatenate([np.stack([a, b, c], 2), np.stack([a, c, d], 2)]).reshape(-1, 3, 3)
    n = len(faces)
    colours = np.array([[0.6, 0.4, 0.2, 1.0]], np.float32)
    flat = np.zeros((n, 3, 2), np.float32)
    return Mesh(faces, flat, np.zeros(n, np.int32), colours, (None,))


def render_table(runs: int, sizes: tuple[int, ...], sides: tuple[int, ...]) -> list[dict]:
    scenes = scene.stack([scene.toy(name) for name in scene.TOYS[:8]])
    functions = {
        f"toys, {size} px": partial(scene.render_views, scenes, size=size) for size in sizes
    }
    views = dict.fromkeys(functions, 8 * 8)
    try:
        from jaxsys.ground.render import RenderConfig, render

        for side in sides:
            name = f"mesh of {2 * side * side} faces, {max(sizes)} px"
            functions[name] = partial(render, grid(side), RenderConfig(size=max(sizes)))
            views[name] = 8
        times = interleaved(functions, runs=runs, warmup=1)
    except UserError as error:
        print(f"meshes are not drawn: {error}")
        functions = {name: f for name, f in functions.items() if name.startswith("toys")}
        times = interleaved(functions, runs=runs, warmup=1)
    return [
        {
            "what": name,
            "ms a view": f"{1e3 * one.median_s / views[name]:.3g}",
            "interval": "[" + ", ".join(f"{1e3 * x / views[name]:.3g}" for x in one.ci_s) + "]",
        }
        for name, one in times.items()
    ]


PARTS: dict[str, Callable[[int], list[dict]]] = {
    "Steps of MATCH": lambda runs: steps_table(runs, 20, SIZES),
    "Seeds side by side": lambda runs: seeds_table(runs, 20, next(iter(SIZES.values()))),
    "Adapters": lambda runs: adapters_table(runs, 10, 64, 512, 768),
    "Rendering": lambda runs: render_table(runs, (32, 64, 160), (15, 45, 140)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nothing is written")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    args = parser.parse_args()
    if args.smoke:
        print(markdown_table(steps_table(1, 2, {"tiny": (4, 2, 8, 8)})))
        print(markdown_table(render_table(1, (8,), (2,))))
        return
    file = RESULTS / "throughput.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    for name in args.parts:
        table = PARTS[name](args.runs)
        found[name] = {"machine": str(machine(devices=True)), "rounds": args.runs, "rows": table}
    text = (
        "# Throughput of grounding\n\nMedians of rounds in turns; ratios with the 95 % bootstrap "
    )
    text += "interval of the rounds' ratios. Times are of a shared machine.\n"
    for name in (name for name in PARTS if name in found):
        one = found[name]
        text += f"\n## {name}\n\n{markdown_table(one['rows'])}"
        text += f"\n{one['machine']}; {one['rounds']} rounds.\n"
    atomic_write(file.with_suffix(".md"), text)
    atomic_write(file, json.dumps(found, ensure_ascii=False, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
