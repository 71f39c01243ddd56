"""Hold merges of models with different vocabularies, and with adapters, against mergekit.

    python experiments/merge/tokenizers_against_mergekit.py --peers-python PATH      under a minute
    python experiments/merge/tokenizers_against_mergekit.py --smoke                  no peer

PATH is a Python that has mergekit (`against_mergekit.py` makes one). Four small Llama models: two
with byte-level BPE vocabularies of different texts, one padded and one with tied embeddings, one
with added special tokens, and one as a LoRA adapter of the first. The same recipes go through both;
rows of the embedding and of the output matrix are compared token by token, by the token's text,
since the two number new tokens differently.

Expected: the same tokens, every row equal to rounding in float32. A model with fewer rows than
tokens is left out: mergekit 0.1.5 ends there with a KeyError, jaxsys takes such tokens as missing.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from jaxsys.core.checkpoint import read_safetensors
from jaxsys.core.measure import machine
from jaxsys.core.report import atomic_write, markdown_table
from jaxsys.data import LMTokenizer, save_tokenizer, train_bpe
from jaxsys.merge.extract import extract_adapter
from jaxsys.merge.files import merge_files
from jaxsys.merge.recipe_parse import parse_recipe
from jaxsys.merge.tokenizers import read_tokenizer
from jaxsys.models import lm

RESULTS = Path(__file__).parent / "results"
TEXTS = {
    "base": "the cat sat on the mat and the rat sat on the hat " * 9,
    "other": "lazy dogs jump over quick brown foxes again and again " * 9,
    "third": "lazy foxes sing in the night and dogs bark at the moon " * 9,
}
PEER = """
import json, sys, importlib.metadata as meta, yaml
from pathlib import Path
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for recipe, out in json.load(sys.stdin):
    config = MergeConfiguration.model_validate(yaml.safe_load(Path(recipe).read_text()))
    try:
        run_merge(config, out, options=MergeOptions(write_model_card=False, quiet=True))
    except Exception as error:
        Path(out).with_suffix(".error").write_text(f"{type(error).__name__}: {error}"[:200])
print("\\n" + json.dumps({name: meta.version(name) for name in ("mergekit", "transformers")}))
"""


def make_models(folder: Path) -> None:
    """Write the models."""
    rows = {"base": 300, "other": 320, "third": 300, "tuned": 300}
    for i, (name, size) in enumerate(rows.items()):
        config = lm.LMConfig("llama", size, 32, 2, 4, 2, 8, 48, 64, tied=name == "other")
        lm.save(folder / name, lm.init(jax.random.key(i), config), config)
        tokenizer = train_bpe(TEXTS.get(name, TEXTS["base"]), 280 + 5 * (i % 3)).tokenizer
        tokenizer.add_special_tokens(["<|end|>", f"<|{'base' if name == 'tuned' else name}|>"])
        save_tokenizer(folder / name, LMTokenizer(tokenizer))
    base, tuned = (read_safetensors(folder / name) for name in ("base", "tuned"))
    extract_adapter(base, tuned, folder / "lora", rank=8, base_name=str(folder / "base"))


def recipes(folder: Path) -> dict[str, str]:
    """Write the recipes' text by name."""

    def linear(models: list[str], rest: str) -> str:
        entries = "".join(
            f"  - model: {folder / model}\n    parameters: {{weight: {1 + i}}}\n"
            for i, model in enumerate(models)
        )
        return f"merge_method: linear\ndtype: float32\nmodels:\n{entries}{rest}\n"

    sources = (
        f"  tokens:\n    <|other|>: {{source: {{kind: zero}}}}\n"
        f"    <|end|>: {{source: {folder / 'other'}, force: true}}\n"
        f"    <|base|>:\n      source: {{kind: model_token, model: {folder / 'other'}, "
        "token: <|end|>}\n      force: true\n"
    )
    base = f"base_model: {folder / 'base'}\n"
    pair = ["base", "other"]
    lora = f"{folder / 'base'}+{folder / 'lora'}"
    return {
        "union": linear(pair, base + "tokenizer: {source: union}"),
        "union, padded": linear(pair, base + "tokenizer: {source: union, pad_to_multiple_of: 64}"),
        "base": linear(pair, base + "tokenizer: {source: base}"),
        "a model's": linear(pair, base + f"tokenizer: {{source: {folder / 'other'}}}"),
        "mean": linear(["base", "other", "third"], base + "tokenizer: {source: union}"),
        "sources": linear(pair, base + "tokenizer:\n  source: union\n" + sources),
        "adapter": f"merge_method: task_arithmetic\ndtype: float32\n{base}models:\n"
        f"  - model: {lora}\n    parameters: {{weight: 0.5}}",
    }


def by_token(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Read a matrix's rows by the text of their tokens."""
    matrix = read_safetensors(folder)[name]
    return {token: matrix[i] for token, i in read_tokenizer(folder).vocab.items()}


def compare(ours: Path, theirs: Path) -> dict[str, object]:
    """Compare two results."""
    failed = theirs.with_suffix(".error")
    if failed.is_file():
        return {"tensors": f"mergekit fails: {failed.read_text()}"}
    a, b = read_safetensors(ours), read_safetensors(theirs)
    row: dict[str, object] = {"tensors": len(a), "the same names": set(a) == set(b)}
    tokens = [
        read_tokenizer(folder).vocab if (folder / "tokenizer.json").is_file() else {}
        for folder in (ours, theirs)
    ]
    row |= {"tokens": len(tokens[0]), "the same tokens": set(tokens[0]) == set(tokens[1])}
    worst, rows = 0.0, 0.0
    for name in sorted(set(a) & set(b)):
        if name.endswith(("embed_tokens.weight", "lm_head.weight")) and tokens[0]:
            mine, other = by_token(ours, name), by_token(theirs, name)
            shared = sorted(set(mine) & set(other))
            gap = np.abs(np.stack([mine[t] for t in shared]) - np.stack([other[t] for t in shared]))
            rows = max(rows, float(gap.max()))
            row["matrix rows"] = f"{len(a[name])}, {len(b[name])}"
        else:
            worst = max(worst, float(np.abs(a[name] - b[name]).max()))
    return row | {"largest difference": f"{worst:.1e}", "in rows of tokens": f"{rows:.1e}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers-python", type=Path)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder)
        jobs = []
        for i, (recipe, text) in enumerate(recipes(folder).items()):
            file = folder / f"{i}.yaml"
            file.write_text(text)
            merge_files(parse_recipe(text), folder / f"ours{i}")
            print(recipe, "merged", flush=True)
            jobs.append((str(file), str(folder / f"theirs{i}")))
        if options.smoke or options.peers_python is None:
            print("no peer: pass --peers-python")
            return
        done = subprocess.run(
            [options.peers_python, "-c", PEER],
            input=json.dumps(jobs),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        versions = json.loads(done.stdout.splitlines()[-1])
        rows = [
            {"recipe": recipe, **compare(folder / f"ours{i}", folder / f"theirs{i}")}
            for i, recipe in enumerate(recipes(folder))
        ]
    found = f"{machine()}; " + ", ".join(f"{k} {v}" for k, v in versions.items())
    text = f"# Vocabularies and adapters beside mergekit\n\n{found}\n\n{markdown_table(rows)}"
    atomic_write(RESULTS / "tokenizers_against_mergekit.md", text)
    print(text)


if __name__ == "__main__":
    sys.exit(main())
