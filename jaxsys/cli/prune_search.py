"""`jaxsys prune search`: find a pruning metric by genetic programming."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from jaxsys.cli.options import Common


@dataclass(frozen=True, kw_only=True)
class SearchCommand(Common):
    """Search the expression over W, G, X whose pruned model predicts text best.

    Under `jaxsys launch` the processes share the individuals, with the same result as one.

    Attributes:
      model: A name (smollm2, stories260k, tiny) or a path: a Hugging Face folder, .gguf, .bin.
      out: Folder for search.json, search.md, curve.png and the state; a search that was stopped
        goes on there, and one with more generations is continued.
      sparsity: Share of the weights to remove, in [0, 1).
      pattern: unstructured (rows), matrix, n:m such as 2:4 (n of m are kept), or blocks such as
        16x16.
      population: Individuals.
      generations: How many times as many expressions are scored.
      mode: Children are added and the best remain (steady), or they replace all but two elites
        (generational).
      strategy: random draws anew each time, for comparison.
      oos: Simplify programs: sound keeps their value, paper cancels opposing operations.
      operators: The paper's 15, or a protected elementwise set.
      terminals: Out of W G X G1 R C: weight, gradients (L2, L1), input, sums of rows and columns.
      constants: Numbers that may stand where a terminal may.
      promote: Share of a generation whose loss is computed; the others by layer error only.
      text: Text, UTF-8, for all three purposes; Python's own language reference by default.
      calibration: Windows from which the statistics come.
      windows: Windows whose loss is minimised.
      held_out: Windows that only the finalists see.
      length: Tokens of a window.
      top: Finalists.
      devices: On a CPU, share the individuals among so many devices, each with a copy of the model;
        as many as there are cores score faster, with the same result.
    """

    spreads: ClassVar[bool] = True

    model: Annotated[str, tyro.conf.Positional]
    sparsity: float = 0.5
    pattern: str = "unstructured"
    population: int = 64
    generations: int = 20
    mode: Literal["steady", "generational"] = "steady"
    strategy: Literal["evolution", "random"] = "evolution"
    oos: Literal["sound", "paper", "none"] = "sound"
    operators: Literal["paper", "protected"] = "paper"
    terminals: tuple[str, ...] = ("W", "G", "X")
    constants: tuple[float, ...] = ()
    promote: float = 1.0
    text: Path | None = None
    calibration: int = 16
    windows: int = 8
    held_out: int = 16
    length: int = 128
    top: int = 10
    devices: int = 1


def run_search(config: SearchCommand) -> dict[str, Any] | None:
    """Print the finalists beside the metrics that people use."""
    from jaxsys.cluster.join import join
    from jaxsys.core.errors import UserError

    if config.devices < 1:
        raise UserError(f"--devices is {config.devices}; expected at least 1; correct it")
    join(local_devices=config.devices)

    from dataclasses import replace

    import jax

    from jaxsys.core.mesh import on_cpu, replica_mesh
    from jaxsys.core.report import print_table
    from jaxsys.data import python_docs, read_text
    from jaxsys.evaluate.open import open_model
    from jaxsys.evaluate.run import progress_bar
    from jaxsys.prune.expression import TERMINALS
    from jaxsys.prune.genetic import EVOLVE, GeneticConfig
    from jaxsys.prune.patterns import parse_pattern
    from jaxsys.prune.population import Scoring
    from jaxsys.prune.search_model import LmLoss, draw_texts, search_lm, write_search
    from jaxsys.search.operators import SETS
    from jaxsys.search.programs import Grammar

    unknown = [name for name in config.terminals if name not in TERMINALS]
    if unknown:
        raise UserError(
            f"terminal {unknown[0]!r} is unknown; expected some of {', '.join(TERMINALS)}"
        )
    grammar = Grammar(config.terminals, SETS[config.operators], config.constants)
    pattern = parse_pattern(config.pattern, config.sparsity)
    oos = None if config.oos == "none" else config.oos
    evolve = replace(EVOLVE, population=config.population, mode=config.mode, oos=oos)
    genetic = GeneticConfig(evolve, config.generations, config.strategy, seed=config.seed)
    opened = open_model(config.model)
    text = python_docs() if config.text is None else read_text(config.text)
    windows = (config.calibration, config.windows, config.held_out)
    ids = opened.tokenizer.encode(text)
    texts = draw_texts(ids, windows, config.length, seed=config.seed)
    scoring = Scoring(LmLoss(opened.config), grammar, pattern, config.promote)
    # Two devices of a CPU with two cores score 1.5 times as fast as one, with twice the memory.
    wanted = config.devices > 1 or not on_cpu()
    spread = jax.process_count() > 1 or (wanted and len(jax.devices()) > 1)
    with progress_bar(f"search {pattern}") as progress:
        found, rows = search_lm(
            opened.model.params,
            opened.config,
            texts,
            scoring,
            genetic,
            out=config.out,
            mesh=replica_mesh() if spread else None,
            top=config.top,
            progress=progress,
        )
    if jax.process_index() > 0:
        return None
    files = []
    if config.out is not None:
        files = write_search(config.out, found, rows, f"{config.model} at {pattern}")
    if not config.json:
        print_table(rows, title=f"{config.model} at {pattern}: loss in nats per token")
    return {
        "model": config.model,
        "pattern": str(pattern),
        "rows": rows,
        "history": found.history,
        "files": [str(file) for file in files],
    }
