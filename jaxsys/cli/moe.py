"""`jaxsys moe`: plan, profile and train mixtures of experts (FSMoE, arXiv 2501.10714)."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from jaxsys.cli.options import Common
from jaxsys.core.errors import UserError
from jaxsys.moe.task import Task


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Common):
    """Plan a training step from fitted costs, beside other systems' schedules; no hardware.

    Attributes:
      costs: costs.json that `jaxsys moe profile` wrote, or testbed-b, released (published ones).
      batch: Sequences of a group of ranks that share experts (B).
      tokens: Tokens of a sequence (L).
      width: Model width (M).
      hidden: Hidden width of an expert (H).
      k: Experts of a token.
      factor: Capacity factor f; 0 for no drop, taken as balanced.
      gated: Experts of three matrices (Mixtral) instead of two (GPT).
      expert_ranks: Ranks that split each expert, as well as the dense part.
      layers: Number of layers.
      dense_ms: Milliseconds of the dense part forward (backward twice that); by default attention's
        multiply-adds on the line of the experts.
      degrees: Pipeline degrees to choose from.
      systems: Whose schedules: serial, tutel, tutel-improved, lina, no-iio, fsmoe, fsmoe-exact,
        jaxsys.
      min_r2: Least r² of a line.
    """

    costs: str = "testbed-b"
    batch: int = 4
    tokens: int = 1024
    width: int = 1600
    hidden: int = 6400
    k: int = 2
    factor: float = 1.2
    gated: bool = False
    expert_ranks: int = 4
    layers: int = 12
    dense_ms: float | None = None
    degrees: tuple[int, ...] = (1, 2, 4, 8)
    systems: tuple[str, ...] = ("tutel", "tutel-improved", "lina", "no-iio", "fsmoe", "jaxsys")
    min_r2: float = 0.9


@dataclass(frozen=True, kw_only=True)
class ProfileConfig(Common):
    """Measure collectives and expert products on these devices, and fit lines.

    Attributes:
      expert: Ranks that experts are spread over; by default all devices that are not tensor ranks.
      tensor: Ranks that split each expert.
      elements: Sizes of the buffers, in float32 elements.
      width: Model width of the expert products.
      repeats: Timed runs of each size.
      min_r2: The gate: least r² of a fit.
      devices: Virtual devices of each process, on a CPU.
    """

    spreads: ClassVar[bool] = True

    devices: int = 1
    expert: int | None = None
    tensor: int = 1
    elements: tuple[int, ...] = ()
    width: int = 512
    repeats: int = 5
    min_r2: float = 0.9


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Common):
    """Train a language model with mixtures over all devices; a killed run goes on where it was.

    Run it under `jaxsys launch -n 4`, or on a cluster, to spread it over processes.

    Attributes:
      out: Folder for the log, checkpoints and the model.
      seed: Seed of parameters, data order and noise.
      task: What is trained.
      steps: Steps of the whole run.
      data: Groups of devices that each hold all experts; as many as need be by default.
      tensor: Devices that split each expert.
      forward: Pipeline degree of the forward pass.
      backward: Pipeline degree of the backward pass.
      plan: A plan.json of `jaxsys moe plan`, with degrees and gradient slices, instead.
      devices: Virtual devices of each process, on a CPU.
      save_every: Steps between checkpoints; 0 saves the last step only.
      eval_every: Steps between evaluations on held-out text; 0 evaluates at the end only.
      loggers: tensorboard, wandb; metrics.jsonl is always written.
    """

    spreads: ClassVar[bool] = True

    task: Task = field(default_factory=Task)
    steps: int = 100
    data: int = 0
    tensor: int = 1
    forward: int = 1
    backward: int = 1
    plan: Path | None = None
    devices: int = 1
    save_every: int = 0
    eval_every: int = 0
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()


def _costs(name: str) -> Any:
    from jaxsys.moe.costs import RELEASED, TESTBED_B, Costs

    published = {"testbed-b": TESTBED_B, "released": RELEASED}
    if name in published:
        return published[name]
    try:
        return Costs.from_json(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"the costs {name!r} cannot be read ({error.strerror}); expected testbed-b, released "
            "or the costs.json of `jaxsys moe profile`; correct the path"
        ) from error


def run_plan(config: PlanConfig) -> dict[str, Any]:
    """Plan under every system and compare."""
    from jaxsys.core.report import atomic_write, print_table
    from jaxsys.moe.compare import compare_systems, comparison_rows, uniform
    from jaxsys.moe.figures import step_figure
    from jaxsys.moe.volumes import Shape

    costs = _costs(config.costs)
    costs.check_fit(config.min_r2)
    shape = Shape(
        batch=config.batch,
        tokens=config.tokens,
        width=config.width,
        hidden=config.hidden,
        k=config.k,
        factor=config.factor or None,
        matmuls=3 if config.gated else 2,
        expert_ranks=config.expert_ranks,
        dense_ranks=config.expert_ranks,
    )
    dense_s = None if config.dense_ms is None else config.dense_ms / 1e3
    layers = uniform(costs, shape, config.layers, dense_forward_s=dense_s)
    plans = compare_systems(costs, layers, config.degrees, config.systems)
    rows = comparison_rows(plans)
    out = config.out or Path("runs/moe-plan")
    chosen = config.systems[-1]
    atomic_write(out / "plan.json", plans[chosen].to_json())
    picked = dict.fromkeys((config.systems[0], chosen))
    step_figure(costs, layers, {n: plans[n] for n in picked}, out / "plan.png")
    if not config.json:
        print_table(rows, title="modelled time of a training step")
        print(f"plan of {chosen} and figure: {out}")
    return {"rows": rows, "plan": plans[chosen].to_json(), "out": str(out)}


def run_profile(config: ProfileConfig) -> dict[str, Any]:
    """Measure, fit and write costs.json."""
    from jaxsys.cluster import join
    from jaxsys.core.report import atomic_write, print_table

    member = join(local_devices=config.devices)
    import jax

    from jaxsys.moe.contract import Axes
    from jaxsys.moe.profile import ELEMENTS, expert_mesh, profile

    mesh = expert_mesh(jax.devices(), config.expert, config.tensor)
    found = profile(
        mesh,
        Axes(expert="expert", tensor="tensor"),
        elements=config.elements or ELEMENTS,
        width=config.width,
        repeats=config.repeats,
        min_r2=config.min_r2,
        on_operation=lambda name: None if config.json else print(f"timing {name}", flush=True),
    )
    out = config.out or Path("runs/moe-profile")
    rows = [
        {
            "operation": name,
            "α, ms": line["alpha_s"] * 1e3,
            "β, ns": line["beta_s_per_unit"] * 1e9,
            "r²": line["r2"],
            "points": len(found.points[name]),
        }
        for name, line in asdict(found.costs).items()
    ]
    if member.process_id == 0:
        atomic_write(out / "costs.json", found.costs.to_json())
        if not config.json:
            print_table(rows, title=f"{mesh.shape['expert']} expert ranks × {config.tensor}")
            print(f"lines: {out / 'costs.json'}")
    return {"rows": rows, "points": found.points, "out": str(out)}


def run_train(config: TrainConfig) -> dict[str, Any]:
    """Train, log, and save the model."""
    from jaxsys.cluster import join
    from jaxsys.core.checkpoint import RunStore
    from jaxsys.core.report import atomic_write, print_table, to_json
    from jaxsys.moe.contract import LayerPlan, MoEPlan
    from jaxsys.moe.train import Job, save_model, train
    from jaxsys.train.logs import JsonLines, Tee, TensorBoard, WeightsAndBiases, Writer

    plan = MoEPlan((LayerPlan(config.forward, config.backward),))
    if config.plan is not None:
        try:
            plan = MoEPlan.from_json(config.plan.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"the plan {str(config.plan)!r} cannot be read ({error.strerror}); expected the "
                "plan.json of `jaxsys moe plan`; correct the path"
            ) from error
    first = join(local_devices=config.devices).process_id == 0
    out = config.out or Path("runs/moe-train")
    job = Job(
        config.task,
        config.steps,
        config.seed,
        config.data,
        config.tensor,
        plan,
        config.save_every,
        config.eval_every,
    )
    writers: list[Writer] = [JsonLines(out / "metrics.jsonl")] if first else []
    if first and "tensorboard" in config.loggers:
        writers.append(TensorBoard(out / "tensorboard"))
    if first and "wandb" in config.loggers:
        writers.append(WeightsAndBiases("jaxsys-moe", asdict(config), out))

    def on_step(i: int, row: dict[str, float]) -> None:
        if first and not config.json:
            shown = f"step {i}: loss {row['loss']:.4f}, dropped {row['dropped']:.1%}"
            shown += f", busiest expert {row['imbalance']:.2f} x its share"
            shown += f", held out {row['valid_loss']:.4f}" if "valid_loss" in row else ""
            print(f"{shown}, {row['step_s']:.2f} s", flush=True)

    writer = Tee(*writers)
    try:
        trained = train(job, store=RunStore(out / "checkpoints"), writer=writer, on_step=on_step)
    finally:
        writer.close()
    form = save_model(trained, config.task, out / "model")
    result = {
        "mesh": dict(trained.mesh.shape),
        "parameters": sum(x.size for x in _leaves(trained.params)),
        "losses": list(trained.losses),
        "valid_loss": trained.valid_loss,
        "bytes_per_token": trained.setup.bytes_per_token,
        "model": str(out / "model"),
        "form": form,
    }
    if first:
        atomic_write(out / "result.json", to_json(result))
        if not config.json:
            row = {k: result[k] for k in ("mesh", "parameters", "valid_loss", "form", "model")}
            print_table([row], title="trained")
    return result


def _leaves(tree: Any) -> list[Any]:
    import jax

    return jax.tree.leaves(tree)


COMMANDS = {
    "plan": (PlanConfig, run_plan),
    "profile": (ProfileConfig, run_profile),
    "train": (TrainConfig, run_train),
}
