"""Run the tasks of the `lm-eval` package on our models (extra `harness`)."""

from collections.abc import Sequence
from typing import Any

import jax

from jaxsys.core.errors import UserError
from jaxsys.evaluate.generate import generate
from jaxsys.evaluate.perplexity import windows
from jaxsys.evaluate.protocol import Model
from jaxsys.evaluate.sampling import Sampling
from jaxsys.evaluate.score import Request, prefix_id, score

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")
_OTHER = ("until", "do_sample", "seed")


def harness_model(
    model: Model,
    tokenizer: Any,
    *,
    rows: int = 8,
    max_gen_toks: int = 256,
    tokens_per_batch: int = 2048,
) -> Any:
    """Wrap a model as `lm_eval.api.model.LM`, for `lm_eval.simple_evaluate(model=...)`.

    Args:
      model: see `Model`.
      tokenizer: with `encode`, `decode`, and a begin or end token.
      rows: prompts that are answered together.
      max_gen_toks: of an answer, where the task does not say.
      tokens_per_batch: rows times length of one scoring program.

    Returns:
      An object of a class made here, since the package it derives from is an extra.

    Raises:
      UserError: if the package lm-eval is missing.

    >>> harness_model(model, tokenizer)  # doctest: +SKIP
    """
    try:
        from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "the tasks of lm-eval need the package lm-eval, which is missing; run "
            "pip install 'jaxsys[harness]'"
        ) from None

    class HarnessModel(TemplateLM):
        """Answer the three questions of lm-eval with `score` and `generate`."""

        tokenizer_name = "jaxsys"

        @property
        def eot_token_id(self) -> int:
            return prefix_id(tokenizer) if tokenizer.eos_id is None else int(tokenizer.eos_id)

        @property
        def prefix_token_id(self) -> int:
            return prefix_id(tokenizer)

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
        ) -> list[int]:
            del kwargs
            ids = [int(i) for i in tokenizer.encode(string)]
            drop = add_special_tokens is False and tokenizer.bos_id is not None
            return ids[1:] if drop and ids[:1] == [tokenizer.bos_id] else ids

        def _loglikelihood_tokens(
            self, requests: Sequence[Any], **kwargs: Any
        ) -> list[tuple[float, bool]]:
            del kwargs
            found = score(
                model,
                [Request(context, continuation) for _, context, continuation in requests],
                tokens_per_batch=tokens_per_batch,
            )
            pairs = zip(found.log_likelihood.tolist(), found.greedy.tolist(), strict=True)
            return list(pairs)

        def loglikelihood_rolling(
            self, requests: Sequence[Any], disable_tqdm: bool = False
        ) -> list[float]:
            del disable_tqdm
            parts = [
                windows(
                    self.tok_encode(request.args[0], add_special_tokens=False),
                    model.context,
                    model.context,
                    self.prefix_token_id,
                )
                for request in requests
            ]
            flat = [request for part in parts for request in part]
            values = score(model, flat, tokens_per_batch=tokens_per_batch).log_likelihood
            sums, start = [], 0
            for part in parts:
                sums.append(float(values[start : start + len(part)].sum()))
                start += len(part)
            return sums

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            del disable_tqdm
            return _generate_until(model, tokenizer, [r.args for r in requests], rows, max_gen_toks)

    return HarnessModel()


def _generate_until(
    model: Model,
    tokenizer: Any,
    requests: list[tuple[str, dict[str, Any]]],
    rows: int,
    max_gen_toks: int,
) -> list[str]:
    groups: dict[str, list[int]] = {}
    for i, (_, options) in enumerate(requests):
        groups.setdefault(repr(sorted(options.items())), []).append(i)
    texts = [""] * len(requests)
    for members in groups.values():
        options = requests[members[0]][1]
        encoded = {i: [int(t) for t in tokenizer.encode(requests[i][0])] for i in members}
        members = sorted(members, key=lambda i: -len(encoded[i]))
        for start in range(0, len(members), rows):
            part = members[start : start + rows]
            found = _answers(model, tokenizer, [encoded[i] for i in part], options, max_gen_toks)
            for i, text in zip(part, found, strict=True):
                texts[i] = text
    return texts


def _answers(
    model: Model,
    tokenizer: Any,
    prompts: list[list[int]],
    options: dict[str, Any],
    max_gen_toks: int,
) -> tuple[str, ...]:
    unknown = set(options) - {*_SAMPLING, *_LENGTHS, *_OTHER}
    if unknown:
        raise UserError(
            f"the task asks for the generation option {sorted(unknown)[0]!r}, which is not known "
            f"here; expected some of {', '.join((*_SAMPLING, *_LENGTHS, *_OTHER))}"
        )
    laws = {name: options[name] for name in _SAMPLING if options.get(name) is not None}
    if not options.get("do_sample", laws.get("temperature", 0) > 0):
        laws["temperature"] = 0.0
    else:
        laws.setdefault("temperature", 1.0)
    asked = [options[name] for name in _LENGTHS if options.get(name) is not None]
    most = min(asked[0] if asked else max_gen_toks, model.context - 1)
    until = options.get("until") or []
    # As lm-eval's own models do: a prompt that leaves no room loses its beginning.
    kept = [ids[-(model.context - most) :] for ids in prompts]
    return generate(
        model,
        kept,
        max_tokens=most,
        sampling=Sampling(**laws),
        key=jax.random.key(int(options.get("seed") or 0)),
        end_ids=() if tokenizer.eos_id is None else (tokenizer.eos_id,),
        tokenizer=tokenizer,
        stop=[until] if isinstance(until, str) else until,
    ).texts
