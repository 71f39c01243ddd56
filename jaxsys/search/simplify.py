"""Opposing operation simplification: rewrite programs into shorter ones, on arrays, in jit.

Axes: ``L`` length of a program.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxsys.core.errors import UserError
from jaxsys.search.programs import Grammar

# Outer, inner -> what stands for both; None is the operand itself.
_SOUND: dict[tuple[str, str], str | None] = {
    ("neg", "neg"): None,
    ("abs", "neg"): "abs",
    ("abs", "abs"): "abs",
    ("abs", "sqr"): "sqr",
    ("abs", "sqrt"): "sqrt",
    ("abs", "exp"): "exp",
    ("abs", "mms"): "mms",
    ("sqr", "neg"): "sqr",
    ("sqr", "abs"): "sqr",
    ("sqr", "sqrt"): "abs",
    ("sqrt", "sqr"): "abs",
    ("sqrt", "neg"): "sqrt",
    ("sqrt", "abs"): "sqrt",
    ("log", "neg"): "log",
    ("log", "abs"): "log",
    ("mms", "mms"): "mms",
}
_PAPER: dict[tuple[str, str], str | None] = {
    ("exp", "log"): None,
    ("log", "exp"): None,
    ("sqr", "sqrt"): None,
    ("pow", "sqrt"): None,
    ("sqrt", "sqr"): None,
    ("sqrt", "pow"): None,
    ("neg", "neg"): None,
    ("abs", "abs"): "abs",
}
_OPPOSITE = (("sub", "add"), ("add", "sub"), ("mul", "div"), ("div", "mul"))  # outer, inner


class _Rewrite(NamedTuple):
    """For each place e: whether the subtree ending there becomes `source` and then `suffix`."""

    applies: Any
    first: Any
    last: Any
    suffix: Any


def simplify(
    grammar: Grammar, program: Int[Array | np.ndarray, "L"], rules: str
) -> Int[Array, "L"]:
    """Rewrite one program until no rule applies.

    ``sound`` keeps the value (in exact arithmetic, and what it is a terminal's shape of): nested
    neg, abs, sqr, sqrt, log, mms; skp; pow, which is sqr; x·x, which is sqr x; and (a + b) − b,
    (a − b) + b with the same b on whichever side. ``exp`` and ``log`` do not cancel, since log adds
    0.001 and exp cuts at 100, nor do ``mul`` and ``div``, since div divides by a norm.

    ``paper`` cancels every nested pair of opposing operations: exp/log, sqr/sqrt, neg/neg and, by
    the left operand alone, add/sub and mul/div, so that (a + b) − c becomes a. It changes values.
    Reconstruction: Pruner-Zero names exp/log and sqrt/sqr as examples and releases no list; the
    rest is that of a third-party rebuild.

    Args:
      grammar: the symbols; rules about operators that it lacks are left out.
      program: postfix opcodes.
      rules: which.

    Returns:
      A program of at most the same length.

    Raises:
      UserError: for unknown rules.

    Reference: arXiv 2406.02924, Opposing Operation Simplification.

    >>> from jaxsys.search.programs import from_string, to_string
    >>> g = Grammar(("W", "G"))
    >>> program = jnp.asarray(from_string(g, "skp(neg(neg(W*W)))"))
    >>> to_string(g, simplify(g, program, "sound"))
    'sqr(W)'
    """
    if rules not in ("paper", "sound"):
        raise UserError(f"oos is {rules!r}; expected paper, sound or None; choose one")
    pairs, singles = _tables(grammar, rules)
    length = program.shape[0]

    def found(p: Any) -> _Rewrite:
        """Stack what each rule would do at each place: [rules, L]."""
        spans = _Spans(grammar, p)
        rewrites = [_chains(p, spans, pairs, singles), *_binaries(grammar, p, spans, rules)]
        return _Rewrite(*(jnp.stack(field) for field in zip(*rewrites, strict=True)))

    def once(carry: Any) -> Any:
        p, _, done = carry
        spans, all_ = _Spans(grammar, p), found(p)
        at = jnp.argmax(all_.applies.reshape(-1))
        _, first, last, suffix = (field.reshape(-1)[at] for field in all_)
        end = at % length
        rewritten = _replace(p, spans.start(end), end, first, last, suffix)
        changed = jnp.any(all_.applies)
        return jnp.where(changed, rewritten, p), changed, done + 1

    # A rewriting shortens the program or replaces a pow: so many are enough.
    def more(carry: Any) -> Any:
        return carry[1] & (carry[2] < 2 * length)

    begin = (jnp.asarray(program), jnp.ones((), bool), jnp.zeros((), int))
    return jax.lax.while_loop(more, once, begin)[0]


def _tables(grammar: Grammar, rules: str) -> tuple[Any, Any]:
    """Write rules about unary operators as tables: -1 no rule, 0 the operand, else an opcode."""
    n, known = len(grammar.symbols), set(grammar.symbols)
    pairs, singles = np.full((n, n), -1, np.int32), np.full(n, -1, np.int32)
    for (outer, inner), result in (_SOUND if rules == "sound" else _PAPER).items():
        if {outer, inner, result or outer} <= known:
            code = grammar.opcode(result) if result else 0
            pairs[grammar.opcode(outer), grammar.opcode(inner)] = code
    if rules == "sound" and "skp" in known:
        singles[grammar.opcode("skp")] = 0
    if rules == "sound" and {"pow", "sqr"} <= known:
        singles[grammar.opcode("pow")] = grammar.opcode("sqr")
    return jnp.asarray(pairs), jnp.asarray(singles)


class _Spans:
    """Where subtrees begin, and whether two are equal, for arrays of places."""

    def __init__(self, grammar: Grammar, p: Any) -> None:
        self.p, self.places = p, jnp.arange(p.shape[0])
        deltas = np.where(grammar.arities < 0, 0, 1 - grammar.arities)
        heights = jnp.cumsum(jnp.asarray(deltas)[p])
        before = self.places[None] < self.places[:, None]
        lower = before & (heights[None] < heights[:, None])
        self.starts = jnp.max(jnp.where(lower, self.places[None], -1), axis=1) + 1
        is_terminal = p[:, None] == 1 + jnp.arange(len(grammar.terminals))[None]
        self.counts = jnp.cumsum(jnp.pad(is_terminal, ((1, 0), (0, 0))), axis=0)

    def start(self, end: Any) -> Any:
        return self.starts[jnp.clip(end, 0)]

    def equal(self, a: tuple[Any, Any], b: tuple[Any, Any]) -> Any:
        inside = self.places[None] <= (a[1] - a[0])[:, None]
        x, y = (self._take(s[0][:, None] + self.places[None]) for s in (a, b))
        return (a[1] - a[0] == b[1] - b[0]) & jnp.all(jnp.where(inside, x == y, True), axis=1)

    def covers(self, a: tuple[Any, Any], b: tuple[Any, Any]) -> Any:
        """Tell whether every terminal of b is in a, so that a's shape is that of both together."""
        x, y = (self.counts[jnp.clip(s[1] + 1, 0)] - self.counts[jnp.clip(s[0], 0)] for s in (a, b))
        return jnp.all((y == 0) | (x > 0), axis=1)

    def _take(self, at: Any) -> Any:
        return self.p[jnp.clip(at, 0, self.p.shape[0] - 1)]


def _chains(p: Any, spans: _Spans, pairs: Any, singles: Any) -> _Rewrite:
    """Apply the tables to unary operators and the one inside them."""
    inner = jnp.where(spans.places > 0, jnp.roll(p, 1), 0)
    pair, single = pairs[p, inner], singles[p]
    by_pair = pair >= 0
    last = spans.places - 1 - by_pair
    return _Rewrite(
        (by_pair | (single >= 0)) & (last >= 0),
        spans.starts,
        last,
        jnp.where(by_pair, pair, single),
    )


def _binaries(grammar: Grammar, p: Any, spans: _Spans, rules: str) -> list[_Rewrite]:
    """Apply the rules about binary operators."""
    known, e = set(grammar.symbols), spans.places
    right = (spans.start(e - 1), e - 1)
    left = (spans.start(right[0] - 1), right[0] - 1)
    nothing = jnp.zeros_like(p)

    def inside(span: Any) -> tuple[Any, Any]:
        """Give the operands of the binary operator that ends a span."""
        second = (spans.start(span[1] - 1), span[1] - 1)
        return (spans.start(second[0] - 1), second[0] - 1), second

    def ends(span: Any, name: str) -> Any:
        return (span[1] >= 0) & (p[jnp.clip(span[1], 0)] == grammar.opcode(name))

    found = []
    for name, suffix in (("mul", "sqr"), ("max", ""), ("min", "")):
        if {name, suffix} <= known and (suffix or rules == "sound"):
            applies = (p == grammar.opcode(name)) & spans.equal(left, right)
            code = grammar.opcode(suffix) if suffix else 0
            found.append(_Rewrite(applies, left[0], left[1], jnp.full_like(p, code)))
    for outer, inner in _OPPOSITE[: 2 if rules == "sound" else 4]:
        if not {outer, inner} <= known:
            continue
        here = p == grammar.opcode(outer)
        a, b = inside(left)
        if rules == "paper":
            found.append(_Rewrite(here & ends(left, inner), a[0], a[1], nothing))
            continue
        # (a ∘ b) • b, where + also has the two sides swapped.
        cases = [(ends(left, inner), a, b, right)]
        cases += [(ends(left, inner), b, a, right)] if inner == "add" else []
        cases += [(ends(right, inner), *inside(right), left)] if outer == "add" else []
        for stands, kept, dropped, other in cases:
            applies = here & stands & spans.equal(dropped, other) & spans.covers(kept, dropped)
            found.append(_Rewrite(applies, kept[0], kept[1], nothing))
    return found


def _replace(p: Any, start: Any, end: Any, first: Any, last: Any, suffix: Any) -> Any:
    """Put p[first..last] and the suffix, if it is not 0, in the place of p[start..end]."""
    places, length = jnp.arange(p.shape[0]), p.shape[0]
    kept = last - first + 1
    size = kept + (suffix > 0)
    behind = places - start - size + end + 1
    source = jnp.where(places < start, places, jnp.where(places < start + kept, 0, behind))
    moved = (places >= start) & (places < start + kept)
    source = jnp.where(moved, first + places - start, source)
    taken = jnp.where(source < length, p[jnp.clip(source, 0, length - 1)], 0)
    return jnp.where((places == start + kept) & (suffix > 0), suffix, taken)
