"""What the experiments on editing share: the model, its statistics, facts it can be tested on."""

import json
import os
from pathlib import Path
from typing import Any

from jaxsys.core.errors import UserError
from jaxsys.core.mesh import replica_mesh
from jaxsys.core.report import atomic_write, to_json
from jaxsys.data import python_docs
from jaxsys.edit import stats
from jaxsys.edit.contract import Editable, Record, Request
from jaxsys.edit.evaluation import digest
from jaxsys.edit.records import load_records
from jaxsys.evaluate.protocol import from_lm
from jaxsys.evaluate.score import encode_pair, score

RESULTS = Path(__file__).parent / "results"


def data_file(name: str) -> Path:
    """Find a file of the data folder."""
    folder = os.environ.get("JAXSYS_DATA")
    if not folder:
        raise UserError("JAXSYS_DATA names no data folder; set it")
    return Path(folder) / name


def testable(model: Editable, params: Any, count: int, name: str) -> list[Record]:
    """Give the first CounterFact records whose old answer the unedited model finds likelier.

    Where the new answer is likelier from the start there is nothing to edit. Which they are is kept
    in `results/facts_NAME.json`.
    """
    file, mark = RESULTS / f"facts_{name}.json", digest(params)
    records = load_records(data_file("edit/counterfact.json")).records
    known = json.loads(file.read_text()) if file.exists() else {}
    chosen, seen = known.get("chosen", []), known.get("seen", 0)
    if known.get("model") != mark:
        chosen, seen = [], 0
    told = from_lm(params, model.config)
    while len(chosen) < count:
        part = records[seen : seen + 64]
        if not part:
            raise UserError(f"the file has {len(chosen)} such facts; ask for no more")
        asked = [
            encode_pair(model.tokenizer, r.request.prompt, f" {answer}")
            for r in part
            for answer in (r.request.target, r.request.truth)
        ]
        found = score(told, asked)
        likely = found.log_likelihood / found.tokens
        chosen += [seen + i for i in range(len(part)) if likely[2 * i] < likely[2 * i + 1]]
        seen += len(part)
        atomic_write(file, to_json({"model": mark, "seen": seen, "chosen": chosen}) + "\n")
    return [records[i] for i in chosen[:count]]


def small_records(count: int) -> list[Record]:
    """Make facts for a smoke run, which needs no data."""
    names = ("Ada", "Ben", "Cleo", "Dora", "Egon", "Fay")
    return [
        Record(
            Request(f"The home of {names[i % 6]} {i} is in", f"{names[i % 6]} {i}", "Rome", "Oslo"),
            (f"{names[i % 6]} {i} lives in",),
            (("The snow falls in", "Oslo"),),
        )
        for i in range(count)
    ]


def small_statistics(model: Editable, params: Any, layers: tuple[int, ...]) -> stats.Statistics:
    """Take second moments of keys over a few rows, for smoke runs."""
    ids = model.tokenizer.encode(python_docs()[:4_000])
    return stats.collect(model, params, stats.windows(ids, 4, 64), layers, mesh=one_device())


def read_statistics(folder: Path | None, params: Any) -> stats.Statistics | None:
    """Read what `statistics.py` wrote, and make sure that it is this model's."""
    if folder is None or not folder.exists():
        return None
    found = stats.load(folder)
    stats.check_model(found, params)
    return found


def one_device() -> Any:
    """Make a mesh of the first device."""
    import jax

    return replica_mesh(jax.devices()[:1])
