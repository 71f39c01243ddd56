"""Many methods on one model: a table, and a figure of perplexity by method and pattern."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Integer

from jaxsys.core import report
from jaxsys.core.errors import UserError
from jaxsys.core.tree import flatten, unflatten
from jaxsys.evaluate import from_lm, perplexity
from jaxsys.prune.blocks import Blocks, block_gradients
from jaxsys.prune.methods import SOLVERS, find_method
from jaxsys.prune.patterns import Pattern
from jaxsys.prune.protocol import sequential

Evaluate = Callable[[Any], Mapping[str, float]]


def applies(name: str, pattern: Pattern) -> bool:
    """Say whether a method goes with a pattern.

    >>> applies("owl", Pattern(nm=(2, 4))), applies("dsnot", Pattern(block=(2, 2)))
    (False, False)
    """
    method = find_method(name)
    if pattern.nm:
        return method.ratios == "uniform"
    whole = method.metric in SOLVERS or method.refine == "dsnot"
    return not method.permute and not (pattern.block and whole)


def compare(
    blocks: Blocks,
    params: Any,
    calibrations: Mapping[int, Integer[np.ndarray, "N T"]],
    methods: Sequence[str],
    patterns: Sequence[Pattern],
    evaluate: Evaluate,
    *,
    known: Sequence[tuple[Any, ...]] = (),
    batch: int = 1,
) -> Iterator[dict[str, Any]]:
    """Prune a model by every method that goes with every pattern, and evaluate each result.

    Args:
        blocks: the model.
        params: its tree, in memory.
        calibrations: seed to calibration sequences.
        methods: names or expressions; ``dense`` is the model as it is, once.
        patterns: each is tried with each method.
        evaluate: the pruned tree to figures by name.
        known: (method, pattern, seed) of rows that need not be done again.
        batch: calibration sequences at a time.

    Yields:
        Rows with method, pattern, seed, sparsity, seconds of pruning, and the figures.

    Raises:
        UserError: if no method goes with a pattern.

    >>> from jaxsys.models import lm
    >>> from jaxsys.prune.blocks import lm_blocks
    >>> import jax
    >>> config = lm.LMConfig("llama", 9, 4, 1, 1, 1, 4, 4, 8)
    >>> rows = compare(lm_blocks(config), lm.init(jax.random.key(0), config),
    ...     {0: np.zeros((1, 4), np.int32)}, ("dense", "magnitude"), (Pattern(0.5),),
    ...     lambda tree: {"loss": 0.0})
    >>> [(row["method"], row["sparsity"]) for row in rows]
    [('dense', 0.0), ('magnitude', 0.5)]
    """
    flat, seen = flatten(params), {tuple(map(str, key)) for key in known}
    names = [name for name in methods if name != "dense"]
    for pattern in patterns:
        if names and not any(applies(name, pattern) for name in names):
            raise UserError(
                f"none of {', '.join(names)} goes with the pattern {pattern}; choose others"
            )
    first = next(iter(calibrations))
    if "dense" in methods and ("dense", "-", str(first)) not in seen:
        row = {"method": "dense", "pattern": "-", "seed": first, "sparsity": 0.0, "prune_s": 0.0}
        yield row | dict(evaluate(params))
    for seed, tokens in calibrations.items():
        gradients = None
        for pattern in patterns:
            for name in names:
                key = (name, str(pattern), str(seed))
                if key in seen or not applies(name, pattern):
                    continue
                method, begin_s = find_method(name), time.perf_counter()
                if gradients is None and method.needs & {"G", "G1"}:
                    gradients = block_gradients(blocks, flat, tokens)
                    begin_s = time.perf_counter()
                given = gradients if method.needs & {"G", "G1"} else None
                tree, kept, total = dict(flat), 0, 0
                run = sequential(
                    blocks, flat, tokens, method, pattern, gradients=given, batch=batch
                )
                for found in run:
                    tree |= found.tensors
                    kept += sum(int(jnp.sum(mask)) for mask in found.masks.values())
                    total += sum(mask.size for mask in found.masks.values())
                row = {
                    "method": name,
                    "pattern": str(pattern),
                    "seed": seed,
                    "sparsity": 1 - kept / total,
                    "prune_s": time.perf_counter() - begin_s,
                }
                yield row | dict(evaluate(unflatten(tree)))


def held_out_perplexity(
    config: Any, tokenizer: Any, text: str, *, length: int, windows: int
) -> Evaluate:
    """Make an evaluation of trees of `models.lm`: perplexity of the first windows of a text.

    Args:
        config: the model.
        tokenizer: its own.
        text: that calibration has not seen.
        length: input tokens of a window.
        windows: how many.

    Returns:
        Tree to ``perplexity`` and ``nats`` for each token.

    >>> held_out_perplexity(None, None, "text", length=8, windows=1).__name__
    'evaluate'
    """

    def evaluate(tree: Any) -> dict[str, float]:
        found = perplexity(
            from_lm(tree, config), tokenizer, [text], length=length, most_windows=windows
        )
        return {"perplexity": found.per_token, "nats": found.nats_per_token}

    return evaluate


def known_rows(
    folder: Path, settings: Mapping[str, Any], texts: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Read the rows of a comparison that go on in a folder; a new one notes its settings there.

    Args:
        folder: with ``compare.json``, the settings, and ``compare.jsonl``, the rows, if any.
        settings: what must be the same for rows to be compared, such as the model.
        texts: as well, by name; their hashes are noted.

    Returns:
        Rows that are done.

    Raises:
        UserError: if the folder holds rows of other settings.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> known_rows(folder, {"length": 8}, {"text": "a b"})
    []
    """
    noted, file = folder / "compare.json", folder / "compare.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    prints = {k: hashlib.blake2b(v.encode(), digest_size=8).hexdigest() for k, v in texts.items()}
    mine = json.loads(report.to_json(dict(settings) | prints))
    if not rows:
        report.atomic_write(noted, report.to_json(mine) + "\n")
        return []
    held = json.loads(noted.read_text()) if noted.exists() else {}
    for name, value in mine.items():
        if held.get(name) != value:
            raise UserError(
                f"{folder} holds another comparison: for {name} it has {held.get(name)} and this "
                f"one {value}; give the same settings or another folder"
            )
    return rows


def summarise(rows: Sequence[Mapping[str, Any]], figure: str) -> list[dict[str, Any]]:
    """Lay out one figure: methods down, patterns across, mean over seeds (with the range).

    >>> rows = [{"method": "wanda", "pattern": "50%", "seed": s, "loss": 2.0 + s} for s in (0, 1)]
    >>> summarise(rows, "loss")
    [{'method': 'wanda', '50%': '2.5 (2-3)'}]
    """
    table: dict[str, dict[str, Any]] = {}
    patterns = dict.fromkeys(row["pattern"] for row in rows if row["pattern"] != "-")
    for row in rows:
        table.setdefault(row["method"], {"method": row["method"]})
    for name, out in table.items():
        for pattern in patterns:
            found = [
                row[figure]
                for row in rows
                if row["method"] == name and row["pattern"] in (pattern, "-")
            ]
            if found:
                mean, low, high = np.mean(found), np.min(found), np.max(found)
                spread = f" ({low:.4g}-{high:.4g})" if len(found) > 1 else ""
                out[pattern] = f"{mean:.4g}{spread}"
    return list(table.values())


def plot(rows: Sequence[Mapping[str, Any]], figure: str, path: Any, title: str = "") -> None:
    """Draw one figure by method, a panel for each pattern, a dot for each seed.

    Args:
        rows: from `compare`.
        figure: its name in the rows.
        path: ends in .png, .svg or .pdf.
        title: above.

    Raises:
        UserError: if only the dense model was scored.

    >>> import tempfile
    >>> rows = [{"method": "wanda", "pattern": "50%", "seed": 0, "loss": 2.0}]
    >>> plot(rows, "loss", f"{tempfile.mkdtemp()}/a.png")
    """
    patterns = list(dict.fromkeys(row["pattern"] for row in rows if row["pattern"] != "-"))
    if not patterns:
        raise UserError("there is no pruned row to draw; compare at least one method but dense")
    fig, axes = report.figure(1, len(patterns), width=3.2, height=3.4)
    dense = [row[figure] for row in rows if row["method"] == "dense"]
    for axis, pattern in zip(axes[0], patterns, strict=True):
        own = [row for row in rows if row["pattern"] == pattern]
        names = list(dict.fromkeys(row["method"] for row in own))
        for row in own:
            axis.plot(row[figure], names.index(row["method"]), "o", color=report.COLOURS[0])
        for value in dense:
            axis.axvline(value, color=report.COLOURS[6], linewidth=0.8)
        # An expression may be longer than the figure is wide.
        short = [name if len(name) <= 20 else f"{name[:19]}…" for name in names]
        axis.set_yticks(range(len(names)), short)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_xlabel(figure)
        axis.set_title(pattern)
    if title:
        fig.suptitle(title, fontsize=9)
    report.save_figure(fig, path)
