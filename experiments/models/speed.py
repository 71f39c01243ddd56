"""Compare prefill, decode and load times with transformers and llama.cpp, on CPU.

    python experiments/models/speed.py            about 12 minutes on 2 cores, idle
    python experiments/models/speed.py --smoke    about a minute: tiny models, nothing written

Needs the extras `parity` (transformers, torch) and `smollm2`; llama.cpp takes part if
llama-cpp-python is importable, transformers if it is. SmolLM2-135M (its 4-bit file turned into
float32 first) and a random Mixtral of 185.6 M parameters (51.4 M active) are written once as
Hugging Face folders and GGUF files and run by every engine from those. Engines live in processes of
their own and take turns in shuffled order; greedy tokens are compared. The floor is the time to
read the active weights once at the bandwidth of an f32 matrix-vector product, measured in the same
rounds.

Targets: decode at least 2 x transformers, at least llama.cpp in float32 and bfloat16, load time at
most a tenth of transformers'. In 8 bits there is no transformers on CPU, and jaxsys (one scale a
row) and llama.cpp (Q8_0) round differently, so their tokens may differ.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from speed_engines import write_gguf

from jaxsys.core.measure import machine, ratio, timing
from jaxsys.core.report import atomic_write, format_bytes, format_seconds, markdown_table, to_json
from jaxsys.core.tree import flatten
from jaxsys.models import lm

RESULTS = Path(__file__).parent / "results"
PROMPT, NEW = 64, 64
PRECISIONS = ("float32", "bfloat16", "int8")


def mixtral(**changes: Any) -> lm.LMConfig:
    """Give the Mixtral of the comparison, or a smaller one."""
    fields = {
        "model_type": "mixtral",
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 1792,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 2048,
    }
    return lm.config_from_hf(fields | changes)


def models(smoke: bool, seed: int) -> dict[str, tuple[Any, lm.LMConfig]]:
    """Make the models that are compared, in float32."""
    sparse = mixtral()
    if smoke:
        sparse = mixtral(hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    # Larger than customary weights, so that greedy choices are not near ties.
    random = jax.tree.map(lambda x: 2.0 * x, lm.init(jax.random.key(seed), sparse))
    if smoke:
        return {"Mixtral": (random, sparse)}
    smollm2 = lm.load(lm.find_model("smollm2"), dtype=jnp.float32)
    return {"SmolLM2-135M": smollm2, "Mixtral-185M": (random, sparse)}


def active_bytes(params: Any, config: lm.LMConfig, precision: str) -> int:
    """Count the bytes of weights that one token reads: of the experts, those that it visits."""
    width = {"float32": 4, "bfloat16": 2, "int8": 1}[precision]
    total = 0.0
    for path, x in flatten(params).items():
        share = config.experts_per_token / config.experts if ".experts." in path else 1.0
        if "embed_tokens" in path and not config.tied:
            share = 0.0
        total += share * x.size * width
    return round(total)


class Engine:
    """A process that runs one engine on one model and does what it is asked."""

    def __init__(self, name: str, folder: Path, precision: str, threads: int):
        self.name = name
        self.process = subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).with_name("speed_engines.py")),
                name,
                str(folder),
                precision,
                str(threads),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"},
        )

    def ask(self, **task: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def present(precision: str, ours: str = "jaxsys") -> tuple[str, ...]:
    """List the engines that can run here in a precision, ours first."""
    names = [ours]
    if precision != "int8" and all(importlib.util.find_spec(m) for m in ("torch", "transformers")):
        names.append("transformers")
    if importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("gguf"):
        names.append("llama.cpp")
    return tuple(names)


def measure(
    given, folder: Path, precision: str, prompt: list[int], ours: str = "jaxsys"
) -> dict[str, Any]:
    """Run all engines on one model in one precision, in turns."""
    engines = [Engine(name, folder, precision, given.threads) for name in present(precision, ours)]
    found = {e.name: {"load": [], "prefill": [], "decode": []} for e in engines}
    bandwidths, rng = [], np.random.default_rng(given.seed)
    try:
        for _ in range(given.loads):
            for i in rng.permutation(len(engines)):
                found[engines[i].name]["load"].append(engines[i].ask(do="load")["load_s"])
        for engine in engines:  # compiling, warming up
            found[engine.name]["tokens"] = engine.ask(do="run", prompt=prompt, new=NEW)["tokens"]
        for _ in range(given.rounds):
            found_b = engines[0].ask(do="bandwidth", bytes=given.bandwidth_bytes)
            bandwidths.append(found_b["bytes_per_s"])
            for i in rng.permutation(len(engines)):
                row = engines[i].ask(do="run", prompt=prompt, new=NEW)
                found[engines[i].name]["prefill"].append(row["prefill_s"])
                found[engines[i].name]["decode"].append(row["decode_s"])
    finally:
        for engine in engines:
            engine.close()
    return {"engines": found, "bandwidth": max(bandwidths)}


def rows_of(model: str, precision: str, found: dict[str, Any], n_bytes: int) -> list[dict]:
    """Lay one comparison out as rows of a table; × is that engine's time over ours, the first."""
    mine = next(iter(found["engines"]))
    ours, rows = found["engines"][mine], []
    floor_s = n_bytes / found["bandwidth"]
    for name, them in found["engines"].items():
        decode = timing(name, them["decode"])
        low, high = decode.ci_s
        steps = NEW - 2
        rate = steps / decode.median_s
        row = {
            "model": model,
            "precision": precision,
            "engine": name,
            "load": format_seconds(float(np.median(them["load"]))),
            "prefill tok/s": f"{PROMPT / np.median(them['prefill']):.0f}",
            "decode tok/s": f"{rate:.1f} [{steps / high:.1f}, {steps / low:.1f}]",
            "% of floor": f"{100 * floor_s * rate:.0f}",
            "same tokens": _same(them["tokens"], ours["tokens"]),
        }
        if name != mine:
            row["× decode"] = f"{ratio(decode, timing('', ours['decode'])):.2f}"
            prefill = ratio(timing("", them["prefill"]), timing("", ours["prefill"]))
            row["× prefill"] = f"{prefill:.2f}"
            row["× load"] = f"{np.median(them['load']) / np.median(ours['load']):.2g}"
        rows.append(row)
    return rows


def _same(a: list[int], b: list[int]) -> str:
    differ = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
    return f"{differ[0] if differ else len(b)} of {len(b)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare speed on CPU.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--loads", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="keep the models' files here")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, nothing written")
    given = parser.parse_args(argv)
    given.bandwidth_bytes = (1 << 24) if given.smoke else (1 << 29)
    if given.smoke:
        given.rounds, given.loads = 2, 1
    jax.config.update("jax_platforms", "cpu")
    rows, record = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for name, (params, config) in models(given.smoke, given.seed).items():
            rng = np.random.default_rng(given.seed)
            prompt = rng.integers(3, config.vocab_size, PROMPT).tolist()
            for precision in given.precisions:
                folder = (given.work or Path(scratch)) / f"{name}-{precision}"
                write_model(folder, params, config, precision)
                found = measure(given, folder, precision, prompt)
                n_bytes = active_bytes(params, config, precision)
                rows += rows_of(name, precision, found, n_bytes)
                record.append({"model": name, "precision": precision, "bytes": n_bytes, **found})
                print(markdown_table(rows[-len(found["engines"]) :]), file=sys.stderr, flush=True)
    text = report(given, rows, record)
    print(text)
    if not given.smoke:
        atomic_write(RESULTS / "speed.md", text)
        atomic_write(RESULTS / "speed.json", to_json(record) + "\n")


def write_model(folder: Path, params: Any, config: lm.LMConfig, precision: str) -> None:
    """Write what the engines read: a Hugging Face folder, and a GGUF file for llama.cpp."""
    dtype = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    if not (folder / "config.json").exists():
        lm.save(folder, params, config, dtype=dtype)
    if "llama.cpp" in present(precision) and not (folder / f"{precision}.gguf").exists():
        write_gguf(folder / f"{precision}.gguf", params, config, precision)


def report(given, rows: list[dict], record: list[dict]) -> str:
    """Write the table with what a reader needs to judge it."""
    names = ("torch", "transformers", "llama-cpp-python")
    versions = ", ".join(f"{name} {_version(name)}" for name in names)
    bandwidths = [row["bandwidth"] for row in record]
    reads = sorted({f"{r['model']} {r['precision']} {format_bytes(r['bytes'])}" for r in record})
    return (
        "# Prefill, decode and load on CPU\n\n"
        f"{machine(devices=True)}; {versions}; {given.threads} threads. Seed {given.seed}, "
        f"{given.rounds} interleaved rounds after one uncounted, {given.loads} loads; prompt of "
        f"{PROMPT} random tokens, {NEW} new ones, of which the last {NEW - 2} are timed as decode. "
        "Medians with bootstrap intervals; × is that engine's time over jaxsys', so above 1 jaxsys "
        "is faster; the files are in the page cache. Bandwidth of an f32 matrix-vector product in "
        f"the same rounds: {min(bandwidths) / 1e9:.1f} to {max(bandwidths) / 1e9:.1f} GB/s; the "
        f"floor is one reading of the active weights: {'; '.join(reads)}.\n\n"
        f"{markdown_table(rows)}"
    )


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    main()
