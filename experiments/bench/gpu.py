"""Take 1.3B and 7B Llama shapes apart on a GPU, beside torch + transformers.

    python experiments/bench/gpu.py                        a machine with a GPU; 40 to 90 minutes
    python experiments/bench/gpu.py --parts train torch    these alone
    python experiments/bench/gpu.py --smoke                tiny shapes on a CPU, 40 s, nothing kept

Parts, each in a process of its own:

- train: pre-training steps of the 1.3B shape in bfloat16, single techniques and the paper's
  combinations, tokens per second, model and hardware FLOP utilisation, memory;
- static: the 7B, 13B and 70B shapes, the largest batch that fits under some techniques;
- finetune: full, LoRA, QLoRA and prompt tuning of the 1.3B shape, LoRA and QLoRA of the 7B shape;
- serve: 1,000 requests at once against our server with the 1.3B shape;
- modules, ops: the step over the model's parts; operators under the roofline;
- torch: the same 1.3B step (same shape, batch, tokens, AdamW in bfloat16) in torch + transformers,
  eager and with torch.compile, and `generate` of the same model, where these packages are.

Written are results/gpu/*.jsonl, report.md, report.html and findings.md, which says of each finding
of the paper whether it is confirmed, not confirmed or cannot be tested on this machine.

Targets: training step MFU of 50 % or more at 1.3B in bfloat16 on one Hopper GPU, faster than torch
eager and compiled; serving at 10 times the tokens per second of transformers' generate, or more.

**It has not been run on a GPU by its authors: none was at hand.** Only `--smoke` has.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "gpu"
PARTS = ("train", "static", "finetune", "serve", "modules", "ops", "torch")
BATCH, TOKENS = 8, 2048  # of the step that is compared with torch


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Take 1.3B and 7B shapes apart on a GPU.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on a CPU, nothing kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if given.smoke:
        os.environ["JAX_PLATFORMS"] = "cpu"
    if given.child:
        keep(given, given.child)
        return 0
    if not given.smoke and not has_gpu():
        print(
            "gpu.py: JAX sees no GPU here; run it where it does, or pass --smoke", file=sys.stderr
        )
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        if given.smoke:
            given.out = Path(scratch)
        run_all(given)
    return 0


def has_gpu() -> bool:
    # In another process, so that this one holds no memory of the GPU.
    code = "import jax, sys; sys.exit(jax.default_backend() != 'gpu')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def run_all(given: argparse.Namespace) -> None:
    """Run each part, then write the report and what the paper's findings came to."""
    from jaxsys.bench.records import read_all
    from jaxsys.bench.report import write
    from jaxsys.core.report import atomic_write

    for part in given.parts:
        start = time.perf_counter()
        (given.out / f"{part}.jsonl").unlink(missing_ok=True)
        if given.smoke and part != "torch":  # starting Python takes longer than a tiny part
            keep(given, part)
        else:
            command = [sys.executable, __file__, "--child", part, "--out", str(given.out)]
            command += ["--seed", str(given.seed), *(["--smoke"] if given.smoke else [])]
            subprocess.run(command, check=True)
        tell(f"{part}: {time.perf_counter() - start:.0f} s")
    rows = read_all(given.out)
    write(rows, given.out, title="Llama shapes on a GPU")
    text = findings(rows)
    atomic_write(given.out / "findings.md", text)
    print(text)


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def keep(given: argparse.Namespace, part: str) -> None:
    from jaxsys.core.report import append_jsonl

    makers = {"train": train, "static": static, "finetune": finetune, "serve": serve,
              "modules": modules, "ops": ops, "torch": torch_step}  # fmt: skip
    for row in makers[part](given):
        append_jsonl(given.out / f"{part}.jsonl", row)


def sizes(given: argparse.Namespace) -> tuple[str, Any, int, int]:
    """Name, shape, rows and tokens of the step."""
    from jaxsys.bench.shapes import shape

    if given.smoke:
        return "tiny llama", replace(shape("small"), vocab_size=128, layers=1), 2, 16
    return "llama-1.3b", shape("llama-1.3b"), BATCH, TOKENS


def best(given: argparse.Namespace) -> Any:
    """The set of techniques that is compared with torch: as fast as a user would have it."""
    from jaxsys.bench.techniques import Technique

    attention = "plain" if given.smoke else "cudnn"
    return Technique(dtype="bf16", attention=attention, donate=True, layers="scan",
                     recompute="weight_dots")  # fmt: skip


def options_of(given: argparse.Namespace) -> dict[str, Any]:
    return {"runs": 2 if given.smoke else 20, "memory": not given.smoke, "on_event": tell}


def train(given: argparse.Namespace) -> list[dict[str, Any]]:
    from jaxsys.bench.step import Task
    from jaxsys.bench.techniques import Technique, combinations
    from jaxsys.bench.train import measure

    name, config, batch, tokens = sizes(given)
    base, task = Technique(dtype="bf16", donate=True), Task(batch=batch, tokens=tokens)
    chosen, more = [best(given)], options_of(given)
    rows = []
    if not given.smoke:
        choices = {"recompute": ("full", "weight_dots", "dots"), "attention": ("xla", "cudnn"),
                   "offload": ("optimizer", "parameters"), "layers": ("scan",), "zero": (2, 3),
                   "accumulate": (4,), "donate": (False,), "dtype": ("f32", "mixed")}  # fmt: skip
        # Smaller, so that the naive step fits.
        singles = combinations(choices, base=base, most=1)
        rows += measure(name, config, singles, replace(task, batch=4, tokens=1024), **more)
        chosen += [replace(best(given), recompute=r) for r in ("none", "full", "dots")]
        chosen += [replace(best(given), layers="unrolled", recompute=r)
                   for r in ("none", "weight_dots", "full")]  # fmt: skip
        chosen += [replace(best(given), offload="optimizer", recompute="full")]
    rows += measure(name, config, chosen, task, **more)
    if not given.smoke:  # as large a batch as recomputation allows
        full = [replace(best(given), recompute=r) for r in ("full", "weight_dots")]
        rows += measure(name, config, full, replace(task, batch=4 * batch), **more)
    return rows


def static(given: argparse.Namespace) -> list[dict[str, Any]]:
    import jax

    from jaxsys.bench.fits import search
    from jaxsys.bench.shapes import shape
    from jaxsys.bench.step import Task
    from jaxsys.bench.train import free_bytes

    name, config, batch, tokens = sizes(given)
    budget = free_bytes(jax.devices()[0])
    full, rows = replace(best(given), recompute="full"), []
    if given.smoke:
        task = Task(batch=batch, tokens=tokens)
        return search(name, config, [full], task, 2**20, on_event=tell)  # nothing fits
    for model in ("llama-1.3b", "llama2-7b", "llama2-13b", "llama2-70b"):
        for method, weights in (("pretrain", "full"), ("lora", "full"), ("lora", "4bit")):
            chosen = [replace(full, weights=weights, recompute=r) for r in ("full", "weight_dots")]
            task = Task(method, tokens=tokens, rank=64)
            rows += search(model, shape(model), chosen, task, budget, on_event=tell)
    return rows


def finetune(given: argparse.Namespace) -> list[dict[str, Any]]:
    from jaxsys.bench.finetune import METHODS, measure
    from jaxsys.bench.shapes import shape
    from jaxsys.bench.step import Task

    name, config, batch, tokens = sizes(given)
    if given.smoke:
        task = Task(batch=batch, tokens=tokens, rank=4)
        return measure(name, config, ["qlora"], [best(given)], task, **options_of(given))
    task = Task(batch=batch, tokens=1024, rank=64, seed=given.seed)
    chosen = [replace(best(given), recompute=r) for r in ("weight_dots", "full")]
    rows = measure(name, config, tuple(METHODS), chosen, task, **options_of(given))
    seven = replace(task, batch=4, tokens=512)
    methods = ("lora", "qlora", "qlora8", "prompt")
    config = shape("llama2-7b")
    return rows + measure("llama2-7b", config, methods, chosen, seven, **options_of(given))


def serve(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Burst of requests against the 1.3B shape with random weights and a small vocabulary."""
    import jax
    import jax.numpy as jnp

    from jaxsys.bench.serving.engine import Engine
    from jaxsys.bench.serving.load import synthetic_prompts
    from jaxsys.bench.serving.run import Load, Served, layout_for, measure, open_served
    from jaxsys.data.tokenizer import load_tokenizer
    from jaxsys.models import lm

    if given.smoke:
        served = open_served("tiny", layout_for(32, slots=2))
        prompts = synthetic_prompts(3, 4, 3, served.tokenizer, given.seed)
        return [measure(served, prompts, Load(ignore_eos=True, seed=given.seed))]
    tiny = lm.find_model("tiny")
    words = lm.load_config(tiny).vocab_size
    config = replace(sizes(given)[1], vocab_size=words)
    params = lm.init(jax.random.key(given.seed), config, jnp.bfloat16)
    layout = layout_for(1024, slots=256, prompt_rows=16, row_tokens=64)
    engine = Engine(params, config, layout)
    engine.warm_up()
    served = Served(engine, load_tokenizer(tiny), "llama-1.3b", frozenset())
    prompts = synthetic_prompts(1000, 512, 128, served.tokenizer, given.seed)
    loads = [Load(ignore_eos=True, seed=given.seed), Load(rate=8.0, ignore_eos=True)]
    return [measure(served, prompts, load, slo={"ttft_s": 10.0, "tpot_s": 0.1}) for load in loads]


def modules(given: argparse.Namespace) -> list[dict[str, Any]]:
    from jaxsys.bench.dissect import measure
    from jaxsys.bench.step import Task
    from jaxsys.bench.techniques import Technique

    name, config, batch, tokens = sizes(given)
    rows = []
    # Under --smoke the one that is not also timed part by part.
    chosen = (best(given),) if given.smoke else (Technique(dtype="bf16"), best(given))
    for technique in chosen:
        task = Task(batch=batch, tokens=tokens, seed=given.seed)
        flags = {"model": name, "batch": batch, "tokens": tokens, "technique": technique.name}
        rounds = 2 if given.smoke else 20
        rows.append(measure(config, technique, task, flags, rounds=rounds, on_event=tell))
    return rows


def ops(given: argparse.Namespace) -> list[dict[str, Any]]:
    from jaxsys.bench.ops import ON_GPU, SMOKE, measure

    return measure(SMOKE if given.smoke else ON_GPU, runs=2 if given.smoke else 20, on_event=tell)


# The same step and the same generation in torch + transformers.


def torch_step(given: argparse.Namespace) -> list[dict[str, Any]]:
    from jaxsys.bench.records import record

    name, config, batch, tokens = sizes(given)
    flags = {"model": name, "batch": batch, "tokens": tokens, "engine": "torch"}
    try:
        import torch
        import transformers
    except ImportError as error:
        why = f"{error.name} is missing"
        return [record("train", given.seed, flags, status="not here", why=why)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not given.smoke:
        why = "torch sees no GPU"
        return [record("train", given.seed, flags, status="not here", why=why)]
    torch.manual_seed(given.seed)
    shape = transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.width, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, num_key_value_heads=config.kv_heads,
        intermediate_size=config.ffn_width, max_position_embeddings=config.max_positions,
        attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    rows = []
    ways = ("eager",) if given.smoke else ("eager", "compiled", "eager, checkpointed")
    for way in ways:
        try:
            found = _torch_train(torch, transformers, shape, given, way, device)
        except torch.cuda.OutOfMemoryError as error:
            found = {"status": "out of memory", "why": str(error).split(".")[0] or "torch"}
        more = {
            "versions_torch": torch.__version__,
            "versions_transformers": transformers.__version__,
        }
        rows.append(record("train", given.seed, flags | {"technique": way}, **found, **more))
    rows.append(_torch_generate(torch, transformers, shape, given, flags, device))
    return rows


def _torch_train(torch, transformers, shape, given, way: str, device: str) -> dict[str, Any]:
    from jaxsys.bench.counts import step_flops
    from jaxsys.bench.records import figure_of
    from jaxsys.core.measure import timing

    _, config, batch, tokens = sizes(given)
    model = transformers.LlamaForCausalLM(shape).to(device=device, dtype=torch.bfloat16).train()
    if "checkpointed" in way:
        model.gradient_checkpointing_enable()
    fused = {"fused": True} if device == "cuda" else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), **fused)
    forward = torch.compile(model) if way == "compiled" else model
    text = torch.randint(config.vocab_size, (batch, tokens + 1), device=device)

    def step() -> None:
        logits = forward(input_ids=text[:, :-1]).logits.float()
        wanted = text[:, 1:].reshape(-1)
        loss = torch.nn.functional.cross_entropy(logits.reshape(wanted.shape[0], -1), wanted)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    seconds, runs = [], 2 if given.smoke else 20
    for i in range(3 + runs):
        wait()
        start = time.perf_counter()
        step()
        wait()
        if i >= 3:
            seconds.append(time.perf_counter() - start)
    found = timing(way, seconds)
    products = sum(c.total for c in step_flops(config, batch, tokens, products_only=True).values())
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {
        "step": figure_of(found),
        "tokens_per_s": batch * tokens / found.median_s,
        "mfu": products / found.median_s / _peak(device),
        "peak_memory_measured_bytes": peak,
    }


def _peak(device: str) -> float:
    import jax

    from jaxsys.bench.roofline import peaks

    # JAX names the GPU; it allocates nothing before it computes.
    return peaks(jax.devices()[0], "bfloat16").flops_per_s


def _torch_generate(torch, transformers, shape, given, flags, device: str) -> dict[str, Any]:
    """Tokens per second of `generate`, one prompt after another and sixteen at once."""
    from jaxsys.bench.records import record

    shape.use_cache = True
    model = transformers.LlamaForCausalLM(shape).to(device=device, dtype=torch.bfloat16).eval()
    length, answer = (4, 3) if given.smoke else (512, 128)
    found = {}
    for rows in (1, 16):
        text = torch.randint(shape.vocab_size, (rows, length), device=device)
        options = {"max_new_tokens": answer, "min_new_tokens": answer, "do_sample": False}
        with torch.no_grad():
            model.generate(text, **options)
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            model.generate(text, **options)
            if device == "cuda":
                torch.cuda.synchronize()
        found[f"batch_{rows}"] = rows * answer / (time.perf_counter() - start)
    wanted = {**flags, "technique": "generate", "prompt": length, "answer": answer}
    return record("serve", given.seed, wanted, output_tokens_per_s=found["batch_1"],
                  output_tokens_per_s_of_16=found["batch_16"])  # fmt: skip


# What the paper found.


def findings(rows: list[dict[str, Any]]) -> str:
    """Say of each finding of the paper, and of each target, what these rows say."""
    from jaxsys.core.report import markdown_table

    def cell(kind: str, field: str, **flags: Any) -> float | None:
        for row in rows:
            own = row["flags"]
            asked = row["kind"] == kind and all(own.get(k) == v for k, v in flags.items())
            if asked and row["status"] == "ok" and row.get(field) is not None:
                return row[field]
        return None

    base = "dtype bf16, donate"

    def speed(technique: str) -> float | None:
        return cell("train", "tokens_per_s", technique=technique)

    def memory(technique: str) -> float | None:
        return cell("train", "peak_memory_measured_bytes", technique=technique)

    flash, full = f"attention cudnn, {base}", f"recompute full, {base}"
    tuned = {m: cell("finetune", "tokens_per_s", model="llama2-7b", method="lora", technique=t)
             for m, t in _tuned().items()}  # fmt: skip
    room = {m: cell("finetune", "peak_memory_measured_bytes", model="llama2-7b", method="lora",
                    technique=t) for m, t in _tuned().items()}  # fmt: skip
    ours = [row for row in rows if row["kind"] == "train" and "engine" not in row["flags"]]
    fast = max((row.get("tokens_per_s", 0.0) for row in ours), default=0.0)
    mfu = max((row.get("mfu", 0.0) for row in ours), default=0.0)
    served = max(
        (
            row.get("output_tokens_per_s", 0.0)
            for row in rows
            if row["kind"] == "serve" and "engine" not in row["flags"]
        ),
        default=0.0,
    )
    table = [
        _finding("FlashAttention is faster", speed(flash), ">", speed(base)),
        _finding("FlashAttention needs less memory", memory(flash), "<", memory(base)),
        _finding("recomputation is slower", speed(full), "<", speed(base)),
        _finding("recomputation needs less memory", memory(full), "<", memory(base)),
        _finding("offloading is slow", speed(f"offload optimizer, {base}"), "<", speed(base)),
        _finding("LoRA is faster than QLoRA", tuned["lora"], ">", tuned["qlora"]),
        _finding("QLoRA needs half the memory (< 0.65)", room["qlora"], "<", room["lora"], 0.65),
        *(
            {"finding": text, "verdict": "not testable here: one GPU"}
            for text in ("ZeRO-2 saves memory without loss", "ZeRO-3 for larger models",
                         "scaling from 1 to 8 GPUs")
        ),
        {"finding": "decoder layers dominate the step", "verdict": _dominance(rows)},
        _finding("target: MFU of 50 % at 1.3B bf16", mfu or None, ">", 0.5),
        *(
            _finding(f"target: faster than torch, {way}", fast or None, ">",
                     cell("train", "tokens_per_s", engine="torch", technique=way))
            for way in ("eager", "compiled")
        ),
        _finding("target: serving 10 x generate", served or None, ">",
                 cell("serve", "output_tokens_per_s", engine="torch"), 10.0),
    ]  # fmt: skip
    head = "# Findings of arXiv 2311.03687, and targets\n\n"
    return head + markdown_table(table, ("finding", "verdict", "measured", "beside")) + "\n"


def _tuned() -> dict[str, str]:
    """Names of the 7B rows of LoRA and QLoRA."""
    from jaxsys.bench.techniques import Technique

    plain = Technique(dtype="bf16", attention="cudnn", donate=True, layers="scan",
                      recompute="weight_dots")  # fmt: skip
    return {"lora": plain.name, "qlora": replace(plain, weights="4bit").name}


def _finding(
    text: str, a: float | None, sign: str, b: float | None, times: float = 1.0
) -> dict[str, Any]:
    if a is None or b is None:
        return {"finding": text, "verdict": "not measured"}
    holds = a > times * b if sign == ">" else a < times * b
    verdict = "confirmed" if holds else "not confirmed"
    return {"finding": text, "verdict": verdict, "measured": f"{a:.4g}", "beside": f"{b:.4g}"}


def _dominance(rows: list[dict[str, Any]]) -> str:
    for row in rows:
        if row["kind"] == "modules" and row["status"] == "ok":
            shares = {name: part.get("share") or 0.0 for name, part in row["parts"].items()}
            outside = ("embedding", "head", "loss", "optimizer")
            inside = sum(v for k, v in shares.items() if k.split()[0] not in outside)
            total = sum(shares.values())
            if total:
                word = "confirmed" if inside > 0.5 * total else "not confirmed"
                return f"{word}: {100 * inside / total:.0f} % of the step"
    return "not measured"


if __name__ == "__main__":
    sys.exit(main())
