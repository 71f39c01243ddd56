"""Rows of embeddings and output matrices in one order, for models of several vocabularies.

A model's matrix may have more rows than its tokenizer has tokens (padding) or fewer (tokens without
a row). Both are settled here: the plan says for every model which of its rows stands where, and
what a token's row is in a model that lacks it: the base's, else the only owner's, else the mean of
the owners'; rows that stand for no token are the mean of all others, as in padded matrices.

>>> models = [ModelRows("a", 3, None), ModelRows("b", 3, None)]
>>> embedding_plan(models) is None  # equal as far as anybody can tell: nothing to do
True
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from jaxsys.core.errors import UserError
from jaxsys.merge.tokenizers import (
    TokenizerFile,
    TokenizerRule,
    TokenSource,
    merge_tokenizers,
    read_tokenizer,
    strip,
)

# Ends of the names of tensors with one row for each token.
_ROWS_PER_TOKEN = (
    "embed_tokens.weight",
    "lm_head.weight",
    "lm_head.bias",
    "wte.weight",
    "embed_in.weight",
    "embed_out.weight",
    "word_embeddings.weight",
    "shared.weight",
)
HEAD = "lm_head.weight"


class ModelRows(NamedTuple):
    """Say what is known of a model's vocabulary.

    Attributes:
      name: as recipes call it.
      rows: of its embedding.
      file: its tokenizer; None if it has none, which then is taken to be the base's.

    >>> ModelRows("a", 10, None).rows
    10
    """

    name: str
    rows: int
    file: TokenizerFile | None


class EmbeddingPlan(NamedTuple):
    """Say where the rows of all models go.

    Attributes:
      rows: of every matrix afterwards.
      file: the tokenizer afterwards.
      index: `[N, rows]`, the row of each model that goes to each place; -1 where it has none.
      filled: `[F]`, places whose token some model lacks or must give up.
      forced: `[F]`, the source holds for models with a row of their own too.
      starts: `[F + 1]`, place f's donors are ``donors[starts[f]:starts[f + 1]]``.
      donors: `[D, 2]`, model and its row; the mean of a place's donors is its row, and zero if it
        has none.

    >>> EmbeddingPlan._fields[0]
    'rows'
    """

    rows: int
    file: TokenizerFile | None
    index: Int32[np.ndarray, "N R"]
    filled: Int32[np.ndarray, "F"]
    forced: Bool[np.ndarray, "F"]
    starts: Int32[np.ndarray, "F1"]
    donors: Int32[np.ndarray, "D 2"]


def has_token_rows(name: str) -> bool:
    """Say whether a tensor has one row for each token, by its name.

    >>> has_token_rows("model.embed_tokens.weight"), has_token_rows("model.norm.weight")
    (True, False)
    """
    return name.endswith(_ROWS_PER_TOKEN)


def embedding_plan(
    models: Sequence[ModelRows], base: int = 0, rule: TokenizerRule | None = None
) -> EmbeddingPlan | None:
    """Plan the rows of embedding and output matrices.

    Args:
      models: all inputs, the base among them.
      base: which of them is the base (mergekit: the first, where a recipe names none).
      rule: which vocabulary is wanted; None accepts equal ones only, padded or not.

    Returns:
      The plan; None if every matrix stays as it is.

    Raises:
      UserError: for vocabularies that differ without a rule, and for a rule that names a token or
        model that is not there.

    >>> def one(*tokens):
    ...     vocab = {t: i for i, t in enumerate(tokens)}
    ...     document = {"model": {"type": "WordLevel", "vocab": vocab}}
    ...     return ModelRows(tokens[0], len(tokens), TokenizerFile(document, vocab, None))
    >>> plan = embedding_plan([one("a", "b"), one("c", "b")], rule=TokenizerRule())
    >>> plan.index.tolist(), plan.donors.tolist()
    ([[0, 1, -1], [-1, 1, 0]], [[0, 0], [1, 0]])
    """
    own = models[base]
    files = [m.file or own.file for m in models]
    if rule is None:
        if not _same_vocabularies(models, files, own):
            return None
        rule, rows = TokenizerRule("base"), own.rows
    else:
        rows = None
    if any(file is None for file in files):
        lacking = [m.name for m, file in zip(models, files, strict=True) if file is None]
        raise UserError(
            f"{', '.join(lacking)} have no tokenizer.json, and the vocabulary is to be "
            f"{rule.source!r}; add the file to the folders, or leave the tokenizer rule out"
        )
    stripped = [strip(f, m.rows) for f, m in zip(files, models, strict=True) if f]
    merged = _wanted(rule.source, models, stripped, base)
    vocab = merged.vocab
    count = max(vocab.values(), default=-1) + 1
    multiple = rule.pad_to_multiple_of or 1
    rows = -(-count // multiple) * multiple if rows is None else max(rows, count)
    index = np.full((len(models), rows), -1, np.int32)
    for i, file in enumerate(stripped):
        shared = [
            (place, file.vocab[token]) for token, place in vocab.items() if token in file.vocab
        ]
        if shared:
            places, theirs = np.array(shared, np.int32).T
            index[i, places] = theirs
    donors = _donors(rule, models, stripped, vocab, index, base)
    return _pack(merged, rows, index, donors)


def _same_vocabularies(
    models: Sequence[ModelRows], files: Sequence[TokenizerFile | None], own: ModelRows
) -> bool:
    """Say whether rows must move although no rule was given; refuse what would need one."""
    vocab = None if own.file is None else own.file.vocab
    odd = [
        f"{m.name} ({len(f.vocab)} tokens)"
        for m, f in zip(models, files, strict=True)
        if f is not None and vocab is not None and f.vocab != vocab
    ]
    if odd:
        raise UserError(
            f"{', '.join(odd)} have another vocabulary than {own.name} ({len(vocab or ())} "
            "tokens); expected one, as rows of the embeddings would be mixed up; say which is "
            "wanted by tokenizer_source: union, base or a model"
        )
    sizes = {m.rows for m in models}
    if len(sizes) > 1 and vocab is None:
        counts = ", ".join(f"{m.name}: {m.rows}" for m in models)
        raise UserError(
            f"the embeddings have different numbers of rows ({counts}) and no tokenizer.json says "
            "which token is which; add the tokenizers to the folders and a tokenizer_source"
        )
    return len(sizes) > 1


def _wanted(
    source: str, models: Sequence[ModelRows], files: Sequence[TokenizerFile], base: int
) -> TokenizerFile:
    if source == "base":
        return files[base]
    if source == "union":
        return merge_tokenizers([files[base], *(f for i, f in enumerate(files) if i != base)])
    names = [m.name for m in models]
    return files[names.index(source)] if source in names else read_tokenizer(source)


Donors = tuple[list[tuple[int, int]], bool]  # models and their rows; whether it is forced


def _donors(
    rule: TokenizerRule,
    models: Sequence[ModelRows],
    files: Sequence[TokenizerFile],
    vocab: Mapping[str, int],
    index: np.ndarray,
    base: int,
) -> dict[int, Donors]:
    """Choose the donors of every place that some model cannot fill, or that a rule names."""
    places = np.sort(np.fromiter(vocab.values(), np.int64, len(vocab)))
    has = index[:, places] >= 0
    donors: dict[int, Donors] = {}
    for place in places[~has.all(0)].tolist():
        own = int(index[base, place])
        owners = [(i, int(row)) for i, row in enumerate(index[:, place]) if row >= 0]
        donors[place] = [(base, own)] if own >= 0 else owners, False
    for token, source in rule.tokens.items():
        if token not in vocab:
            raise UserError(
                f"the tokenizer section has a rule for {token!r}, which the vocabulary "
                f"{rule.source!r} does not hold; correct the token or take another source"
            )
        rows = [] if source.zero else [_donor_row(token, source, models, files)]
        donors[vocab[token]] = rows, source.force
    return donors


def _donor_row(
    token: str,
    source: TokenSource,
    models: Sequence[ModelRows],
    files: Sequence[TokenizerFile],
) -> tuple[int, int]:
    names = [m.name for m in models]
    if source.model not in names:
        raise UserError(
            f"the rule for token {token!r} takes its row from {source.model!r}, which is not "
            f"merged; expected one of {', '.join(names)}; correct the model"
        )
    i = names.index(source.model)
    wanted = token if source.token is None else source.token
    row = files[i].vocab.get(wanted, -1) if source.token_id is None else source.token_id
    if not 0 <= row < models[i].rows:
        what = repr(wanted) if source.token_id is None else f"row {source.token_id}"
        raise UserError(
            f"the rule for token {token!r} takes {what} of {source.model}, which has no such row; "
            "correct the token or the model"
        )
    return i, row


def _pack(
    file: TokenizerFile, rows: int, index: np.ndarray, donors: Mapping[int, Donors]
) -> EmbeddingPlan:
    flat = [pair for pairs, _ in donors.values() for pair in pairs]
    sizes = [len(pairs) for pairs, _ in donors.values()]
    return EmbeddingPlan(
        rows,
        file,
        index,
        np.fromiter(donors, np.int32, len(donors)),
        np.array([forced for _, forced in donors.values()], bool),
        np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32),
        np.array(flat, np.int32).reshape(-1, 2),
    )


def reorder_rows(plan: EmbeddingPlan, tensors: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Bring one tensor of all models into the plan's order.

    Args:
      plan: from `embedding_plan`.
      tensors: per model, `[rows of the model, ...]`, in the plan's order of models.

    Returns:
      Per model `[plan.rows, ...]` in its own dtype.

    Raises:
      UserError: for tensors that differ in more than their number of rows.

    >>> a = ModelRows("a", 2, TokenizerFile({"model": {"vocab": {}}}, {"x": 0, "y": 1}, None))
    >>> plan = embedding_plan([a], rule=TokenizerRule("base", pad_to_multiple_of=4))
    >>> reorder_rows(plan, [np.array([[1.0], [3.0]])])[0].ravel().tolist()
    [1.0, 3.0, 2.0, 2.0]
    """
    if len({t.shape[1:] for t in tensors}) > 1:
        shapes = ", ".join(str(t.shape) for t in tensors)
        raise UserError(
            f"embeddings of {shapes} differ in width; models of one width can be merged; leave one "
            "out"
        )
    defaults = _defaults(plan, tensors)
    tokens = np.zeros(plan.rows, bool)
    tokens[(plan.index >= 0).any(0)] = True
    tokens[plan.filled] = True
    result = []
    for i, tensor in enumerate(tensors):
        have = plan.index[i] >= 0
        out = np.empty((plan.rows, *tensor.shape[1:]), tensor.dtype)
        out[have] = tensor[plan.index[i][have]]
        need = ~have[plan.filled] | plan.forced
        out[plan.filled[need]] = defaults[need].astype(tensor.dtype)
        if not tokens.all():
            out[~tokens] = np.mean(out[tokens], axis=0, dtype=np.float64).astype(tensor.dtype)
        result.append(out)
    return result


def _defaults(plan: EmbeddingPlan, tensors: Sequence[np.ndarray]) -> np.ndarray:
    """Average the donors of each filled place, `[F, ...]` in float32."""
    rows = np.zeros((len(plan.filled), *tensors[0].shape[1:]), np.float32)
    counts = np.diff(plan.starts)
    owner = np.repeat(np.arange(len(counts)), counts)
    for i, tensor in enumerate(tensors):
        mine = plan.donors[:, 0] == i
        # A model gives at most one row to a place, so no place stands twice in one model's list.
        rows[owner[mine]] += tensor[plan.donors[mine, 1]].astype(np.float32)
    return rows / np.maximum(counts, 1).astype(np.float32).reshape(-1, *(1,) * (rows.ndim - 1))


def settle_tied(
    models: Sequence[Mapping[str, Any]], tied: Sequence[bool], embed: str
) -> tuple[list[Mapping[str, Any]], bool]:
    """Bring models with tied embeddings and models without under one set of names.

    The result is tied only if all are. Where only some are, those read their embedding as the
    output matrix too; where all are, a copy of it that a file may hold is left out.

    Args:
      models: tensors by name.
      tied: ``tie_word_embeddings`` of each.
      embed: name of the embedding.

    Returns:
      Tensors by name, and whether the result is tied.

    >>> [a, b], tied = settle_tied([{"e": 1}, {"e": 2, "lm_head.weight": 3}], [True, False], "e")
    >>> a, tied
    ({'e': 1, 'lm_head.weight': 1}, False)
    """
    result = []
    for model, is_tied in zip(models, tied, strict=True):
        names = {name: name for name in model if not (all(tied) and name == HEAD)}
        names |= {HEAD: embed} if is_tied and not all(tied) else {}
        # What is made when asked for stays so.
        plain = isinstance(model, dict)
        result.append({k: model[n] for k, n in names.items()} if plain else _Named(model, names))
    return result, all(tied)


class _Named(Mapping[str, Any]):
    """Read a mapping under other names."""

    def __init__(self, model: Mapping[str, Any], names: Mapping[str, str]):
        self._model, self._names = model, names

    def __getitem__(self, name: str) -> Any:
        return self._model[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
