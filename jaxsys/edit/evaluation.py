"""What an edit achieved: did the fact change, with it what follows, and nothing else.

One table of probes serves every method, by likelihood, by top-1 tokens and by free writing. What
the model said before the first edit is an argument (`Base`), made before it and never after.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.core.report import to_json
from jaxsys.core.tree import fingerprint
from jaxsys.edit.contract import Answering, Record
from jaxsys.edit.fluency import consistency, fluency, says
from jaxsys.evaluate.generate import generate
from jaxsys.evaluate.sampling import Sampling
from jaxsys.evaluate.score import Request as Asked
from jaxsys.evaluate.score import Scores, encode_pair, score

Kind = Literal["efficacy", "paraphrase", "neighbourhood", "portability"]


class Probe(NamedTuple):
    """Ask one thing of an edited model.

    Attributes:
      record: index of the record it belongs to.
      kind: what it shows.
      prompt: the text before the answer.
      answer: what should be the likelier one after the edit.
      rival: what should be the less likely one, where there is one.

    >>> Probe(0, "efficacy", "Rome is in", "France", "Italy").rival
    'Italy'
    """

    record: int
    kind: Kind
    prompt: str
    answer: str
    rival: str | None = None


def probes_of(records: Sequence[Record]) -> tuple[Probe, ...]:
    """List what is asked about records: rewrite, paraphrase, neighbourhood, portability prompts.

    Raises:
      UserError: without records.

    >>> from jaxsys.edit.contract import Request
    >>> record = Record(Request("Rome is in", "Rome", "France", "Italy"), ("Where is Rome? In",))
    >>> [(p.kind, p.answer, p.rival) for p in probes_of([record])]
    [('efficacy', 'France', 'Italy'), ('paraphrase', 'France', 'Italy')]
    """
    if not records:
        raise UserError("there is no record; give at least one to evaluate")
    found: list[Probe] = []
    for i, record in enumerate(records):
        prompt, _, target, truth = record.request
        found.append(Probe(i, "efficacy", prompt, target, truth))
        found += [Probe(i, "paraphrase", p, target, truth) for p in record.paraphrases]
        found += [Probe(i, "neighbourhood", p, a, target) for p, a in record.neighbourhood]
        found += [Probe(i, "portability", p, a) for p, a in record.portability]
    return tuple(found)


class Base(NamedTuple):
    """Hold what the unedited model says to the neighbourhood probes.

    Attributes:
      model: digest of its parameters.
      probes: digest of the probes.
      continuations: for each probe the ids that it writes greedily, as many as the answer has;
        empty for probes of other kinds.

    >>> Base("ab", "cd", ((), (5,))).continuations[1]
    (5,)
    """

    model: str
    probes: str
    continuations: tuple[tuple[int, ...], ...]


def digest(value: Any) -> str:
    """Hash a pytree of arrays, or anything that JSON can hold.

    >>> digest({"w": np.zeros(2)}) == digest({"w": np.zeros(2)}), digest(["a"]) == digest(["b"])
    (True, False)
    """
    leaves = jax.tree.leaves(value)
    arrays = leaves and all(hasattr(leaf, "dtype") for leaf in leaves)
    text = to_json(fingerprint(value) if arrays else value)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def base_predictions(model: Any, tokenizer: Any, records: Sequence[Record]) -> Base:
    """Ask the unedited model, before anything is edited.

    Args:
      model: a `jaxsys.evaluate.protocol.Model`.
      tokenizer: its own.
      records: those that will be evaluated, in that order.

    Returns:
      What `evaluate_edits` compares with; see `Base`.

    >>> from jaxsys.data import ByteTokenizer
    >>> from jaxsys.edit.contract import Request
    >>> from jaxsys.evaluate.protocol import from_forward
    >>> count = from_forward(lambda p, t: jax.nn.one_hot(t + 1, 256), {}, 256, 32)
    >>> record = Record(Request("a", "a", "x"), neighbourhood=(("q", "r"),))
    >>> base_predictions(count, ByteTokenizer(), [record]).continuations
    ((), (114, 115))
    """
    probes = probes_of(records)
    asked = {
        i: encode_pair(tokenizer, p.prompt, f" {p.answer}")
        for i, p in enumerate(probes)
        if p.kind == "neighbourhood"
    }
    order = sorted(asked, key=lambda i: -len(asked[i].context))  # the largest program first
    found: list[tuple[int, ...]] = [()] * len(probes)
    for start in range(0, len(order), 16):
        part = order[start : start + 16]
        longest = max(len(asked[i].continuation) for i in part)
        written = generate(model, [asked[i].context for i in part], max_tokens=longest)
        for i, ids in zip(part, written.tokens, strict=True):
            found[i] = tuple(ids[: len(asked[i].continuation)])
    return Base(digest(model.params), digest([list(p) for p in probes]), tuple(found))


def base_of_each(model: Any, tokenizer: Any, records: Sequence[Record]) -> list[Base]:
    """Ask the unedited model about all records at a time, for edits of one record each.

    Args:
      model: a `jaxsys.evaluate.protocol.Model`.
      tokenizer: its own.
      records: each to be evaluated alone.

    >>> base_of_each(None, None, [])
    []
    """
    if not records:
        return []
    whole, found, start = base_predictions(model, tokenizer, records), [], 0
    for record in records:
        probes = probes_of([record])
        own = whole.continuations[start : start + len(probes)]
        found.append(Base(whole.model, digest([list(p) for p in probes]), own))
        start += len(probes)
    return found


@dataclass(frozen=True)
class EvaluationConfig:
    """Say what is written freely beside what is scored, and in what portions.

    Attributes:
      answer_tokens: length of the greedy answer that is searched for the target; 0 for none.
      fluency_tokens: length of the texts whose n-gram entropy is taken (100 in the paper, sampled
        from the 5 likeliest tokens); 0 for none.
      tokens_per_batch: of a scoring program.
      rows: texts that are written together.
      seed: of the sampled texts.

    >>> EvaluationConfig().fluency_tokens
    100
    """

    answer_tokens: int = 16
    fluency_tokens: int = 100
    tokens_per_batch: int = 1024
    rows: int = 16
    seed: int = 0


def evaluate_edits(
    answering: Answering,
    tokenizer: Any,
    records: Sequence[Record],
    base: Base | None = None,
    config: EvaluationConfig | None = None,
) -> list[dict[str, float]]:
    """Evaluate one edited model on records.

    With ℓ the mean negative log-likelihood of an answer's tokens, for each kind of probe (mean over
    the record's probes of that kind):

    - `efficacy`, `paraphrase`, `neighbourhood` (ES, PS, NS): whether ℓ(answer) < ℓ(rival), where a
      rival is known, and `…_magnitude` exp(−ℓ(answer)) − exp(−ℓ(rival));
    - `…_top1`: whether every token of the answer is the likeliest one, given those before it, and
      `…_tokens` the share of tokens that are; for `portability` too;
    - `locality`: whether greedy decoding still gives what the unedited model gave (with `base`);
    - `written`: whether a freely written greedy answer names the target, before the old answer;
    - `fluency`, `consistency`: see `jaxsys.edit.fluency`.

    Args:
      answering: the edited model; `Answering(model)` for any `evaluate.Model`.
      tokenizer: its own.
      records: to evaluate.
      base: of the unedited model and the same records.
      config: see `EvaluationConfig`.

    Returns:
      One dict for each record, holding the metrics that it has probes for.

    Raises:
      UserError: without records, or if `base` was made with other probes.

    Reference: arXiv 2202.05262, section 3.3; arXiv 2308.07269 (locality, portability).

    >>> from jaxsys.data import ByteTokenizer
    >>> from jaxsys.edit.contract import Request
    >>> from jaxsys.evaluate.protocol import from_forward
    >>> count = from_forward(lambda p, t: jax.nn.one_hot(0 * t + 33, 256), {}, 256, 64)
    >>> record = Record(Request("?", "?", "!", "x"))
    >>> quiet = EvaluationConfig(answer_tokens=0, fluency_tokens=0)
    >>> evaluate_edits(Answering(count), ByteTokenizer(), [record], config=quiet)[0]["efficacy"]
    1.0
    """
    config = EvaluationConfig() if config is None else config
    probes = probes_of(records)
    if base is not None and base.probes != digest([list(p) for p in probes]):
        raise UserError(
            "the predictions of the unedited model are of other records; expected those of the "
            "records to evaluate, in their order; make them with base_predictions"
        )
    rows = _likelihoods(answering, tokenizer, probes, base, len(records), config)
    texts = evaluate_texts(answering, tokenizer, records, config)
    return [row | more for row, more in zip(rows, texts, strict=True)]


def _likelihoods(
    answering: Answering,
    tokenizer: Any,
    probes: Sequence[Probe],
    base: Base | None,
    count: int,
    config: EvaluationConfig,
) -> list[dict[str, float]]:
    asked: list[Asked] = []
    owner: list[tuple[int, str]] = []
    for i, probe in enumerate(probes):
        prompt = _seen(answering, probe.prompt)
        pair = encode_pair(tokenizer, prompt, f" {probe.answer}")
        asked.append(pair)
        owner.append((i, "answer"))
        if probe.rival:
            asked.append(encode_pair(tokenizer, prompt, f" {probe.rival}"))
            owner.append((i, "rival"))
        if base is not None and base.continuations[i]:
            asked.append(Asked(pair.context, base.continuations[i]))
            owner.append((i, "base"))
    scores = score(answering.model, asked, tokens_per_batch=config.tokens_per_batch)
    at = {key: place for place, key in enumerate(owner)}
    found: list[dict[str, list[float]]] = [{} for _ in range(count)]
    for i, probe in enumerate(probes):
        for name, value in _judge(scores, at, i, probe).items():
            found[probe.record].setdefault(name, []).append(value)
    return [{name: float(np.mean(v)) for name, v in row.items()} for row in found]


def _judge(
    scores: Scores, at: Mapping[tuple[int, str], int], i: int, probe: Probe
) -> dict[str, float]:
    answer, rival, base = (at.get((i, part)) for part in ("answer", "rival", "base"))
    assert answer is not None

    def nll(place: int) -> float:
        value = -scores.log_likelihood[place] / max(int(scores.tokens[place]), 1)
        return float(value) if np.isfinite(value) else float("inf")

    found = {
        f"{probe.kind}_top1": float(scores.greedy[answer]),
        f"{probe.kind}_tokens": float(scores.hits[answer] / max(int(scores.tokens[answer]), 1)),
    }
    if rival is not None:
        new, old = nll(answer), nll(rival)
        found[probe.kind] = float(new < old)
        found[f"{probe.kind}_magnitude"] = float(np.exp(-new) - np.exp(-old))
    if base is not None:
        found["locality"] = float(scores.greedy[base])
    return found


def _seen(answering: Answering, prompt: str) -> str:
    return prompt if answering.rewrite is None else answering.rewrite(prompt)


def evaluate_texts(
    answering: Answering, tokenizer: Any, records: Sequence[Record], config: EvaluationConfig
) -> list[dict[str, float]]:
    """Evaluate what an edited model writes: the part of `evaluate_edits` that needs no likelihood.

    Args:
      answering: the edited model.
      tokenizer: its own.
      records: to evaluate.
      config: see `EvaluationConfig`.

    >>> quiet = EvaluationConfig(answer_tokens=0, fluency_tokens=0)
    >>> evaluate_texts(Answering(None), None, [Record(None)], quiet)
    [{}]
    """
    found: list[dict[str, float]] = [{} for _ in records]
    if config.answer_tokens:
        prompts = [record.request.prompt for record in records]
        texts = write(answering, tokenizer, prompts, config.answer_tokens, config, None)
        for row, record, text in zip(found, records, texts, strict=True):
            row["written"] = float(says(text, record.request.target, record.request.truth))
            row["muted"] = float(not text.strip())
    if config.fluency_tokens:
        begun = [(i, p) for i, r in enumerate(records) for p in r.generation or (r.request.prompt,)]
        sampling = Sampling(temperature=1.0, top_k=5)
        texts = write(
            answering, tokenizer, [p for _, p in begun], config.fluency_tokens, config, sampling
        )
        of: list[list[str]] = [[] for _ in records]
        for (i, prompt), text in zip(begun, texts, strict=True):
            of[i].append(prompt + text)
        for row, record, written in zip(found, records, of, strict=True):
            row["fluency"] = fluency(written)
            if record.references:
                row["consistency"] = consistency(written, record.references)
    return found


def write(
    answering: Answering,
    tokenizer: Any,
    prompts: Sequence[str],
    max_tokens: int,
    config: EvaluationConfig | None = None,
    sampling: Sampling | None = None,
) -> list[str]:
    """Let an edited model write on from prompts, up to its end token.

    Args:
      answering: the edited model.
      tokenizer: its own.
      prompts: as the user puts them; if no more than ``config.rows``, they are rows in this order.
      max_tokens: of each text.
      config: rows together, and the seed.
      sampling: greedy by default.

    >>> from jaxsys.data import ByteTokenizer
    >>> from jaxsys.evaluate.protocol import from_forward
    >>> count = from_forward(lambda p, t: jax.nn.one_hot(t + 1, 256), {}, 256, 64)
    >>> write(Answering(count), ByteTokenizer(), ["ab"], 3)
    ['cde']
    """
    config = EvaluationConfig() if config is None else config
    ids = [encode_pair(tokenizer, _seen(answering, p), "").context for p in prompts]
    eos = getattr(tokenizer, "eos_id", None)
    texts = [""] * len(prompts)
    order = list(range(len(ids)))
    if len(ids) > config.rows:  # rows of similar length together, the largest program first
        order.sort(key=lambda i: -len(ids[i]))
    for start in range(0, len(order), config.rows):
        part = order[start : start + config.rows]
        written = generate(
            answering.model,
            [ids[i] for i in part],
            max_tokens=max_tokens,
            sampling=sampling,
            key=jax.random.fold_in(jax.random.key(config.seed), start),
            end_ids=() if eos is None else (eos,),
            tokenizer=tokenizer,
        )
        for i, text in zip(part, written.texts, strict=True):
            texts[i] = text
    return texts
