"""`jaxsys edit curve|trace|stats`: what edits do to a model, where facts lie, second moments."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from jaxsys.cli.edit_options import Facts, read_requests, read_settings, read_stats
from jaxsys.cli.model_options import ModelName
from jaxsys.cli.options import Common, Output
from jaxsys.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CurveCommand(Facts, Common):
    """Measure abilities against the number of edits, by method; a run that was stopped goes on.

    Attributes:
      model: A name (smollm2, stories260k, tiny) or a path: a Hugging Face folder, .gguf, .bin.
      out: Folder for cells.jsonl (cells that are there are not done again), curve.md, curve.png.
      seed: Seed of the sampled texts.
      methods: To compare: editing methods, or names of your own that --settings explains.
      settings: JSON file: name to fields of that method's configuration; a name of your own also
        says of which "method", as in {"plain": {"method": "rome", "statistics": false}}.
      counts: Edits after which the model is evaluated.
      batch: Facts of one edit; 0 makes all n edits at once from the unedited model, for each n.
      task: Built-in tasks (see jaxsys lm eval --help), or .jsonl or .txt files.
      questions: Take the first questions of each task only.
      windows: Take the first windows of each text only.
      window: Input tokens of a window.
      data: Folder with eval/ and text/; JAXSYS_DATA by default.
      probed: Most of the facts edited so far that are asked about, spread evenly.
      answer_tokens: Length of the answer that is written freely and searched for the target.
      fluency_tokens: Length of the sampled texts whose n-gram entropy is taken; 0 for none.
    """

    model: ModelName
    methods: tuple[str, ...] = ("rome", "memit")
    settings: Path | None = None
    counts: tuple[int, ...] = (0, 1, 5, 10, 20, 50, 100)
    batch: int = 1
    task: tuple[str, ...] = ("arc_easy", "openbookqa")
    questions: int | None = None
    windows: int | None = 8
    window: int | None = 256
    data: Path | None = None
    probed: int = 50
    answer_tokens: int = 16
    fluency_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class TraceCommand(Facts, Common):
    """Find where facts lie: which states bring a corrupted subject's answer back.

    Attributes:
      model: A name (smollm2, stories260k, tiny) or a path: a Hugging Face folder, .gguf, .bin.
      out: Folder for trace.json and the heat map (of one fact) or the curves (of many).
      seed: Seed of the noise.
      prompt: The text before the answer, with the subject in it, for one fact.
      subject: What that fact is about.
      answer: The answer whose probability is followed; what the model itself says by default.
      kinds: What to restore: layer, mlp, attention; layers to edit are chosen by mlp.
      samples: Draws of noise.
      noise: Its size in standard deviations of the subjects' embeddings.
      window: Blocks restored together for feed-forward parts and attention.
      count: Layers to choose at most.
    """

    model: ModelName
    prompt: str | None = None
    subject: str | None = None
    answer: str | None = None
    kinds: tuple[str, ...] = ("layer", "mlp", "attention")
    samples: int = 10
    noise: float = 3.0
    window: int = 10
    count: int = 5


@dataclass(frozen=True, kw_only=True)
class StatsCommand(Output):
    """Average k kᵀ over a text, for ROME with statistics, MEMIT, PMET, EMMET and AlphaEdit.

    Attributes:
      model: A name (smollm2, stories260k, tiny) or a path: a Hugging Face folder, .gguf, .bin.
      out: Folder to write; statistics-MODEL beside the caller by default.
      layers: Whose keys; all by default.
      text: UTF-8 text; Python's own language reference by default.
      tokens: Take that many tokens of it at most.
      length: Tokens of a row.
      rows: Rows at a time.
    """

    spreads: ClassVar[bool] = True

    model: ModelName
    out: Path | None = None
    layers: tuple[int, ...] = ()
    text: Path | None = None
    tokens: int = 100_000
    length: int = 128
    rows: int = 8


def run_curve(config: CurveCommand) -> dict[str, Any]:
    """Print the table while it grows, and draw the figure."""
    from jaxsys.core.report import atomic_write, markdown_table, print_table
    from jaxsys.edit.curve import CurveConfig, Grid
    from jaxsys.edit.curve_figure import curve_table, draw_curve
    from jaxsys.edit.evaluation import EvaluationConfig
    from jaxsys.edit.files import open_for_editing
    from jaxsys.evaluate import load_task

    chosen = _compared(config)
    tasks = [load_task(name, config.data).head(config.questions) for name in config.task]
    records = read_requests(config)
    how = EvaluationConfig(config.answer_tokens, config.fluency_tokens, seed=config.seed)
    curve = CurveConfig(config.counts, config.batch, config.probed, how)
    stats = read_stats(config)
    editable, params = open_for_editing(config.model)

    def tell(cell: dict[str, Any]) -> None:
        told = ", ".join(f"{k} {v}" for k, v in curve_table([cell])[0].items())
        print(told, file=sys.stderr, flush=True)

    grid = Grid(
        editable,
        params,
        records,
        tasks,
        curve,
        name=config.model,
        folder=config.out,
        stats=stats,
        options={"window": config.window, "most_windows": config.windows},
        tell=tell,
    )
    cells = grid.run(chosen)
    table = curve_table(cells)
    if config.out is not None:
        atomic_write(config.out / "curve.md", markdown_table(table))
        if any(cell["n"] and "failed" not in cell for cell in cells):
            draw_curve(cells, config.out / "curve.png", config.model)
    if not config.json:
        print_table(table, title=f"{config.model}, {config.batch or 'all'} at a time")
    return {"model": config.model, "cells": cells}


def _compared(config: CurveCommand) -> list[Any]:
    """Make the methods of a curve, each with its settings."""
    from jaxsys.edit.contract import find_method
    from jaxsys.edit.curve import Chosen
    from jaxsys.edit.methods import METHODS
    from jaxsys.edit.protocol import configure

    settings = read_settings(config.settings)
    unknown = sorted(set(settings) - set(config.methods))
    if unknown:
        raise UserError(
            f"--settings has fields for {', '.join(unknown)}, which --methods does not name; add "
            "the name there or leave it out"
        )
    chosen = []
    for name in config.methods:
        own = settings.get(name, {})
        if not isinstance(own, dict):
            raise UserError(f"--settings has a {type(own).__name__} for {name}; expected an object")
        given = dict(own)
        method = find_method(METHODS, given.pop("method", name))
        chosen.append(Chosen(name, method, configure(name, method, given)))
    return chosen


def run_trace(config: TraceCommand) -> dict[str, Any]:
    """Print the layers that matter, and draw them."""
    from jaxsys.core.report import atomic_write, save_figure, to_json
    from jaxsys.edit.contract import Request, check_requests
    from jaxsys.edit.files import open_for_editing
    from jaxsys.edit.trace import choose_layers, subject_sigma, trace
    from jaxsys.edit.trace_figure import heat_map, mean_effects
    from jaxsys.evaluate.run import progress_bar

    if "mlp" not in config.kinds:
        raise UserError(
            f"--kinds names {' '.join(config.kinds) or 'nothing'}; layers are chosen by what mlp "
            "brings back; add mlp"
        )
    one = config.prompt is not None and config.subject is not None
    if one == (config.records is not None):
        raise UserError(
            "expected either --prompt and --subject of one fact, or --records FILE; give one"
        )
    if one:
        assert config.prompt is not None
        assert config.subject is not None
        prompt = config.prompt.replace("{}", config.subject)
        requests = [Request(prompt, config.subject, config.answer or "-")]
        check_requests(requests)
    else:
        requests = [record.request for record in read_requests(config)]
    editable, params = open_for_editing(config.model)
    sigma = subject_sigma(editable, params, requests)
    found = []
    with progress_bar("trace") as bar:
        for request in requests:
            follow = config.answer if one else request.truth
            found.append(
                trace(
                    editable,
                    params,
                    request,
                    kinds=config.kinds,
                    follow=follow,
                    samples=config.samples,
                    noise=config.noise,
                    sigma=sigma,
                    window=config.window,
                    seed=config.seed,
                )
            )
            bar(len(found), len(requests))
    layers = choose_layers(found, config.count)
    result = {"layers": layers, "traces": [t._asdict() for t in found]}
    if config.out is not None:
        atomic_write(config.out / "trace.json", to_json(result) + "\n")
        save_figure(heat_map(found[0]) if one else mean_effects(found), config.out / "trace.png")
    if not config.json:
        if one:
            told = found[0]
            print(f"{told.answer.strip()!r}: {told.clean:.3f}, with noise {told.corrupted:.3f}")
        print(f"ROME: layer {layers[-1]}; MEMIT: layers {' '.join(map(str, layers))}")
    return result


def run_stats(config: StatsCommand) -> dict[str, Any] | None:
    """Write the second moments."""
    from jaxsys.cluster.join import join

    join(local_devices=1)

    import jax

    from jaxsys.data import python_docs, read_text
    from jaxsys.edit import stats
    from jaxsys.edit.files import open_for_editing
    from jaxsys.evaluate.run import progress_bar

    if min(config.tokens, config.length, config.rows) < 1:
        raise UserError(
            f"tokens is {config.tokens}, length {config.length}, rows {config.rows}; expected at "
            "least 1 of each; correct them"
        )
    editable, params = open_for_editing(config.model)
    text = python_docs() if config.text is None else read_text(config.text)
    length = min(config.length, editable.config.max_positions)
    # Far more characters than tokens are wanted: no need to encode a whole encyclopedia.
    ids = editable.tokenizer.encode(text[: 16 * config.tokens])[: config.tokens]
    rows = config.rows * len(jax.local_devices())
    everything = list(stats.windows(ids, rows, length))
    members = jax.process_count()
    each = len(everything) // members or 1
    own = everything[jax.process_index() * each :][:each]
    layers = config.layers or tuple(range(editable.config.layers))
    with progress_bar("second moments") as bar:
        found = stats.collect(
            editable, params, own, layers, on_batch=lambda n: bar(n, each * members * rows * length)
        )
    if jax.process_index() > 0:
        return None
    out = config.out or Path(f"statistics-{Path(config.model).name}")
    files = stats.save(out, found)
    if not config.json:
        print(f"{out}: {len(layers)} layers from {found.tokens} tokens")
    return {"files": [str(f) for f in files], "tokens": found.tokens, "layers": list(layers)}


COMMANDS = {
    "curve": (CurveCommand, run_curve),
    "trace": (TraceCommand, run_trace),
    "stats": (StatsCommand, run_stats),
}
