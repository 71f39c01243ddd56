"""A piece of a loss as two compiled programs, forward and backward.

A forward program also returns its pullback. That of `jax.vjp` is a pytree, so it may leave one
program and enter another. A compiled program would copy the parameters and inputs that a pullback
keeps, once for every batch under way; they are therefore taken out of it and put back by reference.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

from jaxsys.core.equations import Equation, describe, evaluate


class Piece(NamedTuple):
    """What a piece of a program evaluates, takes and gives, as numbers of values.

    Attributes:
      equations: in topological order.
      leaves: parameters.
      upstream: differentiable values made before it.
      other: other values: integers, data, constants.
      outputs: what it gives.

    >>> Piece((), (0,), (), (1,), (2,)).leaves
    (0,)
    """

    equations: tuple[Equation, ...]
    leaves: tuple[int, ...]
    upstream: tuple[int, ...]
    other: tuple[int, ...]
    outputs: tuple[int, ...]


class Rule(NamedTuple):
    """How the values of a `Pullback` make that of `jax.vjp`.

    Attributes:
      treedef: its structure.
      order: for each of its leaves, which value.
      given: for the first values, which argument or output of the forward program each is.

    >>> Rule(jax.tree.structure(0), (0,), ()).order
    (0,)
    """

    treedef: Any
    order: tuple[int, ...]
    given: tuple[int, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pullback:
    """What a forward pass keeps for its backward pass; a function of the outputs' cotangents.

    Attributes:
      values: arrays; parameters, inputs and outputs among them are not copies.
      rule: static.

    >>> outs, pullback = jax.vjp(lambda x: 3.0 * x, 1.0)
    >>> leaves, treedef = jax.tree.flatten(pullback)
    >>> kept = Pullback(leaves, Rule(treedef, tuple(range(len(leaves))), ()))
    >>> float(kept(1.0)[0])
    3.0
    """

    values: list[Any]
    rule: Rule = field(metadata={"static": True})

    def __call__(self, cotangents: Any) -> Any:
        """Give the cotangents of leaves and of upstream values."""
        leaves = [self.values[i] for i in self.rule.order]
        return jax.tree.unflatten(self.rule.treedef, leaves)(cotangents)


class Forward:
    """A piece's forward program: ``(leaves, upstream, other) -> (outputs, Pullback)``.

    Args:
      piece: what to run.
      remat: keep nothing but what it is given, and run it again in the backward pass.

    Attributes:
      compiled: the jitted function behind it.

    >>> from jaxsys.core.equations import trace
    >>> import jax.numpy as jnp
    >>> program = trace(lambda w, x: w * x, jnp.ones(2), jnp.ones(2))
    >>> run = Forward(Piece(program.equations, (0,), (1,), (), program.results), remat=False)
    >>> w, x = jnp.full(2, 3.0), jnp.ones(2)
    >>> outs, pullback = run([w], [x], [])
    >>> outs[0].tolist(), any(v is w for v in pullback.values)
    ([3.0, 3.0], True)
    """

    def __init__(self, piece: Piece, *, remat: bool) -> None:
        self.piece, self.remat = piece, remat
        self.compiled = jax.jit(self._run)

    def __call__(
        self, leaves: Sequence[Any], upstream: Sequence[Any], other: Sequence[Any]
    ) -> tuple[list[Any], Pullback]:
        """Run it.

        Args:
          leaves: values of the parameters.
          upstream: values made before it.
          other: other values.

        Returns:
          Its outputs and what its backward pass needs.
        """
        outs, fresh = self.compiled(list(leaves), list(upstream), list(other))
        known = [*leaves, *upstream, *other, *outs]
        given = [known[i] for i in fresh.rule.given]
        return outs, Pullback([*given, *fresh.values], fresh.rule)

    def _run(self, leaves: list[Any], upstream: list[Any], other: list[Any]) -> Any:
        piece = self.piece

        def run(ls: list[Any], us: list[Any]) -> list[Any]:
            env = dict(zip(piece.leaves, ls, strict=True))
            env.update(zip(piece.upstream, us, strict=True))
            env.update(zip(piece.other, other, strict=True))
            evaluate(piece.equations, env)
            return [env[v] for v in piece.outputs]

        outs, pullback = jax.vjp(jax.checkpoint(run) if self.remat else run, leaves, upstream)
        kept, treedef = jax.tree.flatten(pullback)
        known = [*leaves, *upstream, *other, *outs]
        place = {id(v): i for i, v in reversed(list(enumerate(known)))}
        given = tuple(dict.fromkeys(place[id(v)] for v in kept if id(v) in place))
        fresh = {id(v): v for v in kept if id(v) not in place}
        where = {id(known[i]): n for n, i in enumerate(given)}
        where.update({name: len(given) + n for n, name in enumerate(fresh)})
        order = tuple(where[id(v)] for v in kept)
        return outs, Pullback(list(fresh.values()), Rule(treedef, order, given))


def signature(piece: Piece, avals: Sequence[Any]) -> tuple[Any, ...]:
    """Describe a piece up to the numbers of its values, so that equal pieces share programs.

    Args:
      piece: of a traced program.
      avals: the program's.

    Returns:
      Something hashable, equal for equal pieces.

    >>> from jaxsys.core.equations import trace
    >>> import jax.numpy as jnp
    >>> p = trace(lambda w, x: (w * x) * x, jnp.ones(2), jnp.ones(2))
    >>> first = Piece(p.equations[:1], (0,), (1,), (), (2,))
    >>> second = Piece(p.equations[1:], (2,), (1,), (), (3,))
    >>> signature(first, p.avals) == signature(second, p.avals)
    True
    """
    given = (*piece.leaves, *piece.upstream, *piece.other)
    number: dict[int, int] = {}
    for v in (*given, *(v for e in piece.equations for v in e.outputs)):
        number.setdefault(v, len(number))
    shapes = tuple(avals[v].str_short() for v in given)
    kinds = (len(piece.leaves), len(piece.upstream), tuple(number[v] for v in piece.outputs))
    return describe(piece.equations, number), shapes, kinds


def programs(piece: Piece, *, remat: bool) -> tuple[Forward, Callable[[Any, Any], Any]]:
    """Make a piece's two programs; they are compiled when first called.

    Args:
      piece: what to run.
      remat: keep nothing but what it is given.

    Returns:
      Forward, and backward: ``(pullback, cotangents of outputs) -> (leaf gradients, upstream
      cotangents)``.

    >>> from jaxsys.core.equations import trace
    >>> import jax.numpy as jnp
    >>> program = trace(lambda w, x: w * x, jnp.ones(()), jnp.ones(()))
    >>> piece = Piece(program.equations, (0,), (1,), (), program.results)
    >>> forward, backward = programs(piece, remat=True)
    >>> outs, pullback = forward([jnp.float32(2)], [jnp.float32(3)], [])
    >>> [[float(x) for x in part] for part in backward(pullback, [jnp.ones(())])]
    [[3.0], [2.0]]
    """
    return Forward(piece, remat=remat), jax.jit(lambda pullback, cotangents: pullback(cotangents))
