"""Time to prune a block of SmolLM2-135M by Wanda and by SparseGPT, beside PyTorch.

    python experiments/prune/pruning_time.py           about 4 minutes on 2 idle cores
    python experiments/prune/pruning_time.py --smoke   half a minute: two small layers, nothing kept

Needs torch (extra `peers`). Both sides get the same weights (the seven shapes of one of the model's
30 equal blocks, random values) and the same captured inputs (8 windows of 256 tokens, random), and
go from these to pruned weights: statistics of the inputs, then mask and update. The forward passes
that make the inputs belong to neither method and are left out. The torch side is our transcription
of what the released codes do: a sort of every row for Wanda; for SparseGPT two Cholesky factors, an
inverse and a Python loop over the columns.

Rounds are interleaved in random order; ratios are of pairs. Compiling (once for each shape) is not
counted and is told beside it.

Expected: ratios above 1 (faster than torch).
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.measure import interleaved, machine, ratio
from jaxsys.core.report import atomic_write, markdown_table
from jaxsys.prune import Method, Pattern, prune_linear
from jaxsys.prune.stats import add_inputs, finish, init_moments

RESULTS = Path(__file__).parent / "results"
# outputs, inputs of q, k, v, o, gate, up, down
SHAPES = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
SMALL = ((96, 64), (64, 160))


def ours(layers: list[Any], method: Method, pattern: Pattern) -> list[jax.Array]:
    """Prune the layers with jaxsys."""
    found = []
    for weight, inputs in layers:
        moments = init_moments(weight.shape[1], outer="H" in method.needs)
        stats = finish(add_inputs(moments, inputs))
        found.append(prune_linear(weight, stats, method, pattern).weight)
    return jax.block_until_ready(found)


def torch_wanda(layers: list[Any], nm: tuple[int, int] | None) -> list[Any]:
    """Transcribe the released code of Wanda: running mean of squared norms, a sort of each row."""
    import torch

    found = []
    for weight, inputs in layers:
        norms = torch.zeros(weight.shape[1])
        for n, sample in enumerate(inputs):
            norms *= n / (n + 1)
            norms += torch.norm(sample.T, p=2, dim=1) ** 2 / (n + 1)
        scores = weight.abs() * torch.sqrt(norms.reshape(1, -1))
        mask = torch.zeros_like(scores, dtype=torch.bool)
        if nm:
            for i in range(0, weight.shape[1], nm[1]):
                part = scores[:, i : i + nm[1]]
                worst = torch.topk(part, nm[1] - nm[0], dim=1, largest=False)[1]
                mask.scatter_(1, i + worst, True)
        else:
            order = torch.sort(scores, dim=-1, stable=True)[1]
            mask.scatter_(1, order[:, : weight.shape[1] // 2], True)
        new = weight.clone()
        new[mask] = 0
        found.append(new)
    return found


def torch_sparsegpt(layers: list[Any], nm: tuple[int, int] | None) -> list[Any]:
    """Transcribe the released code of SparseGPT."""
    import torch

    found = []
    for weight, inputs in layers:
        w, columns = weight.clone(), weight.shape[1]
        h = torch.zeros(columns, columns)
        for n, sample in enumerate(inputs):
            h *= n / (n + 1)
            x = (2 / (n + 1)) ** 0.5 * sample.T
            h += x @ x.T
        dead = torch.diag(h) == 0
        h[dead, dead] = 1
        w[:, dead] = 0
        at = torch.arange(columns)
        h[at, at] += 0.01 * torch.mean(torch.diag(h))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
        u = torch.linalg.cholesky(inverse, upper=True)
        for a in range(0, columns, 128):
            b = min(a + 128, columns)
            part, block = w[:, a:b].clone(), u[a:b, a:b]
            errors, keep = torch.zeros_like(part), torch.zeros_like(part, dtype=torch.bool)
            if not nm:
                scores = part**2 / torch.diag(block).reshape(1, -1) ** 2
                edge = torch.sort(scores.flatten())[0][scores.numel() // 2]
                keep = scores <= edge
            for j in range(b - a):
                column, d = part[:, j], block[j, j]
                if nm and j % nm[1] == 0:
                    group = part[:, j : j + nm[1]] ** 2
                    group = group / torch.diag(block)[j : j + nm[1]].reshape(1, -1) ** 2
                    worst = torch.topk(group, nm[1] - nm[0], dim=1, largest=False)[1]
                    keep.scatter_(1, j + worst, True)
                q = column.clone()
                q[keep[:, j]] = 0
                error = (column - q) / d
                part[:, j:] -= error.unsqueeze(1) @ block[j, j:].unsqueeze(0)
                part[:, j] = q
                errors[:, j] = error
            w[:, a:b] = part
            w[:, b:] -= errors @ u[a:b, b:]
        found.append(w)
    return found


def main() -> int:
    """Time both sides of both methods."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--smoke", action="store_true", help="a smaller block, nothing written")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    try:
        import torch
    except ImportError:
        print("left out: the extra peers (torch) is not installed")
        return 0
    rng = np.random.default_rng(0)
    shapes = SMALL if given.smoke else SHAPES
    windows, tokens = (2, 32) if given.smoke else (8, 256)
    arrays = [
        (rng.standard_normal(s), rng.standard_normal((windows, tokens, s[1]))) for s in shapes
    ]
    jaxes = [tuple(jnp.asarray(a, jnp.float32) for a in pair) for pair in arrays]
    torches = [tuple(torch.tensor(a, dtype=torch.float32) for a in pair) for pair in arrays]
    rows = []
    for name, peer in (("wanda", torch_wanda), ("sparsegpt", torch_sparsegpt)):
        for pattern in (Pattern(0.5), Pattern(nm=(2, 4))):
            method, nm = Method(name), pattern.nm
            begin_s = time.perf_counter()
            mine = ours(jaxes, method, pattern)
            compile_s = time.perf_counter() - begin_s
            theirs = peer(torches, nm)
            agree = [
                float(np.mean((np.asarray(a) == 0) == (b.numpy() == 0)))
                for a, b in zip(mine, theirs, strict=True)
            ]
            timed = interleaved(
                {
                    "jaxsys": lambda m=method, p=pattern: ours(jaxes, m, p),
                    "torch": lambda peer=peer, nm=nm: peer(torches, nm),
                },
                warmup=1,
                runs=2 if given.smoke else given.rounds,
            )
            row = {
                "method": name,
                "pattern": str(pattern),
                "jaxsys, s": timed["jaxsys"].median_s,
                "torch, s": timed["torch"].median_s,
                "torch / jaxsys": f"{ratio(timed['torch'], timed['jaxsys']):.2f}",
                "first call, s": compile_s,
                "masks agree": min(agree),
            }
            print(row, flush=True)
            rows.append(row)
    lines = [
        "# Pruning one block of SmolLM2-135M (seven layers; the model has 30 such blocks)",
        "Medians of interleaved rounds; the ratio is of pairs, with its 95 % bootstrap interval. "
        "`masks agree` is the least share of equal places over the layers (the released SparseGPT "
        "removes one weight more in each block of columns, and float32 rounds differently).",
        markdown_table(rows),
        f"`python experiments/prune/pruning_time.py`, {machine(devices=True)}, torch "
        f"{torch.__version__} with {torch.get_num_threads()} threads.",
    ]
    if not given.smoke:
        atomic_write(RESULTS / "pruning_time.md", "\n\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
