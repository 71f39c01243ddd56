"""Four unequal devices in two sites with a slow link between: step time by method and codec.

Command:   python experiments/pipeline/netlab.py --profile --rate 8mbit   about a minute
           python experiments/pipeline/netlab.py --rate 8mbit             two on 2 idle cores
           python experiments/pipeline/netlab.py --smoke                  kept nowhere
Expected:  from scheduling alone, dense, 1.45 times or more over equal-number; with AdaTopK as well
           5 times or more at 8 Mbit/s; measured within 10 % of predicted
Results:   results/netlab.json (every run), netlab.md and netlab.png

Every device is a process in a network namespace of its own; 1 Gbit/s inside a site, the given rate
between (token buckets with frames of 1500 bytes, so that next to nothing passes at once after a
pause; checked by a timed exchange). Devices have 0.5, 0.5, 0.25 and 0.25 of a core's speed by a
throttle: a worker sleeps in proportion to the processor time that it used (isolate.py says why not
a CPU quota). The devices are listed in the order in which they might have joined, sites in
turn; equal-number and equal-compute use that order, which is what costs them most. All plans are
run in one set of processes in turns, two steps each, of which the second counts: the first brings
the plan's own data back into the caches, where a run of one plan has it. Plans are made from the
profile in a file, so that their programs can be compiled beforehand. Each is predicted twice: from
a profile that is measured anew in turns with the plans, since the machine's speed drifts by a
quarter within minutes (programs alone, and steps of two trial plans, none of those that are
predicted; links before), and from the stages' own times in two rounds of warm-up.
Results of other rates are kept.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from jaxsys.cluster import join, launch
from jaxsys.cluster.heap import keep_freed_memory
from jaxsys.core.errors import UserError
from jaxsys.core.measure import bootstrap_ci, machine
from jaxsys.core.report import atomic_write, figure, markdown_table, save_figure, to_json
from jaxsys.pipeline.place import Place

HERE = Path(__file__).parent
MARK = "@netlab "
READY_BYTES = 2**28  # more than a worker has in use
METHODS = ("equal-number", "equal-compute", "op-fence", "exact")
CODECS = ("dense", "uniform", "adatopk")
FULL = {"blocks": 8, "width": 128, "heads": 4, "length": 64, "batch": 16, "micro_batches": 4,
        "rounds": 8, "warm": 2, "ratio": 16.0}  # fmt: skip
SMOKE = {"blocks": 2, "width": 16, "heads": 2, "length": 8, "batch": 4, "micro_batches": 2,
         "rounds": 1, "warm": 1, "ratio": 16.0}  # fmt: skip


def model(options: dict):
    """Make a GPT-2 whose blocks are the nodes of its graph; the head has weights of its own."""
    import jax
    import jax.numpy as jnp

    from jaxsys.models import gpt2
    from jaxsys.pipeline.job import Setup

    config = gpt2.GPT2Config(
        vocab_size=256, n_positions=options["length"], n_embd=options["width"],
        n_layer=options["blocks"], n_head=options["heads"], tie_word_embeddings=False,
    )  # fmt: skip

    def loss(params, tokens):
        with jax.named_scope("embed"):
            embedded = params["wte"]["weight"][tokens[:, :-1]]
            x = embedded + params["wpe"]["weight"][None, : tokens.shape[1] - 1]
        for i in range(config.n_layer):
            with jax.named_scope(f"block{i}"):
                x = gpt2.block(params["h"][str(i)], config, x)
        with jax.named_scope("head"):
            x = gpt2._layer_norm(params["ln_f"], config, x)
            logits = jnp.einsum("BTD,VD->BTV", x, params["lm_head"]["weight"])
            chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)

    def data(step):
        shape = (options["batch"], options["length"] + 1)
        return (np.random.default_rng(step).integers(256, size=shape).astype(np.int32),)

    return Setup(loss, lambda key: gpt2.init(key, config), data)


def worker(options: dict) -> None:
    """Profile, or run every plan in turns, in one of the processes."""
    keep_freed_memory(READY_BYTES)
    member = join(local_devices=1, distributed=False)
    import jax

    jax.config.update("jax_compilation_cache_dir", options["cache"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

    from jaxsys.cluster.sockets import connect

    transport = connect(member, timeout_s=120.0, silence_s=60.0)
    setup = model(options)
    if options["profile"] is None:
        found = profiled(options, setup, transport)
        if found is not None:
            print(MARK + found.to_json(), flush=True)
    else:
        rows = run_plans(options, setup, transport)
        if transport.rank == 0:
            print(MARK + to_json(rows), flush=True)
    transport.close()


def profiled(options: dict, setup, transport):
    """Measure blocks and links, together with the other processes."""
    from jaxsys.cluster.throttle import throttle_of
    from jaxsys.pipeline.profile import profile
    from jaxsys.train import optimizers

    return profile(
        setup, options["micro_batches"], transport, granularity="scope", memory_bytes=1e9,
        sites=options["sites"], optimizer=optimizers.adamw(lr=1e-4), throttle=throttle_of(),
    )  # fmt: skip


def plans_of(options: dict, setup) -> tuple:
    """Make every plan from the profile, the same in every process."""
    from jaxsys.core.graph import dag
    from jaxsys.pipeline.choice import Choice, compare
    from jaxsys.pipeline.profile import Profile

    found = Profile.from_json(json.dumps(options["profile"]))
    specs = setup.micro_batch(options["micro_batches"])
    graph = dag(setup.loss_fn, setup.shapes(), *specs, granularity="scope")
    work = found.work(graph)
    choice = Choice(micro_batches=options["micro_batches"], ratio=options["ratio"])
    rows = compare(
        work, found.fleet, choice, methods=METHODS, codecs=CODECS,
        overheads=found.overheads,
    )  # fmt: skip
    return graph, work, found.fleet, rows


def run_plans(options: dict, setup, transport) -> list[dict]:
    """Run all plans a step each in turns; gives every plan's figures (on every process)."""
    import jax

    from jaxsys.cluster.throttle import throttle_of
    from jaxsys.core.stages import cut_at
    from jaxsys.pipeline.execute import Worker
    from jaxsys.pipeline.messages import step_bytes
    from jaxsys.pipeline.probe import gather, measure_links
    from jaxsys.pipeline.profile import Session
    from jaxsys.pipeline.renumbered import Renumbered
    from jaxsys.pipeline.trial import span_seconds
    from jaxsys.train import optimizers

    graph, work, fleet, rows = plans_of(options, setup)
    shapes, specs = setup.shapes(), setup.micro_batch(options["micro_batches"])
    params = setup.init(jax.random.key(0))
    staged, workers, states = {}, [], []
    for row in rows:
        plan = row["plan"]
        if plan.boundaries not in staged:
            staged[plan.boundaries] = cut_at(
                setup.loss_fn, shapes, specs, plan.boundaries, granularity="scope"
            )
        end = Renumbered(transport, plan.devices)
        optimizer = optimizers.adamw(lr=1e-4)
        workers.append(
            Worker(staged[plan.boundaries], plan, end, optimizer, shapes, throttle=throttle_of())
        )
        states.append(workers[-1].init(params))
        row["bytes_predicted"] = sum(
            step_bytes(staged[plan.boundaries], plan, jax.tree.leaves(shapes)).values()
        )
        row["step_s"], row["bytes"] = [], []
    optimizer = optimizers.adamw(lr=1e-4)
    parts = options["micro_batches"]
    session = Session(setup, parts, transport, "scope", optimizer, throttle_of())
    links = measure_links(transport)
    turn, own = 1000, [[] for _ in rows]
    for k in range(1 + options["warm"] + options["rounds"]):
        if k == 1 + options["warm"]:
            predict_again(rows, own, work, fleet, transport)
            own = [[] for _ in rows]
        if k > options["warm"]:
            session.sample()
        for i in (np.arange(len(rows)) + k) % len(rows):
            for _ in range(
                2 if k else 1
            ):  # the first brings the plan's own data back into the caches
                turn += 2
                gather(transport, np.zeros(1), turn)
                state = states[i]._replace(step=turn)
                states[i], info = workers[i].step(state, setup.data(k))
            sent = float(sum(info.sent_bytes.values()))
            everyone = gather(transport, np.array([info.step_s, sent]), turn + 1)
            if k:
                own[i].append([*span_seconds([info]), info.late_share])
            if k > options["warm"]:
                rows[i]["step_s"].append(float(everyone[:, 0].max()))
                rows[i]["bytes"].append(float(everyone[:, 1].sum()))
    if options["rounds"]:  # else nothing was sampled: programs were to be compiled only
        predict_anew(rows, graph, session.profile(links, 1e9, options["sites"]))
    for row, times in zip(rows, own, strict=True):
        turn += 2
        every = gather(transport, np.median(times or [[0.0] * 4], axis=0), turn)
        row["stages_own_s"] = every[list(row["plan"].devices), :3].tolist()
    return [
        {k: v for k, v in row.items() if k != "plan"}
        | {"boundaries": row["plan"].boundaries, "devices": row["plan"].devices,
           "ratios": row["plan"].ratios_forward}
        for row in rows
    ]  # fmt: skip


def predict_anew(rows, graph, found) -> None:
    """Predict each plan from what process 0 was told of all rounds."""
    for row in rows if found is not None else ():
        row["planned_s"] = row["predicted_s"]
        row["notes"], row["overheads"] = found.notes, tuple(found.overheads)
        row["rates"] = (found.fleet.bytes_per_s * 8e-6).round(2).tolist()
        row["predicted_s"] = found.predict(graph, row["plan"]).makespan_s
        costs = found.costs(graph, row["plan"])
        row["stages_s"] = np.transpose([costs.forward_s, costs.backward_s, costs.update_s]).tolist()


def predict_again(rows, own, work, fleet, transport) -> None:
    """Predict each plan from its stages' own times in the rounds of warm-up."""
    from jaxsys.pipeline.estimate import Costs, costs_of
    from jaxsys.pipeline.probe import gather
    from jaxsys.pipeline.timing import predict_s

    mine = np.array([np.mean(times, axis=0) for times in own])
    everyone = gather(transport, mine, 1)  # by process, which is a device: [P, plans, 4]
    for i, row in enumerate(rows):
        plan = row["plan"]
        by_stage = everyone[list(plan.devices), i]
        costs = costs_of(work, fleet, plan)
        again = Costs(
            tuple(by_stage[:, 0].tolist()), tuple(by_stage[:, 1].tolist()), costs.messages,
            costs.devices, tuple(by_stage[:, 2].tolist()), float(by_stage[1:, 3].mean()),
        )  # fmt: skip
        row["again_s"] = predict_s(plan, again, fleet)


def start(options: dict, place: Place, verified: list) -> object:
    """Run all processes once; gives what process 0 said."""
    found, lines = [], []

    def on_line(i: int, line: str) -> None:
        lines.append(f"[{i}] {line}")
        if line.startswith(MARK):
            found.append(json.loads(line[len(MARK) :]))

    with place.stand() as standing:
        verified += [min(rate) for rate in standing.between]
        report = launch(
            [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(options)],
            place.devices, wrap=standing.wrap, host=standing.hosts[0], on_line=on_line,
        )  # fmt: skip
    if report.exit_code:
        raise RuntimeError("\n".join(lines[-30:]))
    return found[0]


def table(result: dict) -> list[dict]:
    """Write a row for each plan, measured beside predicted."""
    rows, base = [], np.median(result["rows"][0]["step_s"])
    for row in result["rows"]:
        times = np.array(row["step_s"])
        low, high = bootstrap_ci(times, statistic=np.median) if len(times) > 2 else (0.0, 0.0)
        median = float(np.median(times))
        rows.append(
            {
                "method": row["method"],
                "codec": row["codec"],
                "devices": ", ".join(map(str, row["devices"])),
                "cuts": ", ".join(map(str, row["boundaries"])),
                "ratios": ", ".join(f"{r:.1f}" for r in row["ratios"]),
                "measured, s": f"{median:.3f} ({low:.3f} to {high:.3f})",
                "from the profile": f"{row['predicted_s']:.3f} "
                f"({median / row['predicted_s'] - 1:+.0%})",
                "from its own stages": f"{row['again_s']:.3f} ({median / row['again_s'] - 1:+.0%})",
                "times faster": f"{base / median:.2f}",
                "bytes, off": f"{np.mean(row['bytes']) / row['bytes_predicted'] - 1:+.2%}",
            }
        )
    return rows


def report(results: list[dict], out: Path) -> str:
    """Write the page and the figure."""
    options = results[0]["options"]
    text = [
        "# Step time over two sites, measured beside predicted\n",
        "`python experiments/pipeline/netlab.py`\n",
        f"{machine()}\n",
        f"GPT-2 of {options['blocks']} blocks of width {options['width']}, {options['batch']} "
        f"sequences of {options['length']} bytes in {options['micro_batches']} micro-batches, "
        f"1F1B, float32; AdaTopK and uniform top-k at r = {options['ratio']:g}. Medians of "
        f"{options['rounds']} steps, plans in turns (the second of two steps each), the slowest "
        "process counting, with 95 % bootstrap intervals; in brackets by how much the measured "
        "time is above the prediction. "
        "The devices' speeds are " + ", ".join(map(str, options["cores"])) + " of a core's, by a "
        "throttle.\n",
    ]
    for result in results:
        text += [
            f"## {result['rate']} between the sites "
            f"(verified: {min(result['verified']) / 1e6:.1f} Mbit/s)\n",
            markdown_table(table(result)),
        ]
    fig, axes = figure(1, len(results), width=5.0, height=4.0)
    for axis, result in zip(axes[0], results, strict=True):
        rows = result["rows"]
        names = [f"{row['method']}, {row['codec']}" for row in rows]
        places = np.arange(len(rows))[::-1]
        axis.barh(places, [np.median(row["step_s"]) for row in rows], height=0.6, label="measured")
        axis.plot([row["predicted_s"] for row in rows], places, "k|", ms=12, label="from profile")
        axis.plot([row["again_s"] for row in rows], places, "rx", ms=5, label="from own stages")
        axis.set_yticks(places, names, fontsize=7)
        axis.set(xlabel="s per step", title=f"{result['rate']} between sites")
        axis.legend(fontsize=7)
    save_figure(fig, out / "netlab.png")
    atomic_write(out / "netlab.md", "\n".join(text))
    return "\n".join(text)


def main() -> int:
    """Run the experiment and write its results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--profile", action="store_true", help="measure devices and links only")
    parser.add_argument("--warm", action="store_true", help="compile all programs only")
    parser.add_argument("--rate", default="8mbit")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(json.loads(args.worker))
        return 0
    n = 2 if args.smoke else 4
    place = Place(
        n, ("1gbit",), ((0,), (1,)) if args.smoke else ((0, 2), (1, 3)), (args.rate,),
        (0.5, 0.25) if args.smoke else (0.5, 0.5, 0.25, 0.25), "throttle", 1500,
    )  # fmt: skip
    out = Path(tempfile.mkdtemp()) if args.smoke else HERE / "results"
    cache = Path(tempfile.gettempdir()) / "jaxsys-netlab-programs"
    options = dict(SMOKE if args.smoke else FULL) | {
        "cores": place.cores, "sites": [i % 2 for i in range(n)], "cache": str(cache),
        "profile": None,
    }  # fmt: skip
    options["rounds"] = 0 if args.warm else args.rounds or options["rounds"]
    verified: list[float] = []
    profile_file = out / f"netlab_profile_{args.rate}.json"
    try:
        if args.profile or not profile_file.exists():
            atomic_write(profile_file, to_json(start(options, place, verified)))
        if args.profile:
            print(profile_file.read_text())
            return 0
        options["profile"] = json.loads(profile_file.read_text())
        rows = start(options, place, verified)
    except UserError as error:  # no namespaces or no quotas here
        print(error, file=sys.stderr)
        return 2
    if args.warm:
        return 0
    path = out / "netlab.json"
    results = json.loads(path.read_text()) if path.exists() else []
    results = [result for result in results if result["rate"] != args.rate]
    kept = {k: v for k, v in options.items() if k not in ("profile", "cache")}
    results.append({"rate": args.rate, "verified": verified, "options": kept, "rows": rows})
    results.sort(key=lambda result: float(result["rate"].removesuffix("mbit")))
    atomic_write(path, to_json(results))
    print(report(results, out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
