"""What runs in the next step: admitting, reading prompts in pieces, decoding, preempting. No JAX.

Requests are served in the order in which they came. All that run are older than all that wait: when
pages run out, the youngest that runs goes back to wait, and is read again later, its own tokens
with its prompt. The oldest can always go on, as no request is let in that needs more pages than
there are; so every request ends.

A step's tokens are known only after the next step was planned, so that the device never waits for
Python. A request that ends by its end token is thus one step too long; nothing of that step counts.

Reference: continuous batching: Orca (OSDI 2022); prompts in pieces beside decoding: Sarathi-Serve
(arXiv 2403.02310, section 4); preempting by recomputing: PagedAttention (arXiv 2309.06180, section
4.5).
"""

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from jaxsys.bench.serving.pages import Pages, page_digest, page_digests
from jaxsys.core.errors import UserError

Ended = Literal["end", "length", "cancelled"]


@dataclass(frozen=True)
class Layout:
    """Say how large the engine's parts are.

    Attributes:
      slots: requests that run at once.
      pages: of the cache, shared by all.
      page_tokens: tokens of a page.
      context: most tokens of a request, prompt and answer together.
      prompt_rows: pieces of prompts that a step reads at most.
      row_tokens: tokens of a piece.
      reuse: pages of equal beginnings are shared.

    >>> Layout(slots=2, pages=8, page_tokens=4, context=16).table
    4
    """

    slots: int
    pages: int
    page_tokens: int = 16
    context: int = 1024
    prompt_rows: int = 4
    row_tokens: int = 16
    reuse: bool = True

    def __post_init__(self):
        for name in ("slots", "pages", "page_tokens", "context", "prompt_rows", "row_tokens"):
            value = getattr(self, name)
            if not 1 <= value < 2**31:
                raise UserError(f"{name} is {value}; it must be at least 1; raise it")

    @property
    def table(self) -> int:
        """Give the pages of the longest request."""
        return -(-self.context // self.page_tokens)

    @property
    def longest(self) -> int:
        """Give the most tokens of a request, prompt and answer together, that can be served."""
        # The last token of an answer is never read, so it needs no room.
        return min(self.context, self.pages * self.page_tokens + 1)


@dataclass(frozen=True)
class Ask:
    """Hold one request, in tokens.

    Attributes:
      ident: the caller's number for it.
      prompt: ids, one at least.
      max_tokens: new tokens at most.
      end_ids: tokens that end it.
      temperature: 0 takes the most likely token.
      top_p: keeps the fewest most likely tokens that together reach it.
      seed: of its draws.

    >>> Ask(7, (1, 2), max_tokens=3).temperature
    0.0
    """

    ident: int
    prompt: tuple[int, ...]
    max_tokens: int
    end_ids: frozenset[int] = frozenset()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(eq=False)
class Job:
    """Follow a request through its steps.

    >>> Job(Ask(7, (1, 2), max_tokens=3), 0).known
    [1, 2]
    """

    ask: Ask
    arrival: int
    known: list[int] = field(init=False)  # prompt and the tokens that were taken
    given: int = 0  # new tokens that planned steps give
    slot: int = -1  # -1: waits
    target: int = 0  # positions to read before it decodes
    written: int = 0  # positions that planned steps write
    pages: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)  # of its full pages that are written
    shared: int = 0  # tokens of the prompt that were not read again, at first
    ended: Ended | None = None

    def __post_init__(self):
        self.known = list(self.ask.prompt)

    @property
    def decodes(self) -> bool:
        """Say whether the prompt is read and tokens are missing."""
        return self.written >= self.target and self.given < self.ask.max_tokens


class Row(NamedTuple):
    """Hold a piece of a prompt that a step reads.

    >>> Row(0, 16, [5, 6]).start
    16
    """

    slot: int
    start: int
    tokens: list[int]


class Give(NamedTuple):
    """Say that a step gives a job a token.

    >>> Give(0, Job(Ask(7, (1, 2), max_tokens=3), 0), -1, 0).count
    0
    """

    slot: int
    job: Job
    row: int  # the row that ends its prompt; -1: it decodes
    count: int  # tokens given before


@dataclass(frozen=True)
class Turn:
    """Hold what one step does; a slot gives one token at most.

    >>> Turn((), (), (), ()).rows
    ()
    """

    decodes: tuple[tuple[int, int], ...]  # slot, position of the token that is read
    rows: tuple[Row, ...]
    gives: tuple[Give, ...]
    tables: tuple[tuple[int, tuple[int, ...]], ...]  # slot, its pages


class Event(NamedTuple):
    """Say what happened to a request.

    >>> Event(7, None, "cancelled").ended
    'cancelled'
    """

    ident: int
    token: int | None
    ended: Ended | None


class Scheduler:
    """Plan steps and take their tokens.

    Args:
      layout: sizes of the engine.

    >>> scheduler = Scheduler(Layout(slots=2, pages=8, page_tokens=4, context=16))
    >>> scheduler.submit(Ask(7, (1, 2, 3), max_tokens=1))
    >>> turn = scheduler.plan()
    >>> turn.rows
    (Row(slot=0, start=0, tokens=[1, 2, 3]),)
    >>> scheduler.take(turn, {0: 9})
    [Event(ident=7, token=9, ended='length')]
    """

    def __init__(self, layout: Layout):
        self.layout = layout
        self.pages = Pages(layout.pages)
        self.waiting: list[Job] = []  # by arrival
        self.running: list[Job] = []  # by arrival
        self._free_slots = list(range(layout.slots - 1, -1, -1))
        self._jobs: dict[int, Job] = {}
        self._arrivals = 0
        self.preempted = 0
        self.shared_tokens = 0
        self.read_tokens = 0

    @property
    def idle(self) -> bool:
        """Say whether nothing waits and nothing runs."""
        return not self._jobs

    def submit(self, ask: Ask) -> None:
        """Let a request wait for its turn.

        Raises:
          UserError: an empty prompt, no token asked for, a number in use, or more tokens than the
            engine holds.
        """
        check(ask, self.layout)
        if ask.ident in self._jobs:
            raise UserError(f"request {ask.ident} is there already; give each its own number")
        job = Job(ask, self._arrivals)
        self._arrivals += 1
        self._jobs[ask.ident] = job
        self.waiting.append(job)

    def cancel(self, ident: int) -> bool:
        """End a request now; its slot and pages are free for the next step.

        Returns:
          Whether it was there.
        """
        job = self._jobs.get(ident)
        if job is None:
            return False
        self._end(job, "cancelled")
        return True

    def plan(self) -> Turn | None:
        """Plan the next step; None if there is nothing to do before earlier steps are taken."""
        self._admit()
        decodes, gives = [], []
        for job in tuple(self.running):
            if job.slot >= 0 and job.decodes and self._make_room(job):
                decodes.append((job.slot, job.written))
                gives.append(Give(job.slot, job, -1, job.given))
                job.written += 1
                job.given += 1
        rows = self._rows(gives)
        if not decodes and not rows:
            return None
        active = {slot for slot, _ in decodes} | {row.slot for row in rows}
        tables = tuple((j.slot, tuple(j.pages)) for j in self.running if j.slot in active)
        return Turn(tuple(decodes), tuple(rows), tuple(gives), tables)

    def take(self, turn: Turn, tokens: dict[int, int] | Sequence[int]) -> list[Event]:
        """Take a step's tokens.

        Args:
          turn: what `plan` gave; turns are taken in their order.
          tokens: of each slot.

        Returns:
          What happened to the requests that were given one and have not ended since.
        """
        events = []
        for give in turn.gives:
            job = give.job
            if job.ended:
                continue
            token = int(tokens[give.slot])
            if token in job.ask.end_ids:
                self._end(job, "end")
                events.append(Event(job.ask.ident, None, "end"))
                continue
            job.known.append(token)
            self._name_pages(job)
            made = len(job.known) - len(job.ask.prompt)
            if made >= job.ask.max_tokens:
                self._end(job, "length")
            events.append(Event(job.ask.ident, token, job.ended))
        return events

    def _admit(self) -> None:
        size = self.layout.page_tokens
        while self.waiting and self._free_slots:
            job = self.waiting[0]
            count = len(job.known)
            if count < len(job.ask.prompt) + job.given:
                break  # a token of it is still to be taken
            # One token at least is read: its logits are needed.
            names = page_digests(job.known, size, (count - 1) // size) if self.layout.reuse else []
            found = self.pages.find(names)
            need = -(-count // size) - len(found)
            # Those that run will soon ask for a page each.
            if need + self.pages.unheld(found) + len(self.running) > self.pages.spare:
                break
            del self.waiting[0]
            self.pages.hold(found)
            job.pages = found + self.pages.take(need)
            job.names = names[: len(found)]
            job.slot, job.target, job.written = self._free_slots.pop(), count, len(found) * size
            if not job.given:
                job.shared = job.written
                self.shared_tokens += job.written
            insort(self.running, job, key=lambda j: j.arrival)

    def _make_room(self, job: Job) -> bool:
        """Have a page for the next position; if need be, take those of the youngest."""
        if job.written < len(job.pages) * self.layout.page_tokens:
            return True
        while not self.pages.spare:
            # Those that only wait for their last token leave by themselves.
            youngest = next(
                j for j in reversed(self.running) if j is job or j.given < j.ask.max_tokens
            )
            if youngest is job:
                return False  # it keeps its pages, and goes on when others have ended
            self._preempt(youngest)
        job.pages += self.pages.take(1)
        return True

    def _preempt(self, job: Job) -> None:
        self._stop(job)
        insort(self.waiting, job, key=lambda j: j.arrival)
        self.preempted += 1

    def _rows(self, gives: list[Give]) -> list[Row]:
        rows: list[Row] = []
        for job in self.running:
            while job.written < job.target and len(rows) < self.layout.prompt_rows:
                end = min(job.written + self.layout.row_tokens, job.target)
                rows.append(Row(job.slot, job.written, job.known[job.written : end]))
                self.read_tokens += end - job.written
                job.written = end
                if end == job.target:
                    gives.append(Give(job.slot, job, len(rows) - 1, job.given))
                    job.given += 1
            self._name_pages(job)
        return rows

    def _name_pages(self, job: Job) -> None:
        """Name pages that are full of known tokens, and written by steps planned so far."""
        if not self.layout.reuse or job.slot < 0:
            return
        size = self.layout.page_tokens
        for i in range(len(job.names), min(job.written, len(job.known)) // size):
            before = job.names[-1] if job.names else b""
            job.names.append(page_digest(before, job.known[i * size : (i + 1) * size]))
            self.pages.name(job.pages[i], job.names[-1])

    def _stop(self, job: Job) -> None:
        self.running.remove(job)
        self._free_slots.append(job.slot)
        self.pages.leave(job.pages)
        job.slot, job.pages, job.names = -1, [], []

    def _end(self, job: Job, why: Ended) -> None:
        if job.slot >= 0:
            self._stop(job)
        else:
            self.waiting.remove(job)
        job.ended = why
        del self._jobs[job.ask.ident]


def check(ask: Ask, layout: Layout) -> None:
    """Refuse a request that the engine can never serve.

    Raises:
      UserError: an empty prompt, no token asked for, or more tokens than the engine holds.

    >>> check(Ask(0, (1,), max_tokens=16), Layout(slots=1, pages=8, page_tokens=4, context=16))
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: the prompt has 1 tokens and 16 are asked for; ...
    """
    if not ask.prompt or ask.max_tokens < 1:
        raise UserError(
            f"the prompt has {len(ask.prompt)} tokens and {ask.max_tokens} are asked for; expected "
            "one at least of each; give more"
        )
    if len(ask.prompt) + ask.max_tokens > layout.longest:
        raise UserError(
            f"the prompt has {len(ask.prompt)} tokens and {ask.max_tokens} are asked for; expected "
            f"{layout.longest} together at most; shorten the prompt or ask for fewer"
        )
