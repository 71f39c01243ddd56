"""`jaxsys prune`: remove weights after training, compare methods, search for metrics."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from jaxsys.cli.model_options import Dtype, ModelName, dtype_of
from jaxsys.cli.options import Common, Output
from jaxsys.cli.prune_search import SearchCommand, run_search


@dataclass(frozen=True, kw_only=True)
class RunCommand(Output):
    """Prune a model and write it as a checkpoint; a run that was stopped goes on where it was.

    Under `jaxsys launch` the processes share the layers of a block, with the same result as one.

    Attributes:
      model: A name (smollm2, stories260k, tiny) or a path: a Hugging Face folder, .gguf, .bin.
      out: Folder for the checkpoint.
      seed: Seed of the calibration windows.
      metric: magnitude wanda wanda_alpha sparsegpt ria ria_permuted gradient gblm pruner_zero dsnot
        alps owl besa wanda_update, or an expression over W, G, X such as 'W*sqrt(X)'.
      sparsity: Share of the weights to remove, in [0, 1).
      pattern: unstructured (compares what the metric was published with), row, matrix, n:m such as
        2:4 (n of m are kept), or blocks such as 16x16.
      ratios: Spread the sparsity over the layers by outliers (owl) or by learning (besa).
      refine: Exchange removed and kept weights afterwards (dsnot).
      update: Let the weights that stay make up for the others (sparsegpt).
      layers: Globs over the paths of the layers to prune.
      text: Calibration text, UTF-8; Python's own language reference by default.
      sequences: Calibration windows.
      length: Tokens of each.
      batch: Calibration windows at a time; more needs more memory.
      form: dense keeps the zeros; packed writes bit masks and values; nm writes an n:m pattern.
      dtype: Of the written tensors; file keeps what was read.
    """

    spreads: ClassVar[bool] = True

    model: ModelName
    out: Path
    seed: int = 0
    metric: str = "wanda"
    sparsity: float = 0.5
    pattern: str = "unstructured"
    ratios: Literal["uniform", "owl", "besa"] | None = None
    refine: Literal["none", "dsnot"] | None = None
    update: Literal["none", "sparsegpt"] | None = None
    layers: tuple[str, ...] = ("*",)
    text: Path | None = None
    sequences: int = 16
    length: int = 256
    batch: int = 1
    form: Literal["dense", "packed", "nm"] = "dense"
    dtype: Dtype = "file"


@dataclass(frozen=True, kw_only=True)
class CompareCommand(Common):
    """Prune a model by many methods and compare perplexity on text that none of them saw.

    Attributes:
      model: A name (smollm2, stories260k, tiny) or a path: a Hugging Face folder, .gguf, .bin.
      out: Folder for compare.jsonl (rows that are there are not done again), .md and .png.
      seed: First of the seeds.
      methods: Names, or expressions over W, G, X; see `jaxsys prune run --help`. All by default;
        those that do not go with a pattern are left out there.
      patterns: unstructured, row, matrix, n:m such as 2:4, or blocks such as 16x16.
      sparsities: Shares to remove, for patterns other than n:m.
      text: Calibration text; Python's own language reference by default.
      test_text: Text to score; by default the last fifth of the calibration text, which is then not
        calibrated on.
      sequences: Calibration windows.
      length: Tokens of a window, of calibration and of scoring.
      windows: Windows that are scored.
      seeds: How many draws of calibration windows.
    """

    model: ModelName
    methods: tuple[str, ...] = (
        "dense",
        "magnitude",
        "wanda",
        "wanda_alpha",
        "sparsegpt",
        "ria",
        "ria_permuted",
        "gradient",
        "gblm",
        "pruner_zero",
        "dsnot",
        "alps",
        "owl",
        "besa",
        "wanda_update",
    )
    patterns: tuple[str, ...] = ("unstructured",)
    sparsities: tuple[float, ...] = (0.5,)
    text: Path | None = None
    test_text: Path | None = None
    sequences: int = 8
    length: int = 256
    windows: int = 16
    seeds: int = 1


def run_run(config: RunCommand) -> dict[str, Any] | None:
    """Write the checkpoint and say what was removed."""
    from jaxsys.cluster.join import join

    join(local_devices=1)

    from dataclasses import replace

    from jaxsys.core.report import format_bytes
    from jaxsys.data import load_tokenizer, python_docs, read_text, save_tokenizer
    from jaxsys.evaluate.run import progress_bar
    from jaxsys.models import lm
    from jaxsys.prune.calibrate import calibration
    from jaxsys.prune.methods import find_method
    from jaxsys.prune.patterns import parse_pattern
    from jaxsys.prune.run import prune_checkpoint

    pattern = parse_pattern(config.pattern, config.sparsity)
    given = {name: getattr(config, name) for name in ("ratios", "refine", "update")}
    method = replace(
        find_method(config.metric), **{k: v for k, v in given.items() if v is not None}
    )
    path = lm.find_model(config.model)
    tokenizer = load_tokenizer(path)
    text = python_docs() if config.text is None else read_text(config.text)
    tokens = calibration(tokenizer, text, config.sequences, config.length, seed=config.seed)

    def tell(need: Any) -> None:
        told = ", ".join(f"{format_bytes(size)} on the {place}" for place, size in need.items())
        print(f"this needs about {told}, and the checkpoint's size on disk twice", file=sys.stderr)

    with progress_bar(f"{config.metric} {pattern}") as progress:
        done = prune_checkpoint(
            path,
            config.out,
            tokens,
            method,
            pattern,
            form=config.form,
            layers=config.layers,
            dtype=dtype_of(config.dtype),
            batch=config.batch,
            on_memory=tell,
            on_block=lambda i, n, found: progress(i, n),
        )
    if done is None:
        return None
    save_tokenizer(config.out, tokenizer)
    if not config.json:
        print(
            f"{100 * done.sparsity:.2f}% of the weights in {len(done.rows)} layers removed; "
            f"{format_bytes(done.bytes)} written, dense it is {format_bytes(done.dense_bytes)}"
        )
    return {
        "files": [str(file) for file in done.files],
        "sparsity": done.sparsity,
        "bytes": done.bytes,
        "dense_bytes": done.dense_bytes,
        "layers": list(done.rows),
    }


def run_compare(config: CompareCommand) -> dict[str, Any]:
    """Print the table while it grows, and draw the figure."""
    from jaxsys.core.report import append_jsonl, atomic_write, markdown_table, print_table
    from jaxsys.data import python_docs, read_text
    from jaxsys.evaluate.open import open_model
    from jaxsys.prune.blocks import lm_blocks
    from jaxsys.prune.calibrate import calibration
    from jaxsys.prune.compare import compare, held_out_perplexity, known_rows, plot, summarise
    from jaxsys.prune.patterns import parse_pattern

    patterns = tuple(
        parse_pattern(name, sparsity)
        for name in config.patterns
        for sparsity in (config.sparsities[:1] if ":" in name else config.sparsities)
    )
    text = python_docs() if config.text is None else read_text(config.text)
    if config.test_text is None:
        cut = len(text) * 4 // 5
        text, test = text[:cut], text[cut:]
    else:
        test = read_text(config.test_text)
    opened = open_model(config.model)
    seeds = range(config.seed, config.seed + config.seeds)
    calibrations = {
        seed: calibration(opened.tokenizer, text, config.sequences, config.length, seed=seed)
        for seed in seeds
    }
    file = None if config.out is None else config.out / "compare.jsonl"
    rows = []
    if config.out is not None:
        fixed = ("model", "sequences", "length", "windows")
        settings = {name: getattr(config, name) for name in fixed}
        rows = known_rows(config.out, settings, {"calibration text": text, "test text": test})
    evaluate = held_out_perplexity(
        opened.config, opened.tokenizer, test, length=config.length, windows=config.windows
    )
    found = compare(
        lm_blocks(opened.config),
        opened.model.params,
        calibrations,
        config.methods,
        patterns,
        evaluate,
        known=[(row["method"], row["pattern"], row["seed"]) for row in rows],
    )
    for row in found:
        rows.append(row)
        if file is not None:
            append_jsonl(file, row)
        print(
            f"{row['method']} {row['pattern']} seed {row['seed']}: "
            f"perplexity {row['perplexity']:.4g}",
            file=sys.stderr,
            flush=True,
        )
    table = summarise(rows, "perplexity")
    if config.out is not None:
        atomic_write(config.out / "compare.md", markdown_table(table))
        if any(row["pattern"] != "-" for row in rows):
            plot(rows, "perplexity", config.out / "compare.png", config.model)
    if not config.json:
        print_table(table, title=f"{config.model}: perplexity of held-out text")
    return {"model": config.model, "rows": rows}


COMMANDS = {
    "run": (RunCommand, run_run),
    "compare": (CompareCommand, run_compare),
    "search": (SearchCommand, run_search),
}
