"""Run a model whose file is larger than the memory allowed, and hold peak memory against the plan.

    python experiments/offload/memory.py            about 4 minutes on 2 cores, 3 GB of disk
    python experiments/offload/memory.py --smoke    half a minute: a tiny model, nothing written

A random Mixtral is written in float32 and run by processes of their own:

- `limited`: in a memory control group (version 1, so this needs root) whose limit is about half the
  file. Mapped pages count as the group's, and the kernel takes them back when room is short; the
  tokens must be those of the run without a limit. `copied` reads the whole file into arrays under
  the same limit and is expected to be ended by the kernel.
- `free`: without a limit. The growth of resident memory, mapped pages included, is held against
  what the plan says of the host.
- `half`: two virtual devices, half the weights on the accelerator, buffers and caches as planned.
  What lives on the accelerator at most (after every step, with the ring's peak) is held against the
  plan. Temporary arrays of the compiled programs are compared with the planned workspace on their
  own, for live arrays do not show them.

Expected: the limited run ends with the same tokens below its limit; the rest within 5 %.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from jaxsys.core.measure import machine
from jaxsys.core.report import atomic_write, format_bytes, markdown_table, to_json

RESULTS = Path(__file__).parent / "results"
GROUPS = Path("/sys/fs/cgroup/memory")
SHAPE = {
    "model_type": "mixtral", "vocab_size": 2048, "hidden_size": 1024, "intermediate_size": 3584,
    "num_hidden_layers": 5, "num_attention_heads": 16, "num_key_value_heads": 4,
    "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 256,
}  # fmt: skip
PROMPT, NEW, SLOTS = list(range(5, 29)), 8, 64


def status(name: str) -> int:
    """Read a line of this process's status, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def child(folder: Path, mode: str) -> dict[str, Any]:
    """Run the model one way; in the limited modes this process is in the group already."""
    import jax
    import numpy as np

    from jaxsys.models import lm
    from jaxsys.offload.engine import forward, init_state, make_engine
    from jaxsys.offload.generate import generate
    from jaxsys.offload.load import open_model, place_model
    from jaxsys.offload.monitor import device_bytes
    from jaxsys.offload.parts import cache_bytes, parts_of, workspace_bytes
    from jaxsys.offload.place import cpu_plan, find_devices
    from jaxsys.offload.types import Plan

    if mode == "copied":
        params, _ = lm.load(folder)
        kept = [np.array(leaf) for leaf in jax.tree.leaves(params)]
        return {"held": sum(leaf.nbytes for leaf in kept)}
    config, _, _ = open_model(folder)
    parts = parts_of(config)
    kept = cache_bytes(config, SLOTS)
    if mode != "half":
        devices, plan = find_devices("none"), cpu_plan(parts)
        plan = Plan(parts, plan.resident, plan.stream, plan.cache_on, cache_bytes=kept)
        _warm(config)
        before = status("VmRSS")
        engine = make_engine(place_model(folder, plan, devices))
        found = generate(engine, [PROMPT], max_tokens=NEW)
        return {
            "tokens": found.tokens[0], "grown": status("VmHWM") - before,
            "anonymous": status("RssAnon"), "planned": plan.host_bytes,
            "mapped": engine.placed.mapped_bytes, "copied": engine.placed.copied_bytes,
        }  # fmt: skip
    devices = find_devices("virtual")
    largest = max(part.n_bytes for part in parts if part.columns) // 4
    plan = Plan(
        parts, tuple(part.columns // 2 if part.columns else 1 for part in parts),
        tuple(part.columns // 4 for part in parts), ("accelerator",) * config.layers,
        cache_bytes=kept, buffer_bytes=2 * largest,
        workspace_bytes=workspace_bytes(config, len(PROMPT), SLOTS),
    )  # fmt: skip
    engine = make_engine(place_model(folder, plan, devices))
    state, tokens, live = init_state(engine.placed, 1, SLOTS), [], 0
    ids = np.array([PROMPT], np.int32)
    for _ in range(NEW):
        logits, state = forward(engine, state, ids)
        ids = np.asarray(logits).argmax(-1)[None].astype(np.int32)
        tokens.append(int(ids[0, 0]))
        live = max(live, device_bytes(devices.accelerator))
    x = np.zeros((len(PROMPT), config.width), np.float32)
    layer = engine.placed.layers[0]
    args = (layer.half.weights, x, state.stores[0], np.zeros(1, np.int32), np.int32(0), 0)
    spent = [engine.programs.half.lower(*args).compile().memory_analysis()]
    piece = layer.ffn[0][0].weights
    compiled = engine.programs.piece.lower(x, piece, x, None, np.ones(len(x), np.float32)).compile()
    spent.append(compiled.memory_analysis())
    held = [s.temp_size_in_bytes + s.output_size_in_bytes - s.alias_size_in_bytes for s in spent]
    return {
        "tokens": tokens, "live": live, "ring": engine.ring.peak_bytes,
        "resident": plan.resident_bytes, "caches": kept * config.layers,
        "buffers": plan.buffer_bytes, "workspace": plan.workspace_bytes, "temporary": max(held),
        "planned": plan.accelerator_bytes,
    }  # fmt: skip


def _warm(config: Any) -> None:
    """Run a small model of the same form, so that the compiler's own memory is there already."""
    from dataclasses import replace

    import jax

    from jaxsys.models import lm
    from jaxsys.offload.engine import make_engine
    from jaxsys.offload.generate import generate
    from jaxsys.offload.load import place_model
    from jaxsys.offload.parts import parts_of
    from jaxsys.offload.place import cpu_plan, find_devices

    small = replace(config, width=64, expert_width=64, ffn_width=64, heads=2, kv_heads=2)
    plan = cpu_plan(parts_of(small))
    own = lm.init(jax.random.key(0), small)
    engine = make_engine(place_model(own, plan, find_devices("none"), config=small))
    generate(engine, [PROMPT], max_tokens=NEW)


def run(folder: Path, mode: str, limit: int = 0) -> dict[str, Any]:
    """Start a child, in a group of its own where there is a limit."""
    group = GROUPS / f"jaxsys_{os.getpid()}_{mode}" if limit else None
    if group:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit))

    command = [sys.executable, __file__, "--child", mode, "--work", str(folder)]
    if group:  # the shell enters the group before it becomes the child
        enter = f'echo $$ > {group / "cgroup.procs"} && exec "$@"'
        command = ["sh", "-c", enter, "sh", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found: dict[str, Any] = {"mode": mode, "status": done.returncode}
    if done.returncode == 0:
        found |= json.loads(done.stdout.splitlines()[-1])
    else:
        print(done.stderr[-2000:], file=sys.stderr)
    if group:
        found["limit"] = limit
        found["peak"] = int((group / "memory.max_usage_in_bytes").read_text())
        group.rmdir()
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Run a model larger than memory.")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--child", choices=("limited", "copied", "free", "half"))
    parser.add_argument("--smoke", action="store_true", help="a tiny model, nothing written")
    given = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if given.child:
        print(json.dumps(child(given.work, given.child)))
        return
    import jax

    from jaxsys.models import lm

    shape = SHAPE | ({"intermediate_size": 64, "hidden_size": 64} if given.smoke else {})
    with tempfile.TemporaryDirectory(dir=given.work) as scratch:
        folder, config = Path(scratch) / "model", lm.config_from_hf(shape)
        lm.save(folder, lm.init(jax.random.key(0), config), config)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        limit = max(size // 2, 600 << 20)
        rows = {mode: run(folder, mode) for mode in ("free", "half")}
        if os.access(GROUPS / "cgroup.procs", os.W_OK):
            rows |= {mode: run(folder, mode, limit) for mode in ("limited", "copied")}
    text = report(size, rows)
    print(text)
    if not given.smoke:
        atomic_write(RESULTS / "memory.md", text)
        atomic_write(RESULTS / "memory.json", to_json({"file_bytes": size, "runs": rows}) + "\n")


def report(size: int, rows: dict[str, dict[str, Any]]) -> str:
    """Lay out what was found."""
    free, half = rows["free"], rows["half"]
    live = half["live"] - half["resident"] - half["caches"]
    table = [
        _row("host: growth of resident memory", free["planned"], free["grown"]),
        _row("accelerator: weights", half["resident"], half["live"] - half["caches"] - live),
        _row("accelerator: transfer buffers", half["buffers"], half["ring"]),
        _row("accelerator: weights, caches, buffers", half["planned"] - half["workspace"],
             half["resident"] + half["caches"] + half["ring"]),
        _row("accelerator: live arrays after a step", half["planned"] - half["workspace"],
             half["live"]),
        _row("accelerator: workspace (temporaries of one program)", half["workspace"],
             half["temporary"]),
    ]  # fmt: skip
    lines = [
        f"# Memory\n\n{machine()}. A random Mixtral form in float32, its file "
        f"{format_bytes(size)}; a prompt of {len(PROMPT)} tokens and {NEW} new ones.\n",
    ]
    if "limited" in rows:
        small, whole = rows["limited"], rows["copied"]
        same = small.get("tokens") == free["tokens"] == half["tokens"]
        lines.append(
            f"Limit {format_bytes(small['limit'])}: the run from the mapped file ended with status "
            f"{small['status']} at a peak of {format_bytes(small['peak'])} (pages of the file and "
            f"{format_bytes(small.get('anonymous', 0))} of its own); its tokens are "
            f"{'those' if same else 'NOT those'} of the runs without a limit, on the CPU and with "
            f"half the weights on an accelerator. The run that copies the file ended with status "
            f"{whole['status']} (-9: ended by the kernel).\n"
        )
    lines.append(
        f"The CPU's run holds {format_bytes(free['mapped'])} of weights as views of the file and "
        f"{format_bytes(free['copied'])} as copies.\n"
    )
    return "\n".join(lines) + "\n" + markdown_table(table)


def _row(what: str, planned: int, found: int) -> dict[str, str]:
    return {
        "what": what, "planned": format_bytes(planned), "measured": format_bytes(found),
        "measured / planned": f"{found / planned:.3f}" if planned else "",
    }  # fmt: skip


if __name__ == "__main__":
    main()
