"""What an edit is: requests in, changed parameters, explicit state and low-rank factors out."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxsys.core.errors import UserError


class Request(NamedTuple):
    """Ask that a prompt about a subject be answered with a target.

    Attributes:
      prompt: the whole text before the answer, with the subject in it.
      subject: what the fact is about.
      target: the new answer, without the space that stands before it.
      truth: the old answer, where it is known.

    >>> Request("The mother tongue of Danielle Darrieux is", "Danielle Darrieux", "English").truth
    """

    prompt: str
    subject: str
    target: str
    truth: str | None = None


class Record(NamedTuple):
    """Hold a request and the probes of what the edit should and should not have changed.

    Attributes:
      request: the edit.
      paraphrases: prompts that should have the new answer too.
      neighbourhood: (prompt, right answer) of other subjects, which should stay.
      portability: (prompt, answer) that follow from the edit.
      references: texts about subjects that share the new answer, for consistency.
      generation: prompts to write on from, for fluency.

    >>> Record(Request("Rome is in", "Rome", "France"), ("One finds Rome in",)).neighbourhood
    ()
    """

    request: Request
    paraphrases: tuple[str, ...] = ()
    neighbourhood: tuple[tuple[str, str], ...] = ()
    portability: tuple[tuple[str, str], ...] = ()
    references: tuple[str, ...] = ()
    generation: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Editable:
    """Hold what methods need to know of a model beside its parameters.

    Attributes:
      config: an `LMConfig`.
      tokenizer: with ``encode`` and ``decode``.

    >>> Editable(None, None).tokenizer
    """

    config: Any
    tokenizer: Any


class Info(NamedTuple):
    """Say what an edit did; diagnostics that never feed back.

    Attributes:
      factors: path of a matrix to (A [out, r], B [in, r]), float32: ΔW = A Bᵀ in the orientation of
        the mathematics, y = W x, whatever the checkpoint's. Empty for what has no such form.
      notes: numbers by name, such as ``loss`` [N], ``steps`` [N], ``target_norm`` [N].

    >>> Info({}, {"steps": 20}).notes["steps"]
    20
    """

    factors: dict[str, tuple[Any, Any]]
    notes: dict[str, Any]


class Edited(NamedTuple):
    """Hold what every method returns.

    Attributes:
      params: the edited parameters; leaves that were not edited are the same objects.
      state: what the next edit of a sequence, or the answering of the edited model, needs: a
        pytree, or None where nothing is kept.
      info: see `Info`.

    >>> Edited({}, None, Info({}, {})).state
    """

    params: Any
    state: Any
    info: Info


class Answering(NamedTuple):
    """Say how an edited model answers, where that is more than its parameters.

    Attributes:
      model: a `jaxsys.evaluate.protocol.Model`, with codebooks and the like in its ``params``.
      rewrite: prompt to the prompt that the model sees instead (a memory or demonstrations put
        before it), or None where it sees the prompt itself.

    >>> Answering(model=None).rewrite
    """

    model: Any
    rewrite: Callable[[str], str] | None = None


class Method(NamedTuple):
    """Hold an editing method and what it asks for.

    Attributes:
      edit: ``edit(model, config, params, requests, stats=None, state=None) -> Edited``; pure. The
        requests are one batch; ``state`` is that of the `Edited` before in a sequence, None to
        begin.
      config: frozen dataclass of the options, all with defaults.
      statistics: ``statistics(config) -> bool``: whether it needs the second moments of
        `jaxsys.edit.stats`.
      single: it takes one request at a time; `turns.edit_all` goes through a batch one by one.
      trained: it needs an editor trained beforehand, named in its config.
      answering: ``answering(model, config, params, state) -> Answering`` for methods whose edits
        are not (only) in the parameters; None: `evaluate.from_lm` of the edited parameters.
      settle: ``settle(model, config, params) -> config`` fills what is None by the model's size and
        samples prefixes; call it once with the unedited parameters before a sequence of edits.
      targets: ``targets(model, config, params, requests)``: what ``edit`` takes as ``found``, for
        many requests at a time, each to be edited from the same parameters (`turns.edit_each`).

    >>> Method(edit=None, config=dict).single
    False
    """

    edit: Callable[..., Edited] | None
    config: type
    statistics: Callable[[Any], bool] = lambda _: False
    single: bool = False
    trained: bool = False
    answering: Callable[..., Answering] | None = None
    settle: Callable[..., Any] | None = None
    targets: Callable[..., Any] | None = None


def find_method(methods: Mapping[str, Method], name: str) -> Method:
    """Look a method up by name.

    Raises:
      UserError: if there is none of that name.

    >>> find_method({}, "roam")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: 'roam' is no editing method; expected one of ...
    """
    if name not in methods:
        known = ", ".join(sorted(methods))
        raise UserError(f"{name!r} is no editing method; expected one of {known}; correct the name")
    return methods[name]


def check_requests(requests: Sequence[Request]) -> None:
    """Refuse requests that cannot be edited, all before work starts.

    Raises:
      UserError: for no request, an empty target or subject, a subject that its prompt does not
        name, or one prompt twice in a batch, with one target or with two.

    >>> check_requests([Request("Paris is in", "Rome", "Italy")])
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: request 0: the prompt 'Paris is in' does not name ...
    """
    if not requests:
        raise UserError("there is no request; expected at least one; give a prompt and a target")
    seen: dict[str, int] = {}
    for i, request in enumerate(requests):
        if not request.target.strip():
            raise UserError(
                f"request {i} ({request.prompt[:60]!r}) has an empty target; expected the new "
                "answer; give one or leave the request out"
            )
        subject_span(request, i)
        first = seen.setdefault(request.prompt.strip(), i)
        if first != i and requests[first].target.strip() == request.target.strip():
            raise UserError(
                f"requests {first} and {i} are the same ({request.prompt[:60]!r}); expected each "
                "fact once in a batch; leave one out"
            )
        if first != i:
            raise UserError(
                f"requests {first} and {i} contradict each other: {request.prompt[:60]!r} is to be "
                f"{requests[first].target!r} and {request.target!r}; leave one out, or edit one "
                "after the other"
            )


def subject_span(request: Request, i: int = 0) -> tuple[int, int]:
    """Find the subject's first occurrence in the prompt, whole words before parts of words.

    Args:
      request: the edit.
      i: its number, for the error.

    Returns:
      Indices of its first character and of the one after its last.

    Raises:
      UserError: if the prompt does not name it.

    >>> subject_span(Request("Brian and Ian met in", "Ian", "Oslo"))
    (10, 13)
    """
    subject = request.subject.strip()
    found = re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", request.prompt)
    start = found.start() if found else request.prompt.find(subject)
    if not subject or start < 0:
        raise UserError(
            f"request {i}: the prompt {request.prompt[:80]!r} does not name the subject "
            f"{request.subject[:60]!r}; expected it word for word; correct one of the two"
        )
    return start, start + len(subject)
