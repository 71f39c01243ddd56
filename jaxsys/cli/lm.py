"""`jaxsys lm`: language models as checkpoints: look at them, convert, score and sample them."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxsys.cli.model_options import Dtype, ModelName, dtype_of, sampling_of
from jaxsys.cli.options import Common, Output
from jaxsys.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class InfoConfig(Output):
    """Say what a model is: family, sizes, parameters, tokenizer.

    Attributes:
      model: A name (smollm2, stories260k, tiny) or a path: a Hugging Face folder, .gguf, .bin.
    """

    model: ModelName


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(Output):
    """Write a model as a Hugging Face folder, with its tokenizer.

    Attributes:
      model: A name (smollm2, stories260k, tiny) or a path: a Hugging Face folder, .gguf, .bin.
      out: Folder to write.
      dtype: Of the parameters; file keeps what was read (quantised GGUF becomes float32).
    """

    model: ModelName
    out: Path
    dtype: Dtype = "file"


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Output):
    """Score a model on tasks, with intervals beside the chance level.

    Attributes:
      model: A name (smollm2, stories260k, tiny) or a path: a Hugging Face folder, .gguf, .bin.
      out: Folder for the tables and every single answer.
      task: Built-in tasks (arc_easy arc_challenge openbookqa boolq winogrande mmlu gsm8k, all but
        the last two also with _written behind; wikitext2 wikitext2_valid), or .jsonl or .txt files.
      limit: Take the first questions of each task only.
      data: Folder with eval/ and text/; JAXSYS_DATA by default.
      window: Input tokens of a window, for texts; the model's context by default.
      stride: Tokens from window to window, for texts; the window by default (disjoint windows).
      windows: Take the first windows of each text only.
      dtype: Of the parameters.
      batch_tokens: Rows times length of one program; more needs more memory.
    """

    model: ModelName
    task: tuple[str, ...]
    out: Path | None = None
    limit: int | None = None
    data: Path | None = None
    window: int | None = None
    stride: int | None = None
    windows: int | None = None
    dtype: Dtype = "file"
    batch_tokens: int = 2048


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Common):
    """Continue a text; the text alone goes to standard output.

    Attributes:
      model: A name (smollm2, stories260k, tiny) or a path: a Hugging Face folder, .gguf, .bin.
      out: Folder for generate.json.
      seed: Seed of the draws; the same seed gives the same text.
      prompt: What to continue.
      chat: Put the prompt into the model's chat template, as a user's message.
      max_tokens: New tokens at most.
      temperature: 0 takes the most likely token.
      top_k: Keep the k most likely tokens; 0 keeps all.
      top_p: Keep the fewest most likely tokens that together reach this probability.
      min_p: Keep tokens at least so many times as likely as the most likely one.
      repetition_penalty: Above 1 makes tokens less likely that are there already.
      stop: Texts that end the answer.
      dtype: Of the parameters.
    """

    model: ModelName
    prompt: str
    chat: bool = False
    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    dtype: Dtype = "file"


def run_info(config: InfoConfig) -> dict[str, Any]:
    """Print a table of facts."""
    from jaxsys.core.report import print_table
    from jaxsys.evaluate.open import describe_model

    facts = describe_model(config.model)
    if not config.json:
        print_table([{"": name, "value": str(value)} for name, value in facts.items()])
    return facts


def run_convert(config: ConvertConfig) -> dict[str, Any]:
    """Write the folder."""
    from jaxsys.data.tokenizer import load_tokenizer, save_tokenizer
    from jaxsys.models import lm

    path = lm.find_model(config.model)
    tokenizer = load_tokenizer(path)
    files = lm.convert(path, config.out, dtype=dtype_of(config.dtype))
    files += save_tokenizer(config.out, tokenizer)
    if not config.json:
        for file in files:
            print(file)
    return {"files": [str(file) for file in files]}


def run_eval(config: EvalConfig) -> dict[str, Any]:
    """Run the tasks and print their tables."""
    from jaxsys.core.report import print_table
    from jaxsys.evaluate import load_task
    from jaxsys.evaluate.open import open_model
    from jaxsys.evaluate.run import progress_bar, run_task, write_reports

    if not config.task:
        raise UserError("no task is named; pass --task arc_easy, say")
    # All are read before the first is run: a mistake in the last one shows at once.
    tasks = [load_task(name, config.data).head(config.limit) for name in config.task]
    opened = open_model(config.model, dtype_of(config.dtype))
    reports = []
    for task in tasks:
        with progress_bar(task.name) as progress:
            report = run_task(
                opened.model,
                opened.tokenizer,
                task,
                window=config.window,
                stride=config.stride,
                most_windows=config.windows,
                tokens_per_batch=config.batch_tokens,
                progress=progress,
            )
        reports.append(report)
        if not config.json:
            print_table(report.rounded(), title=f"{config.model}: {task.name}")
            print(f"{report.protocol}; {report.seconds:.0f} s\n", flush=True)
    if config.out:
        write_reports(config.out, reports, f"{config.model}: {', '.join(config.task)}")
    return {
        "model": config.model,
        "tasks": [{**r._asdict(), "answers": len(r.answers)} for r in reports],
    }


def run_generate(config: GenerateConfig) -> dict[str, Any]:
    """Print the text while it comes, and the rate on standard error."""
    import jax

    from jaxsys.core.report import atomic_write, to_json
    from jaxsys.evaluate import generate
    from jaxsys.evaluate.open import encode_prompt, open_model

    sampling = sampling_of(config)
    opened = open_model(config.model, dtype_of(config.dtype))
    ids = encode_prompt(opened.tokenizer, config.prompt, chat=config.chat)
    found = generate(
        opened.model,
        [ids],
        max_tokens=config.max_tokens,
        sampling=sampling,
        key=jax.random.key(config.seed),
        end_ids=opened.end_ids,
        tokenizer=opened.tokenizer,
        stop=config.stop,
        on_piece=lambda piece: print(piece.text, end="", flush=True),
    )
    print(flush=True)
    rate = f"{found.tokens_per_s:.1f} tokens/s, " if found.tokens_per_s > 0 else ""
    told = f"{len(found.tokens[0])} tokens, {rate}first after {found.first_s:.1f} s with compiling"
    print(f"[{told}; ended by {found.ended[0]}]", file=sys.stderr)
    result = {
        "text": found.texts[0],
        "prompt_tokens": len(ids),
        "tokens": found.tokens[0],
        "ended": found.ended[0],
        "first_s": found.first_s,
        "tokens_per_s": found.tokens_per_s,
    }
    if config.out:
        atomic_write(config.out / "generate.json", to_json(result) + "\n")
    return result


COMMANDS = {
    "info": (InfoConfig, run_info),
    "convert": (ConvertConfig, run_convert),
    "eval": (EvalConfig, run_eval),
    "generate": (GenerateConfig, run_generate),
}
