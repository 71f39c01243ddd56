"""Families of experts fine-tuned from one real base, on tasks that pull apart: what is merged.

    python experiments/merge/family.py                      about 15 minutes on 2 cores; resumes
    python experiments/merge/family.py --family smollm2     about 10 minutes on 2 cores; resumes
    python experiments/merge/family.py --smoke              seconds, into a folder of its own

The bases are stories260K (TinyStories, 264,128 parameters) and SmolLM2-135M-Instruct (from its
4-bit GGUF). Each expert continues its base, all parameters trained, on one of six tasks (four for
SmolLM2): three sorts of text (Shakespeare, Python source, Wikipedia) and three rules over short
rows of letters or digits (reverse, sort, add). Prompts of the rules look alike and ask for
different answers. Held-out parts never meet training: text by position or by file, rules by a hash
of the question. Experts go to a cache folder (`--work`, JAXSYS_CACHE or ~/.cache/jaxsys), as
ordinary checkpoints; one that is there is not trained again.
"""

import argparse
import functools
import os
import shutil
import sysconfig
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.checkpoint import RunStore
from jaxsys.core.errors import UserError
from jaxsys.data import Example, InstructionStream, TokenStream, encode_example, load_tokenizer
from jaxsys.models import lm
from jaxsys.train.finetune import Recipe, finetune
from jaxsys.train.optimizers import adamw

TEXTS = ("shakespeare", "code", "wikitext")
RULES = ("reverse", "sort", "add")
TASKS = (*TEXTS, *RULES)
SPLITS = ("train", "valid", "test")
PROMPT = 32  # tokens of a row of text that are given; what follows is scored


@dataclass(frozen=True)
class Family:
    """Say what a family is: its base, its tasks, and how its experts were trained.

    Rows are those of a training step; a row of text has `length` tokens to predict, a question at
    most `rule_length`.
    """

    name: str
    model: str
    tasks: tuple[str, ...]
    seeds: int
    lr: float
    length: int = 128
    rule_length: int = 32
    text_rows: int = 16
    rule_rows: int = 32
    text_steps: int = 160
    rule_steps: int = 600


FAMILIES = {
    "stories": Family("stories", "stories260k", TASKS, 3, 1.5e-3),
    "smollm2": Family(
        "smollm2",
        "smollm2",
        ("shakespeare", "code", "reverse", "sort"),
        1,
        1e-4,
        length=96,
        text_rows=3,
        rule_rows=12,
        text_steps=25,
        rule_steps=25,
    ),
}


class Batch(NamedTuple):
    """Rows of tokens, and which of them count as predictions."""

    tokens: np.ndarray
    mask: np.ndarray


def default_work() -> Path:
    """Give the folder where experts are kept."""
    return Path(os.environ.get("JAXSYS_CACHE") or Path.home() / ".cache" / "jaxsys") / "merge"


def data_folder() -> Path:
    """Give the folder of the data, or say how to name it."""
    folder = os.environ.get("JAXSYS_DATA")
    if not folder:
        raise UserError("JAXSYS_DATA is not set; expected the folder with lm/ and text/; set it")
    return Path(folder)


@functools.cache
def base(family: Family) -> tuple[Any, Any, Any]:
    """Load the base: parameters in float32, configuration, tokenizer."""
    path = lm.find_model(family.model)
    params, config = lm.load(path, dtype=jnp.float32)
    return params, config, load_tokenizer(path)


def _source_code() -> str:
    """Join modules of the standard library, the same ones on every machine with this Python."""
    library = Path(sysconfig.get_path("stdlib"))
    names = sorted(library.glob("*.py")) + sorted((library / "json").glob("*.py"))
    return "\n".join(path.read_text(encoding="utf-8") for path in names)[:2_000_000]


def text_of(task: str, split: str) -> str:
    """Read the part of a text that a split may see: 90, 5 and 5 of 100 parts, in order."""
    folder = data_folder() / "text"
    if task == "wikitext":
        name = "wikitext2_valid.txt" if split == "train" else "wikitext2_test.txt"
        text = (folder / name).read_text(encoding="utf-8")
        half = len(text) // 2
        return {"train": text, "valid": text[:half], "test": text[half:]}[split]
    text = _source_code() if task == "code" else (folder / "tinyshakespeare.txt").read_text()
    bounds = [0, int(0.9 * len(text)), int(0.95 * len(text)), len(text)]
    i = SPLITS.index(split)
    return text[bounds[i] : bounds[i + 1]]


def rule_example(task: str, rng: np.random.Generator) -> Example:
    """Draw one question and its answer."""
    if task == "add":
        a, b = (int(n) for n in rng.integers(0, 100, 2))
        one, two, total = (" ".join(str(n)) for n in (a, b, a + b))
        return Example(f"Add: {one} + {two} =", f" {total}")
    letters = [chr(97 + int(i)) for i in rng.choice(26, int(rng.integers(3, 7)), replace=False)]
    answer = sorted(letters) if task == "sort" else letters[::-1]
    return Example(f"{task.capitalize()}: {' '.join(letters)} =", f" {' '.join(answer)}")


@functools.cache
def rule_examples(task: str, split: str, count: int) -> tuple[Example, ...]:
    """Draw distinct questions of a split; a question's hash says to which split it belongs."""
    rng = np.random.default_rng([zlib.crc32(task.encode()), SPLITS.index(split)])
    found: dict[str, Example] = {}
    while len(found) < count:
        example = rule_example(task, rng)
        place = zlib.crc32(example.prompt.encode()) % 10
        if SPLITS[max(place - 7, 0)] == split:
            found[example.prompt] = example
    return tuple(found.values())


@functools.cache
def tokens_of(family: Family, task: str, split: str) -> np.ndarray:
    """Encode the text of a split, without begin tokens."""
    _, config, tokenizer = base(family)
    text = text_of(task, split)
    text = text if split == "train" else text[:60_000]
    # In parts: the encoding's time grows faster than the text.
    parts = [tokenizer.encode(text[i : i + 2000]) for i in range(0, len(text), 2000)]
    return np.concatenate([ids[1:] if ids[0] == config.bos_id else ids for ids in parts])


def stream(family: Family, task: str, seed: int) -> Any:
    """Make the training batches of a task: step to `Batch`."""
    if task in TEXTS:
        rows, tokens = family.text_rows, tokens_of(family, task, "train")
        texts = TokenStream(tokens, batch=rows, length=family.length, seed=seed)
        every = np.ones((rows, family.length + 1), bool)
        return lambda i: Batch(texts.batch_at(i), every)
    count = 4000 if task == "add" else 20_000
    encoded = encode_rules(family, rule_examples(task, "train", count))
    rules = InstructionStream(encoded, family.rule_rows, family.rule_length, seed)
    return lambda i: Batch(*rules.batch_at(i))


def encode_rules(family: Family, examples: tuple[Example, ...]) -> tuple[Any, ...]:
    """Encode questions with their answers and the token that ends a text."""
    _, config, tokenizer = base(family)
    return tuple(encode_example(example, tokenizer, config.eos_ids[0]) for example in examples)


def held_out(family: Family, task: str, split: str, rows: int) -> Batch:
    """Make held-out rows: windows of text whose first tokens are given, or questions."""
    _, config, _ = base(family)
    if task in RULES:
        encoded = encode_rules(family, rule_examples(task, split, rows))
        return Batch(*InstructionStream(encoded, rows, family.rule_length).batch_at(0))
    ids = tokens_of(family, task, split)[: rows * family.length].reshape(rows, family.length)
    return text_rows(ids, config.bos_id)


def text_rows(ids: np.ndarray, bos_id: int) -> Batch:
    """Put the begin token before windows [rows, length], and mark what is scored."""
    tokens = np.concatenate([np.full((len(ids), 1), bos_id), ids], 1).astype(np.int32)
    mask = np.broadcast_to(np.arange(tokens.shape[1]) > PROMPT, tokens.shape)
    return Batch(tokens, mask.copy())


def prompts(batch: Batch) -> np.ndarray:
    """Mark what comes before the first token that is scored: what a router may read."""
    return np.cumsum(batch.mask, axis=1) == 0


def expert_folder(family: Family, task: str, seed: int, work: Path) -> Path:
    """Say where an expert is kept."""
    return work / f"{family.name}_{task}_{seed}"


def train_expert(family: Family, task: str, seed: int, work: Path, share: float = 1.0) -> Path:
    """Train one expert, or find it; killed runs go on from their last checkpoint."""
    folder = expert_folder(family, task, seed, work)
    if (folder / "config.json").is_file():
        return folder
    params, config, _ = base(family)
    steps = max(int(share * (family.text_steps if task in TEXTS else family.rule_steps)), 2)
    started_s = time.perf_counter()
    tuned = finetune(
        params,
        lambda params, batch: lm.loss(params, config, batch.tokens, batch.mask),
        stream(family, task, seed),
        adamw(family.lr, warmup_steps=min(20, steps // 4), total_steps=steps, clip_norm=1.0),
        Recipe(steps=steps, method="full", save_every=max(steps // 3, 1)),
        store=RunStore(work / "runs" / folder.name),
        meta={"task": task, "seed": seed, "lr": family.lr},
    )
    lm.save(folder, tuned.params, config)
    shutil.rmtree(work / "runs" / folder.name)
    wall_s = time.perf_counter() - started_s
    print(f"{folder.name}: {steps} steps, loss {tuned.losses[-1]:.3f}, {wall_s:.0f} s", flush=True)
    return folder


def load_experts(family: Family, seed: int, work: Path, tasks: tuple[str, ...]) -> list[Any]:
    """Load the experts of one seed, in the order of the tasks."""
    return [lm.load(expert_folder(family, task, seed, work))[0] for task in tasks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=default_work())
    parser.add_argument("--family", choices=sorted(FAMILIES), default="stories")
    parser.add_argument("--seeds", type=int, default=None)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    family = FAMILIES[options.family]
    work = options.work / "smoke" if options.smoke else options.work
    for seed in range(1 if options.smoke else options.seeds or family.seeds):
        for task in family.tasks:
            train_expert(family, task, seed, work, 0.005 if options.smoke else 1.0)
    print(f"experts in {work}; jax {jax.__version__}")


if __name__ == "__main__":
    main()
