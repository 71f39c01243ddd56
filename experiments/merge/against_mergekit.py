"""Hold merges against mergekit: the same tensors, and how fast and in how much memory.

    python experiments/merge/against_mergekit.py --peers-python PATH     about 12 minutes, 2 cores
    python experiments/merge/against_mergekit.py --smoke                 seconds, no peer, no files

PATH is a Python that has mergekit. Without it, and without --smoke, `python -m venv` makes one
under --work and pip installs mergekit with torch there. Everything large lies under --work (about
6 GB at the largest size).

(a) Equality: one YAML recipe for each method, the same models in float32 and bfloat16, our result
beside mergekit's. mergekit computes in the models' type, jaxsys in float32 with one rounding at the
end; so bfloat16 models are merged by mergekit once more with ``dtype: float32``, which shows how
much of the difference is that. Methods that draw are compared by what they promise: the share of
entries that moved, and the summed magnitude of what was added.

(b) Speed: fresh processes in turns, timed from the first tensor to the last file, imports left
out, compilation left in. jaxsys forces its files to the disk (fsync); mergekit does not, so its
files are forced after its run and both times are shown. The floor reads and writes the same bytes
with nothing between. Models lie in the page cache for all three.

Aimed at: float32 equal to rounding for every method that draws nothing (so it is, but for
arcee_fusion); 3 times mergekit's speed for TIES and DARE and 1.5 times for linear (TIES at every
size, the others at the largest only); peak memory at most (models + 2) times the largest tensor
plus 300 MB (at every size).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxsys.core.checkpoint import read_safetensors, write_safetensors
from jaxsys.core.errors import UserError
from jaxsys.core.measure import machine
from jaxsys.core.report import atomic_write, format_bytes, markdown_table, to_json
from jaxsys.models import lm
from jaxsys.models.lm.families import config_to_hf

RESULTS = Path(__file__).parent / "results"
NAMES = ("base", "a", "b", "c")
# method: (models beside the base, base in the recipe, recipe's parameters)
METHODS = {
    "linear": (3, False, "weight: 0.4"),
    "task_arithmetic": (3, True, "weight: 0.4, lambda: 0.7"),
    "ties": (3, True, "weight: 0.4, density: 0.3"),
    "dare_linear": (3, True, "weight: 0.4, density: 0.5"),
    "dare_ties": (3, True, "weight: 0.4, density: 0.5"),
    "della": (3, True, "weight: 0.4, density: 0.5, epsilon: 0.2"),
    "della_linear": (3, True, "weight: 0.4, density: 0.5, epsilon: 0.2"),
    "breadcrumbs": (3, True, "weight: 0.4, density: 0.7, gamma: 0.05"),
    "breadcrumbs_ties": (3, True, "weight: 0.4, density: 0.7, gamma: 0.05"),
    "slerp": (1, True, "t: 0.3"),
    "nuslerp": (2, False, "weight: 0.4"),
    "multislerp": (3, True, "weight: 0.4"),
    "karcher": (3, False, ""),
    "model_stock": (3, True, ""),
    "sce": (3, True, "select_topk: 0.4"),
    "arcee_fusion": (1, True, ""),
    "nearswap": (1, True, "t: 0.001"),
    "ram": (3, True, "epsilon: 0.001"),
    "ramplus_tl": (3, True, "epsilon: 0.001"),
    "passthrough": (1, False, "scale: 0.5"),
}
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
SPEED = ("linear", "ties", "dare_ties", "slerp", "breadcrumbs", "della", "model_stock")
# bytes of one bfloat16 model: width, feed-forward width, layers, vocabulary
SIZES = {
    "74 MB": (512, 1536, 6, 16_000),
    "271 MB": (1024, 2816, 8, 16_000),
    "551 MB": (1536, 4096, 8, 16_000),
}
TINY = (32, 48, 2, 128)

OURS = """
import json, sys, time, resource
import jax
from jaxsys.merge.files import merge_files
from jaxsys.merge.recipe_parse import read_recipe
found = []
for job in json.load(sys.stdin):
    start = time.perf_counter()
    merged = merge_files(read_recipe(job["recipe"]), job["out"], key=jax.random.key(job["seed"]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    found.append({"s": time.perf_counter() - start, "peak": peak,
                  "predicted": merged.budget.peak_bytes})
print(json.dumps(found))
"""
PEER = """
import json, os, sys, time, resource, importlib.metadata as meta
import torch, yaml
from pathlib import Path
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
found = []
for job in json.load(sys.stdin):
    config = MergeConfiguration.model_validate(yaml.safe_load(Path(job["recipe"]).read_text()))
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True,
                           random_seed=job["seed"])
    start = time.perf_counter()
    try:
        run_merge(config, job["out"], options=options)
    except Exception as error:
        found.append({"error": f"{type(error).__name__}: {error}"[:200]})
        continue
    taken = time.perf_counter() - start
    for file in Path(job["out"]).glob("*.safetensors"):
        handle = os.open(file, os.O_RDWR)
        os.fsync(handle)
        os.close(handle)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    found.append({"s": taken, "synced": time.perf_counter() - start, "peak": peak})
versions = {name: meta.version(name) for name in ("mergekit", "torch", "transformers")}
print("\\n" + json.dumps({"jobs": found, "versions": versions}))
"""
FLOOR = """
import json, os, sys, time
from pathlib import Path
[job] = json.load(sys.stdin)
buffer = bytearray(8 << 20)
start = time.perf_counter()
out = os.open(job["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
for i, name in enumerate(job["inputs"]):
    with open(name, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            if i == 0:
                os.write(out, memoryview(buffer)[:count])
written = time.perf_counter() - start
os.fsync(out)
print(json.dumps({"s": written, "synced": time.perf_counter() - start}))
"""


def make_family(folder, shape, dtype, seed=0):
    """Write a base and three models around it, in random weights."""
    width, ffn, layers, vocab = shape
    heads = max(1, width // 64)
    config = lm.LMConfig("llama", vocab, width, layers, heads, heads, width // heads, ffn, 2048)
    rng = np.random.default_rng(seed)
    shapes = {path: leaf.shape for path, leaf in lm.shapes(config).items()}
    specs = {n: np.broadcast_to(np.zeros((), dtype), s) for n, s in shapes.items()}
    for name in NAMES:
        out = folder / name

        def produce(tensor, name=name):
            # One base for all: its own generator for each tensor.
            own = np.random.default_rng([seed, len(tensor), sum(tensor.encode())])
            value = own.standard_normal(shapes[tensor], np.float32) * np.float32(0.02)
            if name != "base":
                value += rng.standard_normal(shapes[tensor], np.float32) * np.float32(0.002)
            return value.astype(dtype)

        write_safetensors(out, specs, produce)
        text = json.dumps(config_to_hf(config) | {"torch_dtype": str(np.dtype(dtype))})
        atomic_write(out / "config.json", text)


def write_recipe(path, family, method, extra=""):
    """Write the recipe of a method over a family."""
    count, with_base, parameters = METHODS[method]
    models = [*NAMES[1 : count + 1]]
    if method in ("slerp", "arcee_fusion", "nearswap"):
        models = ["base", *models]
    lines = [f"merge_method: {method}", "models:", *(f"  - model: {family / m}" for m in models)]
    lines += [f"base_model: {family / 'base'}"] if with_base else []
    lines += [f"parameters: {{{parameters}}}"] if parameters else []
    path.write_text("\n".join([*lines, extra]) + "\n")
    return path


def run_ours(jobs):
    """Run jobs in one fresh process of this Python."""
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", OURS],
        input=json.dumps(jobs),
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(f"our side failed: {done.stderr[-800:]}")
    return json.loads(done.stdout)


def run_peer(python, jobs):
    """Run jobs in one fresh process of the Python that has mergekit."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run(
        [python, "-c", PEER], input=json.dumps(jobs), env=env, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"mergekit's side failed: {done.stderr[-800:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(ours, theirs, base):
    """Compare two results tensor by tensor, in float64."""
    a, b, base = (read_safetensors(folder) for folder in (ours, theirs, base))
    worst, equal, total, where = 0.0, 0, 0, ""
    moved = [0, 0]
    added = [0.0, 0.0]
    for name, x in a.items():
        y, zero = b[name].astype(np.float64), base[name].astype(np.float64)
        x = x.astype(np.float64)
        gap = float(np.max(np.abs(x - y)))
        if gap >= worst:
            worst, where = gap, name
        equal += int((x == y).sum())
        total += x.size
        for i, side in enumerate((x, y)):
            moved[i] += int((side != zero).sum())
            added[i] += float(np.abs(side - zero).sum())
    return {
        "worst": worst,
        "where": where,
        "equal": equal / total,
        "moved": [m / total for m in moved],
        "added": [s / total for s in added],
    }


def equality(python, work):
    """Merge one small family by every method on both sides."""
    rows, versions = [], {}
    variants = (("float32", "", np.float32), ("bfloat16", "", ml_dtypes.bfloat16))
    for kind, extra, dtype in (
        *variants,
        ("bfloat16, mergekit in float32", "dtype: float32\nout_dtype: bfloat16", None),
    ):
        family = work / ("equal-" + kind.split(",")[0])
        if dtype is not None:
            make_family(family, (64, 160, 2, 256), np.dtype(dtype))
        jobs = []
        for method in METHODS:
            recipe = write_recipe(work / f"{method}.yaml", family, method, extra)
            jobs.append({"recipe": str(recipe), "seed": 0})
        ours = [job | {"out": str(work / "ours" / Path(job["recipe"]).stem)} for job in jobs]
        theirs = [job | {"out": str(work / "theirs" / Path(job["recipe"]).stem)} for job in jobs]
        run_ours(ours)
        found = run_peer(python, theirs)
        versions = found["versions"]
        for method, mine, job, told in zip(METHODS, ours, theirs, found["jobs"], strict=True):
            row = {"inputs": kind, "method": method}
            if "error" in told:
                rows.append(row | {"error": told["error"]})
                continue
            rows.append(row | compare(mine["out"], job["out"], family / "base"))
        for folder in ("ours", "theirs"):
            shutil.rmtree(work / folder)
    return rows, versions


def equality_table(rows):
    """Lay the comparison out, one row for each method and type."""
    laid = []
    for row in rows:
        line = {"models": row["inputs"], "method": row["method"]}
        if "error" in row:
            laid.append(line | {"largest difference": f"mergekit: {row['error']}"})
            continue
        if row["method"] in RANDOM:
            line["largest difference"] = "drawn"
        else:
            line["largest difference"] = f"{row['worst']:.1e}"
            line["equal entries"] = f"{row['equal']:.2%}"
        line["moved (ours, mergekit)"] = " ".join(f"{m:.4f}" for m in row["moved"])
        line["mean added"] = " ".join(f"{m:.6f}" for m in row["added"])
        laid.append(line)
    return markdown_table(laid)


def speed(python, work, sizes, methods, runs, save):
    """Time both sides and the floor in turns; give each row to `save` when it is there."""
    rows = []
    for label, shape in sizes.items():
        family = work / f"speed-{label.replace(' ', '')}"
        if not (family / NAMES[-1] / "config.json").exists():
            make_family(family, shape, np.dtype(ml_dtypes.bfloat16))
        tensors = read_safetensors(family / "base")
        parameters = sum(x.size for x in tensors.values())
        largest = max(x.size for x in tensors.values())
        for method in methods:
            recipe = write_recipe(work / f"{method}.yaml", family, method)
            count = METHODS[method][0] + METHODS[method][1]
            inputs = [str(family / n / "model.safetensors") for n in NAMES[:count]]
            job = {"recipe": str(recipe), "seed": 0}
            taken = {"ours": [], "peer": [], "floor": []}
            for _ in range(runs):
                for side in taken:
                    out = work / f"out-{side}"
                    if side == "floor":
                        out.mkdir(exist_ok=True)
                        told = [{"inputs": inputs, "out": str(out / "copy")}]
                        code = [sys.executable, "-c", FLOOR]
                        done = subprocess.run(
                            code, input=json.dumps(told), capture_output=True, text=True, check=True
                        )
                        taken[side].append(json.loads(done.stdout))
                    elif side == "ours":
                        taken[side] += run_ours([job | {"out": str(out)}])
                    elif python:
                        taken[side] += run_peer(python, [job | {"out": str(out)}])["jobs"]
                    shutil.rmtree(out, ignore_errors=True)
            n_bytes = 2 * parameters * (count + 1)
            bound = (count + 2) * 2 * int(largest) + 300e6
            rows.append(speed_row(label, method, taken, n_bytes, bound))
            print(markdown_table([rows[-1]]), flush=True)
            save(rows[-1])
    return rows


def speed_row(label, method, taken, n_bytes, bound):
    """Summarise the runs of one method at one size."""

    def middle(side, key):
        return statistics.median(run[key] for run in taken[side])

    ours, floor = middle("ours", "s"), middle("floor", "synced")
    row = {
        "model": label,
        "method": method,
        "runs": len(taken["ours"]),
        "jaxsys s": f"{ours:.2f}",
        "GB/s": f"{n_bytes / ours / 1e9:.2f}",
        "floor s": f"{floor:.2f}",
        "share of floor": f"{floor / ours:.0%}",
        "peak": format_bytes(max(run["peak"] for run in taken["ours"])),
        "bound": format_bytes(bound),
    }
    sound = taken["peer"] and all("s" in run for run in taken["peer"])
    if sound:
        ratios = sorted(p["s"] / o["s"] for p, o in zip(taken["peer"], taken["ours"], strict=True))
        synced = statistics.median(
            p["synced"] / o["s"] for p, o in zip(taken["peer"], taken["ours"], strict=True)
        )
        row |= {
            "mergekit s": f"{middle('peer', 's'):.2f}",
            "with fsync": f"{middle('peer', 'synced'):.2f}",
            "times as fast": f"{statistics.median(ratios):.1f} ({ratios[0]:.1f}–{ratios[-1]:.1f})",
            "both fsynced": f"{synced:.1f}",
            "mergekit peak": format_bytes(max(run["peak"] for run in taken["peer"])),
        }
    return row


def make_peer(work):
    """Make a virtual environment with mergekit."""
    folder = work / "mergekit-env"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for packages in (["torch", "numpy"], ["mergekit"]):
            subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
    return str(python)


def main():
    """Run both parts and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers-python", help="a Python that has mergekit")
    parser.add_argument("--work", type=Path, help="folder for models and results")
    parser.add_argument("--part", choices=("both", "equality", "speed"), default="both")
    parser.add_argument("--sizes", nargs="*", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(SPEED))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--families", action="store_true", help="only write the models of (b)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, our side alone")
    options = parser.parse_args()
    work = Path(options.work or tempfile.mkdtemp(prefix="against-mergekit-"))
    work.mkdir(parents=True, exist_ok=True)
    if options.smoke:
        rows = speed(None, work, {"tiny": TINY}, ("linear", "ties"), 1, print)
        shutil.rmtree(work)
        return {"speed": rows}
    sizes = {label: SIZES[label] for label in options.sizes}
    if options.families:
        return speed(None, work, sizes, (), 1, print)
    python = options.peers_python or make_peer(work)
    record = RESULTS / "against_mergekit.json"
    found = json.loads(record.read_text()) if record.exists() else {}
    if options.part != "speed":
        found["equality"], found["versions"] = equality(python, work)
        print(equality_table(found["equality"]))

    def save(row=None):
        if row is not None:
            new = (row["model"], row["method"])
            kept = [r for r in found.get("speed", []) if (r["model"], r["method"]) != new]
            order = [*SIZES]
            found["speed"] = sorted([*kept, row], key=lambda r: order.index(r["model"]))
            found["load"] = os.getloadavg()[0]
        found["machine"] = str(machine())
        found["date"] = time.strftime("%Y-%m-%d")
        atomic_write(record, to_json(found) + "\n")
        atomic_write(RESULTS / "against_mergekit.md", document(found))

    save()
    if options.part != "equality":
        speed(python, work, sizes, options.methods, options.runs, save)
    return found


WHY = """

What differs, and why:

- **bfloat16 models.** mergekit subtracts, multiplies and ranks in bfloat16 (linear and slerp
  apart); here everything is float32 and the result is rounded once. With `dtype: float32` on
  mergekit's side the difference goes, but for what follows.
- **ties, breadcrumbs, sce on bfloat16 models.** Differences of bfloat16 numbers are coarse, so
  many share the magnitude at the border. mergekit keeps as many of these as its sort puts first;
  here all of them stay, so the result does not depend on an order, and a little more than the
  density is kept.
- **linear on bfloat16 models.** Means of bfloat16 numbers often lie exactly between two of them;
  the last bit of the float32 sum then decides which one is taken (one unit in the last place).
- **arcee_fusion.** The importance holds a divergence that is the small difference of large sums,
  so entries at the threshold go either way with the rounding.
- **dare, della.** Other random numbers; the shares and sums agree.
"""


def document(found):
    """Lay everything out as Markdown."""
    versions = ", ".join(f"{k} {v}" for k, v in found.get("versions", {}).items())
    parts = [f"# Merging beside mergekit\n\n{found['machine']}; {versions}; {found['date']}\n"]
    if "equality" in found:
        parts.append(
            "## The same recipe on both sides\n\n" + equality_table(found["equality"]) + WHY
        )
    if "speed" in found:
        parts.append(
            "## Speed and memory, bfloat16, three models and a base\n\n"
            f"Load average at the end {found['load']:.1f}. Medians; in brackets least and most.\n\n"
            + markdown_table(found["speed"])
        )
    return "\n".join(parts)


if __name__ == "__main__":
    main()
