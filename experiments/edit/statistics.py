"""Take the second moments of SmolLM2-135M's keys over WikiText-2, as MEMIT and AlphaEdit need them.

    python experiments/edit/statistics.py --data DIR --out DIR    # 2 minutes on 2 cores

``DIR`` of ``--data`` holds ``text/wikitext2_valid.txt`` (default: the environment's JAXSYS_DATA).
Writes a folder of 9 MB a layer with the model's fingerprint, a hash of the tokens and their number,
and prints for each layer the trace, the condition and how many directions AlphaEdit's threshold
leaves free. ``--smoke`` does the same for the model ``tiny`` on its own text in seconds.

Expected: mean eigenvalues of 0.01 to 0.06, so that AlphaEdit's published absolute threshold of 0.02
would leave seven to nine directions in ten free: hence its relative form. 30,000 tokens are 20 for
each of the 1,536 inputs; the papers' authors took some 10^8, so the smallest eigenvalues here are
less certain than theirs.
"""

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from jaxsys.core.report import atomic_write, to_json
from jaxsys.data.tokenizer import load_tokenizer
from jaxsys.edit import stats
from jaxsys.edit.contract import Editable
from jaxsys.models import lm


@dataclass(frozen=True)
class Args:
    """Where the text is, and how much of it is read."""

    data: Path = Path(os.environ.get("JAXSYS_DATA", "."))
    out: Path = Path(__file__).parent / "results" / "statistics"
    model: str = "smollm2"
    layers: tuple[int, ...] = (3, 4, 5, 6, 7, 8, 9)
    tokens: int = 30_000
    length: int = 256
    rows: int = 4
    smoke: bool = False


def main(args: Args) -> None:
    """Take, save and describe the statistics."""
    if args.smoke:
        args = Args(args.data, Path(tempfile.mkdtemp()), "tiny", (0, 1), 2_000, 64, 4, smoke=True)
        from jaxsys.data.text import python_docs

        text = python_docs()[:20_000]
    else:
        text = (args.data / "text" / "wikitext2_valid.txt").read_text(encoding="utf-8")
    path = lm.find_model(args.model)
    params, config = lm.load(path)
    model = Editable(config, load_tokenizer(path))
    ids = np.asarray(model.tokenizer.encode(text))[: args.tokens]
    begin_s = time.perf_counter()

    def tell(count: int) -> None:
        print(f"{count} tokens, {time.perf_counter() - begin_s:.0f} s", flush=True)

    batches = stats.windows(ids, args.rows, args.length)
    import jax

    from jaxsys.core.mesh import replica_mesh

    found = stats.collect(
        model, params, batches, args.layers, mesh=replica_mesh(jax.devices()), on_batch=tell
    )
    stats.save(args.out, found)
    rows = []
    for layer in args.layers:
        values = np.linalg.eigvalsh(found.moment(layer).astype(np.float64))
        rows.append(
            {
                "layer": layer,
                "trace": values.sum(),
                "least": values[0],
                "most": values[-1],
                "below_0.02": int((values < 0.02).sum()),
                "width": values.size,
            }
        )
        print(rows[-1], flush=True)
    summary = {
        "model": args.model,
        "fingerprint": found.model,
        "data": found.data,
        "tokens": found.tokens,
        "wall_s": time.perf_counter() - begin_s,
        "layers": rows,
    }
    if not args.smoke:
        atomic_write(Path(__file__).parent / "results" / "statistics.json", to_json(summary) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
