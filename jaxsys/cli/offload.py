"""`jaxsys offload`: CPU + accelerator inference, planned for the machine (arXiv 2411.15715)."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from jaxsys.cli.model_options import Dtype, ModelName, dtype_of, sampling_of
from jaxsys.cli.options import Common
from jaxsys.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Common):
    """Measure the machine and plan a model over CPU, accelerator and link; nothing is loaded.

    Attributes:
      out: Folder for plan.json and machine.json.
      seed: Seed; nothing here is random.
      model: A name (smollm2, stories260k, tiny) or a path: a Hugging Face folder, .gguf, .bin.
      accelerator: auto (the first device that is no CPU), none (a plain CPU run), or virtual (two
        virtual CPU devices stand for both).
      budget: Accelerator memory, such as 8GiB or 500MB, or a share of what the model takes: 75%.
      machine: A machine.json instead of measuring.
      dtype: Of the parameters.
      int8: Round the matrices of layers to 8 bits with a scale for each row while loading.
      batch: Rows that are decoded together.
      context: Most tokens of a row, prompt and answer together.
      chunk: Tokens of a prompt that are read at once.
    """

    model: ModelName
    accelerator: Literal["auto", "none", "virtual"] = "auto"
    budget: str = "75%"
    machine: Path | None = None
    dtype: Dtype = "file"
    int8: bool = False
    batch: int = 1
    context: int = 1024
    chunk: int = 256


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(PlanConfig):
    """Continue texts with a model that need not fit the accelerator; the text is streamed.

    Attributes:
      out: Folder for plan.json, machine.json and generate.json.
      seed: Seed of the draws; the same seed gives the same text.
      prompt: What to continue; several are decoded together, as many at once as --batch says.
      plan: A plan.json of `jaxsys offload plan`, instead of planning.
      cache: Which of the experts that were copied over stay on the accelerator in place of others:
        none (the plan's stay), lru, frequency, or score (HybriMoE's).
      early: Run the next mixture layer's router early and copy ahead what it names.
      chat: Put each prompt into the model's chat template, as a user's message.
      max_tokens: New tokens of a prompt at most.
      temperature: 0 takes the most likely token.
      top_k: Keep the k most likely tokens; 0 keeps all.
      top_p: Keep the fewest most likely tokens that together reach this probability.
      min_p: Keep tokens at least so many times as likely as the most likely one.
      repetition_penalty: Above 1 makes tokens less likely that are there already.
      stop: Texts that end an answer.
    """

    prompt: tuple[str, ...]
    plan: Path | None = None
    cache: Literal["none", "lru", "frequency", "score"] = "none"
    early: bool = False
    chat: bool = False
    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()


def _prepared(config: PlanConfig, context: int) -> Any:
    from jaxsys.core.report import atomic_write
    from jaxsys.models import lm
    from jaxsys.offload.run import Request, prepare

    request = Request(
        model=lm.find_model(config.model),
        accelerator=config.accelerator,
        budget=config.budget,
        machine=config.machine,
        dtype=dtype_of(config.dtype),
        int8=config.int8,
        batch=config.batch,
        context=context,
        chunk=config.chunk,
    )
    prepared = prepare(request, lambda text: print(text, file=sys.stderr, flush=True))
    if config.out:
        atomic_write(config.out / "plan.json", prepared.plan.to_json() + "\n")
        atomic_write(config.out / "machine.json", prepared.machine.to_json() + "\n")
    return prepared


def run_plan(config: PlanConfig) -> dict[str, Any]:
    """Print the plan."""
    import json

    from jaxsys.offload.plan import describe

    prepared = _prepared(config, config.context)
    if not config.json:
        print(describe(prepared.plan, prepared.machine))
    return {
        "plan": json.loads(prepared.plan.to_json()),
        "machine": json.loads(prepared.machine.to_json()),
        "accelerator_bytes": prepared.plan.accelerator_bytes,
        "host_bytes": prepared.plan.host_bytes,
        "predicted_s": prepared.plan.predicted_s,
        "limit_s": prepared.plan.limit_s,
    }


def run_generate(config: GenerateConfig) -> dict[str, Any]:
    """Print the text while it comes, then where the time went on standard error."""
    import jax

    from jaxsys.core.report import atomic_write, to_json
    from jaxsys.data.tokenizer import load_tokenizer
    from jaxsys.evaluate.open import encode_prompt
    from jaxsys.models import lm
    from jaxsys.offload.generate import DeviceLost, generate
    from jaxsys.offload.plan import describe
    from jaxsys.offload.run import read_plan, start, where_time_goes

    if not config.prompt:
        raise UserError("no prompt was given; expected one at least; pass --prompt TEXT")
    sampling = sampling_of(config)
    # The tokenizer first: it is small, and a mistake shows before the machine is measured.
    tokenizer = load_tokenizer(lm.find_model(config.model))
    prompts = [encode_prompt(tokenizer, text, chat=config.chat) for text in config.prompt]
    prepared = _prepared(config, max(map(len, prompts)) + config.max_tokens)
    if config.plan is not None:
        prepared = prepared._replace(plan=read_plan(config.plan))
    asked = replace(prepared.request, cache=config.cache, early=config.early)
    prepared = prepared._replace(request=asked)
    print(describe(prepared.plan, prepared.machine), file=sys.stderr, flush=True)
    engine = start(prepared)
    ends = {*prepared.config.eos_ids, *(() if tokenizer.eos_id is None else (tokenizer.eos_id,))}
    alone = len(prompts) == 1
    options: dict[str, Any] = {
        "max_tokens": config.max_tokens,
        "sampling": sampling,
        "key": jax.random.key(config.seed),
        "end_ids": ends,
        "tokenizer": tokenizer,
        "stop": config.stop,
        "batch": config.batch,
        "chunk": config.chunk,
    }
    if alone:  # several texts at once would run into each other
        options["on_piece"] = lambda piece: print(piece.text, end="", flush=True)
    lost = None
    try:
        found = generate(engine, prompts, **options)
    except DeviceLost as error:
        lost, found = error, error.generated
    print("" if alone else "\n\n".join(found.texts), flush=True)
    result = _report(config, engine, found)
    if lost is None:
        spent = where_time_goes(engine, prepared.machine, batch=min(config.batch, len(prompts)))
        result |= {"step": spent, "predicted_s": prepared.plan.predicted_s,
                   "limit_s": prepared.plan.limit_s}  # fmt: skip
    if config.out:
        atomic_write(config.out / "generate.json", to_json(result) + "\n")
    if lost is not None:
        raise lost
    _tell(result)
    return result


def _report(config: GenerateConfig, engine: Any, found: Any) -> dict[str, Any]:
    monitor = engine.monitor
    return {
        "texts": found.texts,
        "tokens": found.tokens,
        "ended": found.ended,
        "first_s": found.first_s,
        "tokens_per_s": found.tokens_per_s,
        "prompt_tokens": monitor.prompt_tokens,
        "hit_rate": monitor.hit_rate,
        "moved_bytes": monitor.moved_bytes,
        "resident_bytes": engine.placed.resident_bytes,
        "mapped_bytes": engine.placed.mapped_bytes,
        "copied_bytes": engine.placed.copied_bytes,
    }


def _tell(result: dict[str, Any]) -> None:
    from jaxsys.core.report import format_bytes, format_seconds

    made, rate = sum(map(len, result["tokens"])), result["tokens_per_s"]
    lines = [
        f"{made} tokens, {f'{rate:.1f} tokens/s, ' if rate > 0 else ''}first after "
        f"{result['first_s']:.1f} s with compiling; ended by {', '.join(result['ended'])}"
    ]
    spent = result["step"]
    names = {"cpu_s": "CPU", "link_s": "link", "accelerator_s": "accelerator", "dram_s": "memory"}
    parts = [f"{label} {format_seconds(spent[name])}" for name, label in names.items()]
    lines.append(
        f"a step, one task at a time: {', '.join(parts)} (modelled); "
        f"{format_bytes(spent['moved_bytes'])} copied over"
    )
    if result["hit_rate"] == result["hit_rate"]:  # not nan
        lines.append(f"{100 * result['hit_rate']:.1f} % of experts' uses found them resident")
    if rate > 0 and result["limit_s"] and result["predicted_s"]:
        percent = 100 * rate * result["limit_s"]
        lines.append(
            f"{percent:.0f} % of the machine's limit of {1 / result['limit_s']:.1f} tokens/s a row;"
            f" predicted {1 / result['predicted_s']:.1f}"
        )
    print(*(f"[{line}]" for line in lines), sep="\n", file=sys.stderr, flush=True)


COMMANDS = {
    "plan": (PlanConfig, run_plan),
    "generate": (GenerateConfig, run_generate),
}
