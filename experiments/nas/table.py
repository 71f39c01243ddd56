"""Train predictors on a few NAS-Bench-201 cells and rank all others: the published table, redone.

    python experiments/nas/table.py                about 20 minutes on 2 cores; resumes
    python experiments/nas/table.py --minutes 4    stops after the part in which 4 minutes pass
    python experiments/nas/table.py --smoke        half a minute, nothing written

MABN, ParZC (MABN with a graph encoder) and the baselines MLP, GCN and boosted trees are trained on
the validation accuracy of 78 to 1,563 cells and tested by Kendall's τ-b on the test accuracy of all
the others (15,625 less the training set), on three data sets, with five training sets and
initialisations each, all fifteen in one program. What they see: node-wise synflow of all 98 slots
(`results/node_statistics.npz`), and the operations (GCN only these). Then, at 156 cells, the losses
that the paper compares, alone and mixed (CIFAR-10), and the mean of five members trained on
each set with the pair loss for twice as long. That form was chosen among three (both losses or the
pair loss alone for 80 epochs, the pair loss for 160) by training sets that are not used here.

Published figures are for CIFAR-10, fitted and tested likewise; those of ParZC are the runs logged
in its repository, with larger networks, 300 epochs, and the statistics of three proxies.
"""

import argparse
import time

import numpy as np
from shared import DATASETS, RESULTS, Records, load_nodes

from jaxsys.core.report import atomic_write, markdown_table
from jaxsys.nas.features import predictor_inputs
from jaxsys.nas.fit import FitConfig
from jaxsys.nas.predictor import PredictorConfig
from jaxsys.nas.run import draw_rows, fit_and_test, mean_interval
from jaxsys.nas.space import from_index, to_index
from jaxsys.nas.tables import nas_bench_201

SEEDS = 5
# Training cells -> epochs: larger sets need fewer to see as much.
EPOCHS = {78: 120, 156: 80, 469: 30, 781: 20, 1563: 12}
PREDICTORS = ("parzc", "mabn", "mlp", "gcn", "trees")
LOSSES = (
    ("mse",),
    ("pair",),
    ("diff_kendall",),
    ("list_mle",),
    ("mse", "pair"),
    ("pair", "diff_kendall"),
    ("mse", "pair", "diff_kendall"),
)
# Training cells of the ensembles -> epochs.
MEMBERS, ENSEMBLES = 5, {78: 240, 156: 160}
# Small, for a CPU; without dropout, whose random numbers cost more here than the products.
SIZES = PredictorConfig(
    sequence=64, width=32, depth=1, heads=4, head_width=8, graph_width=32, inner=64, rate=0.0
)
# Kendall's τ on CIFAR-10 (PINAT's table, and the runs logged in ParZC's repository).
PUBLISHED = {
    "Neural Predictor": (0.343, 0.413, 0.584, 0.634, 0.646),
    "TNASP": (0.539, 0.589, 0.640, 0.689, 0.724),
    "PINAT": (0.549, 0.631, 0.706, 0.761, 0.784),
    "ParZC, logged, mean": (0.693, 0.712, 0.753, 0.770, 0.761),
    "ParZC, logged, best": (0.700, 0.731, 0.763, 0.783, 0.777),
}


def load(smoke: bool = False) -> tuple[dict, np.ndarray, np.ndarray]:
    """Load inputs [15625, ...], validation and test accuracies [3, 15625], by cell number.

    For a smoke test the accuracies are made up, so that it needs no data.
    """
    index, synflow = load_nodes()["synflow"]
    if smoke:
        inputs = predictor_inputs(from_index(index), {"synflow": synflow})
        made_up = np.stack([(inputs["ops"] == 2).sum(1) + 0.1 * np.sin(index)] * 3)
        return inputs, made_up, made_up
    table = nas_bench_201()
    table = table.select(np.argsort(to_index(table.cells)))
    assert (np.sort(index) == np.arange(len(table.cells))).all()
    nodes = synflow[np.argsort(index)]
    inputs = predictor_inputs(from_index(np.arange(len(nodes))), {"synflow": nodes})
    valid, test = (
        np.stack([table.column(f"{kind}_{d}") for d in DATASETS]) for kind in ("val", "test")
    )
    return inputs, valid, test


def train(
    name: str, n: int, losses: tuple[str, ...], data: tuple, epochs: int, members: int = 1
) -> dict:
    """Train one predictor with five training sets for each data set, and give τ."""
    inputs, valid, test, names = data
    rows = np.tile(draw_rows(valid.shape[1], n, SEEDS), (len(valid), 1))
    targets, tests = (np.repeat(v, SEEDS, 0) for v in (valid, test))
    config = FitConfig(losses=losses, epochs=epochs, batch=26, lr=3e-3)
    start = time.monotonic()
    found = fit_and_test(name, inputs, targets, tests, rows, config, sizes=SIZES, members=members)
    tau = found.tau.reshape(-1, SEEDS).round(4)
    seconds = round(time.monotonic() - start, 1)
    return {"tau": dict(zip(names, tau.tolist(), strict=False)), "seconds": seconds}


def told(values: list[float]) -> str:
    mean, (low, high) = mean_interval(values)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def ensembles(records: Records, key: str, dataset: str) -> list[dict]:
    """Give the rows of what is done of the ensembles on one data set."""
    rows = []
    for name in ("parzc", "gcn"):
        found = {n: records.found.get(f"{MEMBERS} {name} {n} {key}") for n in ENSEMBLES}
        figures = {f"{n}": told(v["tau"][key]) for n, v in found.items() if v}
        rows += [{dataset: f"{name}, pair loss, {MEMBERS} members"} | figures] if figures else []
    return rows


def write(records: Records) -> str:
    """Write the tables of what is done so far."""
    text = "# Kendall's τ of predictors on NAS-Bench-201\n\n"
    text += (
        f"Mean of {SEEDS} training sets and its 95 % bootstrap interval over them; tested on all "
        "other cells (15,625 less the training set).\n"
    )
    for key, dataset in DATASETS.items():
        rows = []
        for name in PREDICTORS:
            row = {dataset: name}
            for n in EPOCHS:
                if found := records.found.get(f"{name} {n}"):
                    row[f"{n}"] = told(found["tau"][key])
            if len(row) > 1:
                rows.append(row)
        rows += ensembles(records, key, dataset)
        if key == "c10":
            for name, taus in PUBLISHED.items():
                figures = {f"{n}": f"{t:.3f}" for n, t in zip(EPOCHS, taus, strict=True)}
                rows.append({dataset: f"published: {name}"} | figures)
        text += f"\n## {dataset}\n\n{markdown_table(rows)}"
    rows = []
    for losses in LOSSES:
        key = "parzc 156" if losses == ("mse", "pair") else "loss " + "+".join(losses)
        if found := records.found.get(key):
            figure = told(found["tau"]["c10"])
            rows.append({"loss (ParZC, 156 cells)": " + ".join(losses), "CIFAR-10": figure})
    if rows:
        text += f"\n## Losses\n\n{markdown_table(rows)}"
    atomic_write(RESULTS / "table.md", text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--only", nargs="*", help="keys of the parts to run, such as 'mlp 78'")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    data = load(args.smoke)
    if args.smoke:
        for name in ("gcn", "trees"):
            print(name, train(name, 78, ("mse",), (*data, list(DATASETS)), 2))
        return
    start = time.monotonic()
    records = Records(RESULTS / "table.json")
    parts = [(f"{p} {n}", p, n, ("mse", "pair"), e) for p in PREDICTORS for n, e in EPOCHS.items()]
    parts += [
        (f"{MEMBERS} {p} {n} {d}", p, n, ("pair",), e)
        for p in ("parzc", "gcn")
        for n, e in ENSEMBLES.items()
        for d in DATASETS
    ]
    alone = [ls for ls in LOSSES if ls != ("mse", "pair")]  # that is the table's ParZC
    parts += [("loss " + "+".join(ls), "parzc", 156, ls, EPOCHS[156]) for ls in alone]
    for key, name, n, losses, epochs in parts:
        if key in records.found or (args.only and key not in args.only):
            continue
        if time.monotonic() - start > 60 * args.minutes:
            break
        inputs, *accuracies = data
        names = list(DATASETS)
        members = MEMBERS if key.startswith(f"{MEMBERS} ") else 1
        if key.startswith("loss"):  # on the first data set alone
            accuracies = [v[:1] for v in accuracies]
        elif members > 1:
            names = [key.split()[-1]]
            own = list(DATASETS).index(names[0])
            accuracies = [v[own : own + 1] for v in accuracies]
        found = train(name, n, losses, (inputs, *accuracies, names), epochs, members)
        records.add(key, found)
        means = {k: round(float(np.mean(v)), 3) for k, v in found["tau"].items()}
        print(key, means, f"{found['seconds']} s", flush=True)
    print(write(records))


if __name__ == "__main__":
    main()
