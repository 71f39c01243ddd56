"""The engine: a scheduler's plans run on the device, one step ahead of what the host has seen."""

from collections import deque
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsys.bench.serving.schedule import Ask, Event, Layout, Scheduler, Turn, check
from jaxsys.bench.serving.step import empty_orders, init_state, orders_of, step
from jaxsys.core.errors import UserError

AHEAD = 1  # steps under way while the host looks at the one before


class Figures(NamedTuple):
    """Count what the engine has done and holds.

    >>> Figures._fields[:3]
    ('running', 'waiting', 'steps')
    """

    running: int
    waiting: int
    steps: int
    preempted: int
    read_tokens: int  # of prompts
    shared_tokens: int  # of prompts, found in pages that were there
    given_tokens: int
    pages: int
    pages_held: int
    pages_kept: int  # held by nobody, contents kept


class Engine:
    """Serve many requests at once with one model; single-threaded.

    Args:
      params: the model's.
      config: the `LMConfig`, of any family.
      layout: sizes.
      dtype: of keys and values; that of the parameters by default.

    Raises:
      UserError: a context that the model does not have.

    >>> from jaxsys.models import lm
    >>> config = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> layout = Layout(slots=2, pages=8, page_tokens=4, context=16)
    >>> engine = Engine(lm.init(jax.random.key(0), config), config, layout)
    >>> engine.submit(Ask(7, (1, 2, 3), max_tokens=2))
    >>> engine.figures().waiting, engine.idle
    (1, False)
    """

    def __init__(self, params: Any, config: Any, layout: Layout, dtype: Any = None):
        if layout.context > config.max_positions:
            raise UserError(
                f"a request may have {layout.context} tokens and the model {config.max_positions}; "
                "expected no more than the model's; lower the context"
            )
        self.params, self.config, self.layout = params, config, layout
        self.scheduler = Scheduler(layout)
        self.steps = self.given_tokens = 0
        if dtype is None:
            leaves = jax.tree.leaves(params)
            dtype = next(x.dtype for x in leaves if jax.numpy.issubdtype(x.dtype, np.floating))
        self._state = init_state(config, layout, dtype)
        self._under_way: deque[tuple[Turn, Any]] = deque()

    def warm_up(self) -> None:
        """Compile both shapes of the step, so that no request waits for it."""
        for rows in (0, self.layout.prompt_rows):
            self._state, tokens = self._run(empty_orders(self.layout, rows))
            jax.block_until_ready(tokens)

    def submit(self, ask: Ask) -> None:
        """Let a request wait for its turn.

        Raises:
          UserError: what the engine can never serve.
        """
        self.check(ask)
        self.scheduler.submit(ask)

    def check(self, ask: Ask) -> None:
        """Refuse a request that the engine can never serve.

        Raises:
          UserError: ids outside the vocabulary, or what `schedule.check` refuses.
        """
        check(ask, self.layout)
        low, top = min(ask.prompt), max(ask.prompt)
        if low < 0 or top >= self.config.vocab_size:
            raise UserError(
                f"token id {low if low < 0 else top} is outside the model's vocabulary of 0 to "
                f"{self.config.vocab_size - 1}; use the model's own tokenizer"
            )

    def cancel(self, ident: int) -> bool:
        """End a request now, and free its slot and pages."""
        return self.scheduler.cancel(ident)

    @property
    def idle(self) -> bool:
        """Say whether there is nothing to do."""
        return self.scheduler.idle and not self._under_way

    def step(self) -> list[Event]:
        """Send the next step to the device, and take the tokens of the one before.

        Returns:
          What happened; may be empty.
        """
        turn = self.scheduler.plan()
        if turn is not None:
            self._state, tokens = self._run(orders_of(self.layout, turn))
            self._under_way.append((turn, tokens))
            self.steps += 1
        if not self._under_way or (turn is not None and len(self._under_way) <= AHEAD):
            return []
        taken, tokens = self._under_way.popleft()
        events = self.scheduler.take(taken, np.asarray(tokens).tolist())
        self.given_tokens += sum(event.token is not None for event in events)
        return events

    def run(self) -> list[Event]:
        """Go on until nothing waits or runs.

        Returns:
          All that happened.
        """
        events = []
        while not self.idle:
            events += self.step()
        return events

    def figures(self) -> Figures:
        """Count what has been done and is held."""
        s = self.scheduler
        return Figures(
            running=len(s.running),
            waiting=len(s.waiting),
            steps=self.steps,
            preempted=s.preempted,
            read_tokens=s.read_tokens,
            shared_tokens=s.shared_tokens,
            given_tokens=self.given_tokens,
            pages=s.pages.count,
            pages_held=s.pages.count - s.pages.spare,
            pages_kept=s.pages.kept,
        )

    def _run(self, orders: Any) -> Any:
        return step(self.params, self._state, orders, self.config, self.layout)
