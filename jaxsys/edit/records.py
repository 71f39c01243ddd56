"""Read facts to edit and their probes: CounterFact, ZsRE, relation files, one's own lines."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxsys.core.errors import UserError
from jaxsys.edit.contract import Record, Request

LAYOUTS = ("counterfact", "counterfact_flat", "zsre", "relation", "lines")
_MOST_FILE_BYTES = 1 << 28
_MOST_TEXT = 20_000
_MOST_PROBES = 1_000
_NEIGHBOURS = 5
_OWN_FIELDS = frozenset((*Request._fields, *Record._fields)) - {"request"}


class Records(NamedTuple):
    """Hold what a file gave.

    Attributes:
      records: in the file's order.
      layout: in which the file was read, one of `LAYOUTS`.
      left_out: how many records were read over because their new answer is empty (ZsRE has such).

    >>> Records((), "zsre", 2).left_out
    2
    """

    records: tuple[Record, ...]
    layout: str
    left_out: int = 0


def load_records(
    path: str | os.PathLike[str], layout: str = "auto", limit: int | None = None
) -> Records:
    """Read a file of facts, or a folder of relation files.

    ``counterfact`` is the original form (``requested_rewrite``, paraphrase, neighbourhood and
    generation prompts), ``counterfact_flat`` one record with one probe of each kind, ``zsre`` the
    form with ``src``, ``alt`` and ``answers`` (a record whose ``alt`` is empty is left out and
    counted, and a locality question gets the question mark that it lacks), ``relation`` a relation
    with templates and samples, ``lines`` one's own JSON lines with ``prompt``, ``subject`` and
    ``target``, and any of ``truth``, ``paraphrases``, ``generation`` and ``references`` (lists of
    texts), ``neighbourhood`` and ``portability`` (lists of [prompt, answer]). A prompt may have
    ``{}`` where the subject goes.

    Reconstruction: relation files hold true facts only. The new answer is the next different one in
    the file, the other templates are the paraphrases, and the neighbourhood is five other subjects,
    those that share the true answer first.

    Args:
      path: the file, or a folder whose ``*.json`` are relations.
      layout: one of `LAYOUTS`, or ``auto`` to tell by the fields.
      limit: the most records to keep, counted after those left out; None keeps all.

    Raises:
      UserError: naming file and record, for what cannot be read.

    Reference: CounterFact, arXiv 2202.05262, section 3.3; ZsRE, arXiv 1706.04115.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "mine.jsonl")
    >>> _ = file.write_text('{"prompt": "{} is in", "subject": "Rome", "target": "France"}')
    >>> load_records(file).records[0].request
    Request(prompt='Rome is in', subject='Rome', target='France', truth=None)
    """
    file = Path(path)
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; expected at least 1; raise it or leave it out")
    if layout != "auto" and layout not in LAYOUTS:
        raise UserError(
            f"layout is {layout!r}; expected auto or one of {', '.join(LAYOUTS)}; correct the name"
        )
    if file.is_dir():
        return _folder(file, layout, limit)
    document = _parse(file, _read(file), layout)
    layout = _layout(file, document) if layout == "auto" else layout
    if layout == "relation":
        return Records(tuple(_relation(document, file))[:limit], layout)
    return _rows(file, document, layout, limit)


def _folder(folder: Path, layout: str, limit: int | None) -> Records:
    files = sorted(folder.rglob("*.json"))
    if layout not in ("auto", "relation") or not files:
        raise UserError(
            f"{folder} is a folder {f'to read as {layout}' if files else 'without .json files'}; "
            "expected relation files in it; name one file, or another folder"
        )
    found: list[Record] = []
    for file in files:
        found += _relation(_parse(file, _read(file), "relation"), file)
        if limit is not None and len(found) >= limit:
            break
    return Records(tuple(found[:limit]), "relation")


def _rows(file: Path, document: Any, layout: str, limit: int | None) -> Records:
    if not isinstance(document, list) or not document:
        raise UserError(f"{file} holds no list of records; expected one; choose another layout")
    found: list[Record] = []
    left_out = 0
    for i, row in enumerate(document):
        record = _READERS[layout](row, f"record {i} of {file}")
        if record is None:
            left_out += 1
            continue
        found.append(record)
        if limit is not None and len(found) == limit:
            break
    if not found:
        raise UserError(
            f"{file} holds {left_out} records and each has an empty new answer; expected one at "
            "least; use another file"
        )
    return Records(tuple(found), layout, left_out)


def _read(file: Path) -> str:
    try:
        with file.open("rb") as handle:
            data = handle.read(_MOST_FILE_BYTES + 1)
        if len(data) > _MOST_FILE_BYTES:
            raise UserError(
                f"{file} has over {_MOST_FILE_BYTES} bytes; expected fewer; split it into parts"
            )
        return data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); correct the path") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 (byte {error.start}); convert it first") from None


def _parse(file: Path, text: str, layout: str) -> Any:
    lines = [line for line in text.split("\n") if line.strip()] or [""]
    if layout in ("auto", "lines") and not text.lstrip().startswith("["):
        first = _json(lines[0])
        # One whole object on the first line: JSON lines, unless it is a relation without breaks.
        whole = isinstance(first, dict) and "samples" not in first
        if layout == "lines" or whole or file.suffix == ".jsonl":
            return [_line(line, f"record {i} of {file}") for i, line in enumerate(lines)]
    document = _json(text)
    if document is None:
        raise UserError(f"{file} is not JSON; expected records as JSON or JSON lines; mend it")
    return document


def _line(line: str, where: str) -> Any:
    row = _json(line)
    if row is None:
        raise UserError(f"{where} is not JSON; expected one object on each line; mend it")
    return row


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _layout(file: Path, document: Any) -> str:
    first = document[0] if isinstance(document, list) and document else document
    fields = set(first) if isinstance(first, Mapping) else set()
    for layout, needed in _SIGNS.items():
        if needed <= fields:
            return layout
    raise UserError(
        f"{file} is in no known layout: its first record has the fields "
        f"{', '.join(sorted(map(str, fields)))[:200] or 'of no object'}; expected those of one of "
        f"{', '.join(LAYOUTS)}; rewrite it as JSON lines with prompt, subject and target"
    )


def _text(row: Any, name: str, where: str, *, empty: bool = False) -> str:
    value = row.get(name) if isinstance(row, Mapping) else None
    if not isinstance(value, str) or len(value) > _MOST_TEXT or not (empty or value.strip()):
        got = f"a text of {len(value)} characters" if isinstance(value, str) else repr(value)[:60]
        raise UserError(
            f"{where} has {got} as {name}; expected a text of 1 to {_MOST_TEXT} characters; "
            "correct the record or the layout"
        )
    return value


def _list(row: Mapping[str, Any], name: str, where: str) -> list[Any]:
    value = row.get(name, [])
    if not isinstance(value, list) or len(value) > _MOST_PROBES:
        got = f"{len(value)} entries" if isinstance(value, list) else repr(value)[:60]
        raise UserError(
            f"{where} has {got} as {name}; expected a list of at most {_MOST_PROBES}; correct it"
        )
    return value


def _texts(row: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    return tuple(
        _text({name: value}, name, where) for value in _list(row, name, where) if value != ""
    )


def _pairs(row: Mapping[str, Any], name: str, where: str) -> tuple[tuple[str, str], ...]:
    pairs = _list(row, name, where)
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(
                f"{where} has {repr(pair)[:60]} in {name}; expected pairs [prompt, answer]; "
                "correct it"
            )
    return tuple(
        (_text({name: a}, name, where), _text({name: b}, name, where).strip()) for a, b in pairs
    )


def _request(prompt: str, subject: str, target: str, truth: str | None, where: str) -> Request:
    if subject not in prompt and prompt.count("{}") == 1:
        prompt = prompt.replace("{}", subject)
    if subject not in prompt:
        raise UserError(
            f"{where} has the prompt {prompt[:80]!r}, which does not name its subject "
            f"{subject[:60]!r}; expected it word for word, or {{}} in its place; correct the record"
        )
    return Request(prompt.rstrip(), subject, target.strip(), truth)


def _counterfact(row: Any, where: str) -> Record:
    rewrite = row.get("requested_rewrite") if isinstance(row, Mapping) else None
    if not isinstance(rewrite, Mapping):
        raise UserError(f"{where} lacks requested_rewrite; expected it; choose another layout")
    subject = _text(rewrite, "subject", where)
    target = _text(rewrite.get("target_new"), "str", f"target_new of {where}")
    truth = _text(rewrite.get("target_true"), "str", f"target_true of {where}").strip()
    request = _request(_text(rewrite, "prompt", where), subject, target, truth, where)
    near = _texts(row, "neighborhood_prompts", where)
    return Record(
        request,
        _texts(row, "paraphrase_prompts", where),
        tuple((prompt, truth) for prompt in near),
        generation=_texts(row, "generation_prompts", where),
    )


def _counterfact_flat(row: Any, where: str) -> Record:
    request = _request(
        _text(row, "prompt", where),
        _text(row, "subject", where),
        _text(row, "target_new", where),
        _text(row, "ground_truth", where).strip(),
        where,
    )
    pairs = {}
    for kind in ("locality", "portability"):
        pairs[kind] = ()
        if row.get(f"{kind}_prompt"):
            answer = _text(row, f"{kind}_ground_truth", where).strip()
            pairs[kind] = ((_text(row, f"{kind}_prompt", where).rstrip(), answer),)
    paraphrases = row.get("rephrase_prompt") or []
    paraphrases = [paraphrases] if isinstance(paraphrases, str) else paraphrases
    paraphrases = _texts({"rephrase_prompt": paraphrases}, "rephrase_prompt", where)
    return Record(request, paraphrases, pairs["locality"], pairs["portability"])


def _zsre(row: Any, where: str) -> Record | None:
    if not _text(row, "alt", where, empty=True).strip():
        return None
    answers = _texts(row, "answers", where)
    request = _request(
        _text(row, "src", where),
        _text(row, "subject", where),
        _text(row, "alt", where),
        answers[0].strip() if answers else None,
        where,
    )
    near: tuple[tuple[str, str], ...] = ()
    if row.get("loc") and row.get("loc_ans"):
        question = f"{_text(row, 'loc', where).rstrip(' ?')}?"
        near = ((question, _text(row, "loc_ans", where).strip()),)
    return Record(request, _texts({"rephrase": [row.get("rephrase", "")]}, "rephrase", where), near)


def _own(row: Any, where: str) -> Record:
    unknown = sorted(set(row) - _OWN_FIELDS) if isinstance(row, Mapping) else []
    if unknown:
        raise UserError(
            f"{where} has the field {unknown[0]!r}; expected some of "
            f"{', '.join(sorted(_OWN_FIELDS))}; correct its name or leave it out"
        )
    truth = None if not isinstance(row, Mapping) or row.get("truth") is None else row["truth"]
    request = _request(
        _text(row, "prompt", where),
        _text(row, "subject", where),
        _text(row, "target", where),
        truth if truth is None else _text(row, "truth", where).strip(),
        where,
    )
    return Record(
        request,
        _texts(row, "paraphrases", where),
        _pairs(row, "neighbourhood", where),
        _pairs(row, "portability", where),
        _texts(row, "references", where),
        _texts(row, "generation", where),
    )


def _relation(document: Any, file: Path) -> Iterable[Record]:
    if not isinstance(document, Mapping) or not isinstance(document.get("samples"), list):
        raise UserError(f"{file} lacks samples; expected a relation; choose another layout")
    templates = _texts(document, "prompt_templates", str(file))
    others = _texts(document, "prompt_templates_zs", str(file))
    bad = next((t for t in (*templates, *others) if t.count("{}") != 1), None)
    if not templates or bad is not None:
        raise UserError(
            f"{file} has {repr(bad) if bad else 'nothing'} in its prompt_templates; expected texts "
            "with {} where the subject goes; correct it"
        )
    facts = []
    for i, sample in enumerate(document["samples"]):
        where = f"record {i} of {file}"
        facts.append((_text(sample, "subject", where), _text(sample, "object", where).strip()))
    true: dict[str, set[str]] = {}
    shared: dict[str, list[str]] = {}
    for subject, answer in facts:
        true.setdefault(subject, set()).add(answer)
        shared.setdefault(answer, []).append(subject)
    for i, (subject, answer) in enumerate(facts):
        after = facts[i + 1 :] + facts[:i]
        target = next((a for _, a in after if a not in true[subject]), None)
        if target is None:
            raise UserError(
                f"record {i} of {file} finds no other answer in the relation; expected at least "
                "two different objects; add samples"
            )
        same = [(s, answer) for s in shared[answer] if s != subject]
        rest = [(s, a) for s, a in after[: 4 * _NEIGHBOURS] if s != subject and a != answer]
        near = dict.fromkeys([*same, *rest])
        fill = templates[0].replace
        yield Record(
            Request(fill("{}", subject), subject, target, answer),
            tuple(
                dict.fromkeys(
                    t.replace("{}", subject) for t in (*templates[1:], *others) if t != templates[0]
                )
            ),
            tuple((fill("{}", s), a) for s, a in list(near)[:_NEIGHBOURS]),
        )


_READERS: dict[str, Callable[[Any, str], Record | None]] = {
    "counterfact": _counterfact,
    "counterfact_flat": _counterfact_flat,
    "zsre": _zsre,
    "lines": _own,
}
_SIGNS = {
    "counterfact": {"requested_rewrite"},
    "counterfact_flat": {"prompt", "target_new", "ground_truth"},
    "zsre": {"src", "alt"},
    "relation": {"samples", "prompt_templates"},
    "lines": {"prompt", "subject", "target"},
}
