"""Architectures per second for synflow and snip, beside a PyTorch loop of the usual form.

    python experiments/nas/throughput.py            about 3 minutes on 2 cores
    python experiments/nas/throughput.py --smoke    half a minute, a tiny network, nothing written

The usual form builds one module after another, moves on when its score is there, and copies numbers
to the host. Ours compiles once, takes the architecture as data and scores a block. Both run the
same 16 random NAS-Bench-201 cells with the benchmark's network (16 channels, 5 cells a stage), 16
images for snip (cross-entropy of one batch) and one image of ones for synflow (PyTorch in float64,
as in the usual code). Blocks of both alternate on the same machine; the ratio is the mean over
rounds with a bootstrap interval. The time to compile stands apart. Scores of the two need not be
equal: the weights are drawn by each library.
"""

import argparse
import platform
import time
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from shared import RESULTS

from jaxsys.core.report import atomic_write, markdown_table
from jaxsys.nas.batches import image_batch
from jaxsys.nas.model import cell_model
from jaxsys.nas.network import NetworkConfig
from jaxsys.nas.run import mean_interval
from jaxsys.nas.score import ScoreConfig, score_block
from jaxsys.nas.space import EDGES, from_index


def torch_network(ops: np.ndarray, config: NetworkConfig):
    """Build the network of one cell as the usual PyTorch code does."""
    import torch
    from torch import nn

    def unit(inside: int, out: int, size: int, stride: int = 1) -> nn.Module:
        conv = nn.Conv2d(inside, out, size, stride, size // 2, bias=False)
        return nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(out))

    class Cell(nn.Module):
        def __init__(self, c: int):
            super().__init__()
            makers = [
                nn.Identity,
                lambda: None,
                lambda: unit(c, c, 3),
                lambda: unit(c, c, 1),
                lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
            ]
            made = {str(e): makers[op]() for e, op in enumerate(ops)}
            self.edges = nn.ModuleDict({k: m for k, m in made.items() if m is not None})

        def forward(self, x):
            nodes = {1: x, 2: 0 * x, 3: 0 * x, 4: 0 * x}
            for e, (a, b) in enumerate(EDGES):
                if str(e) in self.edges:
                    nodes[b] = nodes[b] + self.edges[str(e)](nodes[a])
            return nodes[4]

    class Reduction(nn.Module):
        def __init__(self, c: int):
            super().__init__()
            self.main = nn.Sequential(unit(c, 2 * c, 3, 2), unit(2 * c, 2 * c, 3))
            self.down = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(c, 2 * c, 1, bias=False))

        def forward(self, x):
            return self.main(x) + self.down(x)

    c = config.channels
    layers: list[nn.Module] = [nn.Conv2d(3, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)]
    for stage in range(3):
        layers += [Cell(c * 2**stage) for _ in range(config.cells)]
        layers += [Reduction(c * 2**stage)] if stage < 2 else []
    head = [nn.BatchNorm2d(4 * c), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, *head, nn.Linear(4 * c, config.n_classes))
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    return torch, model, weights, norms


def torch_scores(name: str, cells: np.ndarray, config: NetworkConfig, images, labels) -> list:
    """Score cells one after another."""
    found = []
    for ops in cells:
        torch, model, weights, norms = torch_network(ops, config)
        if name == "snip":
            x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
            loss = torch.nn.functional.cross_entropy(model(x), torch.from_numpy(labels).long())
        else:
            model.double()
            for norm in norms:  # left out, as the usual code's bn=False does
                norm.forward = lambda x: x
            with torch.no_grad():
                for p in model.parameters():
                    p.abs_()
            loss = model(torch.ones(1, 3, *images.shape[1:3], dtype=torch.float64)).sum()
        grads = torch.autograd.grad(loss, weights, allow_unused=True)
        pairs = [(w, g) for w, g in zip(weights, grads, strict=True) if g is not None]
        found.append(sum((w * g).abs().sum().item() for w, g in pairs))
    return found


def timed(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(f())
    return time.perf_counter() - start


def measure(config: NetworkConfig, n_cells: int, rounds: int, size: int) -> list[dict]:
    rng = np.random.default_rng(0)
    images, labels = image_batch("noise", 16)
    images = images[:, :size, :size]
    rows = []
    for name in ("synflow", "snip"):
        ours = score_block(partial(cell_model, config=config), ScoreConfig((name,)))
        cells = from_index(rng.integers(15_625, size=n_cells))
        compile_s = timed(lambda ours=ours, cells=cells: ours(cells, images, labels))
        times = []
        for _ in range(rounds):
            cells = from_index(rng.integers(15_625, size=n_cells))  # new ones: nothing is cached
            a = timed(lambda ours=ours, cells=cells: ours(cells, images, labels))
            loop = partial(torch_scores, name, cells, config, images, labels)
            times.append((a, timed(loop)))
        a, b = np.array(times).T
        ratio, (low, high) = mean_interval(b / a)
        rows.append(
            {
                "proxy": name,
                "ours, cells/s": f"{n_cells / np.median(a):.1f}",
                "PyTorch loop, cells/s": f"{n_cells / np.median(b):.1f}",
                "ratio": f"{ratio:.2f} [{low:.2f}, {high:.2f}]",
                "compiled once in, s": f"{compile_s - np.median(a):.1f}",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    try:
        import torch
    except ImportError:
        print("PyTorch is not installed, so there is nothing to compare with: pip install torch")
        return
    if args.smoke:
        print(markdown_table(measure(NetworkConfig(4, 1), 2, 1, 8)))
        return
    rows = measure(NetworkConfig(), 16, 4, 32)
    text = "# Throughput of zero-cost proxies, the benchmark's network, 16 cells a block\n\n"
    device = jax.devices()[0]
    text += (
        f"{device.device_kind} ({device.platform}), {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads for PyTorch {torch.__version__}, jax "
        f"{jax.__version__}; four alternating rounds, mean of their ratios and its 95 % bootstrap "
        "interval.\n\n"
    )
    text += markdown_table(rows)
    atomic_write(RESULTS / "throughput.md", text)
    print(text)


if __name__ == "__main__":
    main()
