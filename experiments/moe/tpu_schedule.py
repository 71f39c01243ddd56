"""How many all-to-alls a TPU's compiler lets run behind the experts' products; no TPU needed.

    pip install 'jaxsys[tpu]'                          libtpu, which compiles for absent devices
    python experiments/moe/tpu_schedule.py             about 4 minutes idle
    python experiments/moe/tpu_schedule.py --smoke     one small program, no files

A pipelined layer (`jaxsys.moe.pipelined`: forward and backward pass; 4 expert ranks × 2 tensor
ranks) is compiled ahead of time for a described slice, and the text of the scheduled program read:
an all-to-all counts as hidden if it has a start and a done of its own and a matrix product is
scheduled between them. Three settings: the compiler's defaults; ours (asynchronous all-to-alls,
`jaxsys.core.mesh.separate_collectives`); ours with a barrier between chunks, a control in which
nothing can overlap with another chunk.

This is the compiler's schedule, not a time: nothing ran.

Rows found in `results/tpu_schedule.jsonl` are not compiled again.

Expected: no all-to-all is asynchronous by default; with the setting most are, and about half or
more of those of a pipelined layer have products between; none is lost to combining.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import argparse
import importlib.util
import json
import re
import time
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsys.core.mesh import separate_collectives
from jaxsys.core.report import append_jsonl, atomic_write, format_bytes, markdown_table
from jaxsys.moe.contract import Axes, Dims, Gate, LayerPlan, MoESpec, Order
from jaxsys.moe.dispatch import TRANSPORTS
from jaxsys.moe.experts import swiglu
from jaxsys.moe.pipelined import pipelined
from jaxsys.moe.sharding import expert_specs

RESULTS = Path(__file__).parent / "results"
AXES = Axes(expert="expert", tensor="tensor")
SLICES = ("v5p:2x2x2", "v5e:2x4")
COLLECTIVES = ("all-to-all", "all-gather", "reduce-scatter")


class Seen(NamedTuple):
    """Count the collectives of one kind in a compiled program."""

    total: int
    asynchronous: int
    hidden: int


def compiled(
    mesh: Mesh, plan: LayerPlan, dims: Dims, slots: int, options: Any, serial: bool
) -> Any:
    """Compile a layer's forward and backward pass for a mesh of absent devices."""
    flat = TRANSPORTS["flat"]
    spec = MoESpec(Gate(None, None, 2), Order(None, None), swiglu(), flat.dispatch, flat.combine)
    params = jax.eval_shape(lambda: spec.experts.init(jax.random.key(0), dims))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    specs = expert_specs(params, spec.experts, AXES)
    rows = P(None, ("expert", "tensor"))

    def step(params: Any, buffer: jax.Array, dy: jax.Array) -> Any:
        run = lambda p, b: pipelined(p, b, spec, plan, AXES, serial=serial)  # noqa: E731
        y, pull = jax.vjp(run, params, buffer)
        return y, *pull(dy)

    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(specs, rows, rows), out_specs=(rows, specs, rows)
    )

    def placed(x: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    buffer = jax.ShapeDtypeStruct((dims.experts, slots * mesh.size, dims.width), jnp.bfloat16)
    given = (jax.tree.map(placed, params, specs), placed(buffer, rows), placed(buffer, rows))
    return jax.jit(mapped, compiler_options=options).lower(*given).compile()


def computations(text: str) -> dict[str, list[str]]:
    """Split a module's text into its computations' instructions."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        head = re.match(r"\s*(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if head and " = " not in line:
            current = found.setdefault(("ENTRY" if "ENTRY" in line else head.group(1)), [])
        elif " = " in line:
            current.append(line.strip())
    return found


def read(text: str) -> dict[str, Seen]:
    """Count collectives, those that are asynchronous, and those with products in between."""
    parts = computations(text)

    def calls(line: str) -> str:
        found = re.search(r"calls=%?([\w.\-]+)", line)
        return found.group(1) if found else ""

    def multiplies(line: str) -> bool:
        product = re.compile(r" (convolution|dot)\(")
        return bool(product.search(line)) or any(map(product.search, parts.get(calls(line), [])))

    entry = parts["ENTRY"]
    result = {}
    for kind in COLLECTIVES:
        begun: dict[str, int] = {}
        total = asynchronous = hidden = 0
        for place, line in enumerate(entry):
            name = re.match(r"(?:ROOT )?%?([\w.\-]+) = ", line)
            body = line[name.end() :] if name else ""
            if re.search(rf" {kind}\(", body):
                total += 1
            elif re.search(rf" {kind}-start\(", body) or (
                " async-start(" in body
                and any(f" {kind}(" in inner for inner in parts.get(calls(line), []))
            ):
                assert name is not None
                begun[name.group(1)] = place
                total, asynchronous = total + 1, asynchronous + 1
            elif re.search(r" (\S+-done)\(", body):
                for operand in set(re.findall(r"[\w.\-]+", body)) & set(begun):
                    between = entry[begun.pop(operand) + 1 : place]
                    hidden += any(map(multiplies, between))
        result[kind] = Seen(total, asynchronous, hidden)
    return result


def study(
    slices: Any,
    degrees: tuple[int, ...],
    dims: Dims,
    slots: int,
    rows: list[dict[str, Any]],
    on_row: Any = lambda _: None,
) -> None:
    """Compile every slice, setting and degree that the rows lack; count."""
    from jax.experimental import topologies

    for name in slices:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
        mesh = Mesh(
            np.array(devices).reshape(4, 2), ("expert", "tensor"), axis_types=(AxisType.Auto,) * 2
        )
        ours = separate_collectives(mesh)
        settings = {"ours": (ours, False), "defaults": (None, False)}
        settings["ours, barriers"] = (ours, True)
        for r in degrees:
            for setting, (options, serial) in settings.items():
                row: dict[str, Any] = {"slice": name, "settings": setting, "degrees": f"{r}/{r}"}
                if any(row.items() <= done.items() for done in rows):
                    continue
                begin = time.perf_counter()
                program = compiled(mesh, LayerPlan(r, r), dims, slots, options, serial)
                for kind, (total, asynchronous, hidden) in read(program.as_text()).items():
                    row[kind] = f"{hidden} of {total} ({asynchronous} async)"
                row["peak memory"] = format_bytes(program.memory_analysis().peak_memory_in_bytes)
                row["compile, s"] = round(time.perf_counter() - begin, 1)
                rows.append(row)
                print(row, flush=True)
                on_row(row)


def main() -> None:
    """Compile, count, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    smoke = parser.parse_args().smoke
    if importlib.util.find_spec("libtpu") is None:
        print("libtpu is missing; pip install 'jaxsys[tpu]' brings it; nothing was compiled")
        return
    if smoke:
        study(("v5e:2x4",), (2,), Dims(256, 512, 8), 64, [])
        return
    dims, slots = Dims(width=512, hidden=1024, experts=8), 256
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "libtpu"))
    text = (
        "# All-to-alls behind products in a TPU's compiled schedule\n\n"
        f"{versions}. A layer of {dims.experts} SwiGLU experts, D {dims.width}, F {dims.hidden}, "
        f"{slots} slots per expert and rank, bfloat16, forward and backward; 4 expert × 2 tensor "
        "ranks. `3 of 4 (4 async)`: of four operations all are asynchronous and three have a "
        "matrix product between start and done. Compiled ahead of time; nothing ran.\n\n"
    )

    log = RESULTS / "tpu_schedule.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    rows = [json.loads(line) for line in lines]

    def write(row: dict[str, Any]) -> None:
        append_jsonl(log, row)
        atomic_write(RESULTS / "tpu_schedule.md", text + markdown_table(rows))

    study(SLICES, (4, 1), dims, slots, rows, write)


if __name__ == "__main__":
    main()
