"""ALPS beside SparseGPT: is its lead real? Errors of single layers, more calibration, damping.

    python experiments/prune/solvers.py             about a minute on 2 idle cores
    python experiments/prune/solvers.py --smoke     a few layers, nothing written

Needs `JAXSYS_DATA`. stories260K at 50 %, texts as in `table.py`. First, for every layer by itself
(dense inputs): tr(ΔW H ΔWᵀ) / tr(W H Wᵀ) in float64, with the H that was pruned with and with that
of other text, of our two solvers and of the two transcriptions in plain NumPy float64 that the
tests use. Then the perplexity of the pruned model with more calibration text and other damping.

Expected: ALPS leaves the smaller error in every layer, in both implementations alike, on the text
it has seen and on other text; it keeps its lead in perplexity however much text there is.
"""

import argparse
import os
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from table import LENGTH, RESULTS, SEQUENCES, WINDOWS, texts

from jaxsys.core.errors import UserError
from jaxsys.core.measure import machine
from jaxsys.core.report import atomic_write, markdown_table
from jaxsys.core.tree import flatten, unflatten
from jaxsys.evaluate.open import open_model
from jaxsys.prune import Method, Pattern, alps, calibration, dense_stats, lm_blocks, sequential
from jaxsys.prune.compare import held_out_perplexity
from jaxsys.prune.sparsegpt import sparsegpt

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "prune"))
import transcription as plain

SPARSITY = 0.5


def hessians(blocks, flat, tokens) -> dict[str, np.ndarray]:
    """Gather H of every layer of the dense model."""
    return {
        name: np.asarray(stats.H, np.float64)
        for part in dense_stats(blocks, flat, tokens, outer=True, batch=8)
        for name, stats in part.items()
    }


def layer_errors(flat, seen, other) -> list[dict[str, object]]:
    """Prune each layer by itself, four ways."""
    found: dict[str, list[tuple[float, float]]] = {}
    for name, h in seen.items():
        weight = np.asarray(flat[f"{name}.weight"], np.float64)
        narrow, h32 = jnp.asarray(weight, jnp.float32), jnp.asarray(h, jnp.float32)
        new = {
            "SparseGPT": np.asarray(sparsegpt(narrow, h32, SPARSITY)[0], np.float64),
            "SparseGPT, transcription": plain.sparsegpt(weight, h, SPARSITY)[0],
            "ALPS": np.asarray(alps(narrow, h32, SPARSITY)[0], np.float64),
            "ALPS, transcription": plain.alps(weight, h, SPARSITY)[0],
        }
        for method, pruned in new.items():
            delta = pruned - weight
            errors = tuple(
                float(np.sum(delta @ x * delta) / np.sum(weight @ x * weight))
                for x in (h, other[name])
            )
            found.setdefault(method, []).append(errors)
    base = np.array(found["SparseGPT"])
    rows = []
    for method, errors in found.items():
        each = np.array(errors)
        ratio = each / base
        rows.append(
            {
                "method": method,
                "error, text seen": f"{each[:, 0].mean():.4f}",
                "to SparseGPT's (range)": _range(ratio[:, 0]),
                "error, other text": f"{each[:, 1].mean():.4f}",
                "to SparseGPT's, other text": _range(ratio[:, 1]),
            }
        )
    return rows


def _range(ratio: np.ndarray) -> str:
    return f"{ratio.mean():.3f} ({ratio.min():.3f}-{ratio.max():.3f})"


def perplexities(opened, blocks, flat, text, evaluate) -> list[dict[str, object]]:
    """Prune the whole model with more text and with more damping."""
    rows = []
    for sequences, damping in ((SEQUENCES, 0.01), (8 * SEQUENCES, 0.01), (SEQUENCES, 0.1)):
        tokens = calibration(opened.tokenizer, text, sequences, LENGTH)
        row: dict[str, object] = {"calibration tokens": tokens.size, "damping": damping}
        for metric in ("sparsegpt", "alps"):
            tree = dict(flat)
            method = Method(metric, damping=damping)
            for found in sequential(blocks, flat, tokens, method, Pattern(SPARSITY), batch=8):
                tree |= found.tensors
            row[metric] = f"{evaluate(unflatten(tree))['perplexity']:.2f}"
        print(row, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--smoke", action="store_true", help="a few layers, nothing written")
    smoke = parser.parse_args().smoke
    if smoke and not os.environ.get("JAXSYS_DATA"):
        print("left out: JAXSYS_DATA names no data folder")
        return
    opened = open_model("stories260k")
    calibrate, test = texts("stories260k")
    blocks, flat = lm_blocks(opened.config), flatten(opened.model.params)
    seen = calibration(opened.tokenizer, calibrate, SEQUENCES, LENGTH)
    other = calibration(opened.tokenizer, test, SEQUENCES, LENGTH)
    own = hessians(blocks, flat, seen)
    if smoke:
        own = dict(list(own.items())[:2])
    layers = layer_errors(flat, own, hessians(blocks, flat, other))
    print(markdown_table(layers), flush=True)
    if smoke:
        return
    evaluate = held_out_perplexity(
        opened.config, opened.tokenizer, test, length=LENGTH, windows=WINDOWS
    )
    models = perplexities(opened, blocks, flat, calibrate, evaluate)
    atomic_write(
        RESULTS / "solvers.md",
        "# ALPS beside SparseGPT on stories260K at 50 %\n\n"
        "Relative output error of single layers, mean over all of them, in float64; the ratio to "
        "our SparseGPT's of the same layer, mean and range:\n\n" + markdown_table(layers) + "\n"
        "Perplexity of the whole model on the test text of `table.py`:\n\n"
        + markdown_table(models)
        + f"\n`python experiments/prune/solvers.py` on {machine()}.\n",
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
