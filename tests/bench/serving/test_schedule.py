"""Pages and plans, without JAX: a device of plain lists runs them and shows what is read."""

import hashlib
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.bench.serving.pages import Pages, page_digests
from jaxsys.bench.serving.schedule import Ask, Layout, Scheduler
from jaxsys.core.errors import UserError

END = 3


def next_token(history):
    """A token that depends on all before it; now and then the end token."""
    return hashlib.blake2b(bytes(history), digest_size=1).digest()[0] % 11


def expected(ask):
    history = list(ask.prompt)
    for _ in range(ask.max_tokens):
        token = next_token(history)
        if token in ask.end_ids:
            break
        history.append(token)
    return history[len(ask.prompt) :]


class Device:
    """Hold a token in each place of each page, as the real one holds its keys and values."""

    def __init__(self, layout):
        self.layout = layout
        self.pages = [[None] * layout.page_tokens for _ in range(layout.pages)]
        self.last = [0] * layout.slots

    def run(self, turn):
        tables, size = dict(turn.tables), self.layout.page_tokens

        def write(slot, position, token):
            self.pages[tables[slot][position // size]][position % size] = token

        ends = {}
        for slot, position in turn.decodes:
            write(slot, position, self.last[slot])
            ends[slot] = position
        for row in turn.rows:
            for i, token in enumerate(row.tokens):
                write(row.slot, row.start + i, token)
            ends[row.slot] = row.start + len(row.tokens) - 1
        for give in turn.gives:
            read = [
                self.pages[tables[give.slot][p // size]][p % size]
                for p in range(ends[give.slot] + 1)
            ]
            assert None not in read
            self.last[give.slot] = next_token(read)
        return list(self.last)


def check_pages(scheduler):
    """Every page is free, kept, or held by as many jobs as say so."""
    pages, held = scheduler.pages, {}
    for job in scheduler.running:
        assert len(set(job.pages)) == len(job.pages)
        for page in job.pages:
            held[page] = held.get(page, 0) + 1
    assert all(pages.holders(page) == held.get(page, 0) for page in range(pages.count))
    assert pages.spare + len(held) == pages.count
    shared = [page for page, count in held.items() if count > 1]
    unwritten = {
        page for job in scheduler.running for page in job.pages[len(job.names) :]
    }  # pages that steps still write to
    assert not unwritten & set(shared)
    assert all(not job.pages for job in scheduler.waiting)
    # Those that only wait for their last token may be younger than one that went back.
    making = [job for job in scheduler.running if job.given < job.ask.max_tokens]
    arrivals = [job.arrival for job in (*making, *scheduler.waiting)]
    assert arrivals == sorted(arrivals)


def draw_case(random):
    layout = Layout(
        slots=random.randint(1, 4),
        pages=random.randint(2, 12),
        page_tokens=random.randint(1, 4),
        context=random.randint(4, 24),
        prompt_rows=random.randint(1, 3),
        row_tokens=random.randint(1, 5),
        reuse=random.random() < 0.5,
    )
    asks = []
    for i in range(random.randint(1, 12)):
        length = random.randint(1, layout.longest - 1)
        prompt = tuple(random.randint(4, 5) for _ in range(length))
        ends = frozenset({END} if random.random() < 0.5 else ())
        asks.append(Ask(i, prompt, random.randint(1, layout.longest - length), ends))
    return layout, asks, random.randint(0, 2)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_every_request_gets_its_own_tokens_and_every_page_comes_back(seed):
    random = Random(seed)
    layout, asks, ahead = draw_case(random)
    scheduler, device = Scheduler(layout), Device(layout)
    left, under_way, out, ended, steps = list(asks), [], {a.ident: [] for a in asks}, {}, 0
    cancelled = set()
    while left or not scheduler.idle or under_way:
        for _ in range(random.randrange(3)):
            if left:
                scheduler.submit(left.pop(0))
        if random.random() < 0.03:
            ident = random.randrange(len(asks))
            if scheduler.cancel(ident):
                cancelled.add(ident)
        turn = scheduler.plan()
        if turn is not None:
            assert len({give.slot for give in turn.gives}) == len(turn.gives)
            assert len(turn.rows) <= layout.prompt_rows
            # The device runs steps in order, whatever the host does in between.
            under_way.append((turn, device.run(turn)))
        check_pages(scheduler)
        if under_way and (turn is None or len(under_way) > ahead):
            for event in scheduler.take(*under_way.pop(0)):
                if event.token is not None:
                    out[event.ident].append(event.token)
                if event.ended:
                    ended[event.ident] = event.ended
            check_pages(scheduler)
        steps += 1
        assert steps < 3000, "no progress"
    for ask in asks:
        want = expected(ask)
        if ask.ident in cancelled:
            assert out[ask.ident] == want[: len(out[ask.ident])]
        else:
            assert out[ask.ident] == want
            assert ended[ask.ident] == ("length" if len(want) == ask.max_tokens else "end")
    assert scheduler.pages.spare == layout.pages


def test_a_prefix_is_read_once():
    layout = Layout(slots=2, pages=8, page_tokens=4, context=16, row_tokens=16)
    scheduler, device = Scheduler(layout), Device(layout)
    for ident, tail in ((0, 6), (1, 7)):
        scheduler.submit(Ask(ident, (*range(4, 12), tail), max_tokens=1))
        while (turn := scheduler.plan()) is not None:
            scheduler.take(turn, device.run(turn))
    assert (scheduler.read_tokens, scheduler.shared_tokens) == (9 + 1, 8)


def test_the_oldest_goes_on_when_pages_run_out():
    layout = Layout(slots=3, pages=4, page_tokens=2, context=8, reuse=False)
    scheduler, device = Scheduler(layout), Device(layout)
    for ident in range(3):
        scheduler.submit(Ask(ident, (4, 5), max_tokens=5))
    order = []
    while not scheduler.idle:
        turn = scheduler.plan()
        order += [e.ident for e in scheduler.take(turn, device.run(turn)) if e.ended]
    assert order == [0, 1, 2]
    assert scheduler.preempted > 0


def test_kept_pages_are_given_up_end_first_and_oldest_first():
    pages = Pages(4)
    first, second = pages.take(2), pages.take(2)
    for i, page in enumerate((*first, *second)):
        pages.name(page, bytes([i]))
    pages.leave(first)
    pages.leave(second)
    assert pages.take(1) == [first[1]]  # the end of the text that was left first
    assert pages.find([b"\0", b"\1"]) == [first[0]]
    assert pages.find([b"\2", b"\3"]) == second


def test_names_tell_where_a_page_stands():
    same = page_digests([1, 2, 1, 2], 2, 2)
    assert same[0] != same[1]
    assert page_digests([1, 2, 1, 3], 2, 2)[0] == same[0]


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (Ask(0, (), 1), "0 tokens"),
        (Ask(0, (1,), 0), "0 are asked for"),
        (Ask(0, (1,) * 10, 7), "16 together at most"),
        (Ask(0, (1,), 10**12), "16 together at most"),
    ],
)
def test_what_can_never_be_served_is_refused(ask, told):
    scheduler = Scheduler(Layout(slots=1, pages=8, page_tokens=4, context=16))
    with pytest.raises(UserError, match=told):
        scheduler.submit(ask)
    assert scheduler.idle


def test_few_pages_bound_a_request_too():
    assert Layout(slots=1, pages=2, page_tokens=4, context=16).longest == 9
    with pytest.raises(UserError, match="slots is 0"):
        Layout(slots=0, pages=2)
