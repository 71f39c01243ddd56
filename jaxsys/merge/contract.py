"""What a merge method is: a pure function of one leaf, and what a driver must know about it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxsys.core.errors import UserError


class Blocks(NamedTuple):
    """Say how a driver computes a leaf in pieces that stay in the cache.

    The leaf function is these two in a row over the whole leaf; a driver may instead gather the
    numbers once and run ``block`` over slices of the flattened leaf (or of its rows).

    Attributes:
      numbers: ``numbers(config, view, weights, key) -> dict``: the few numbers that depend on the
        whole leaf (thresholds, coefficients, counts), from a `jaxsys.merge.views.View`.
      block: ``block(flags, numbers, base, stack, place) -> slice``, elementwise but for ``unit``;
        ``place`` is the index of the slice's first element as two uint32 (high, low), for draws.
      flags: ``flags(config) -> tuple``: what changes the program instead of its numbers.
      unit: ``unit(config) -> str``: ``"elements"``; ``"rows"`` where a slice must hold whole rows
        (vectors along the last axis); ``"whole"`` where the leaf must stay in one piece.
      prepare: ``prepare(numbers, base, stack) -> numbers``: what NumPy computes better than XLA for
        each slice on a host, such as ranks; without it the block does so itself.

    >>> Blocks(numbers=None, block=None).unit(None)
    'elements'
    """

    numbers: Any
    block: Any
    flags: Callable[[Any], tuple] = lambda _: ()
    unit: Callable[[Any], str] = lambda _: "elements"
    prepare: Callable[..., Any] | None = None


class Method(NamedTuple):
    """Hold a merge method: its leaf function, its options and what it asks of its inputs.

    Attributes:
      leaf: ``leaf(config, base, stack, weights, key) -> array``, float32 in and out: base ``[...]``
        or None, stack ``[N, ...]``, weights ``[N]``, key already folded with the leaf's path, or
        None where the caller has none.
      config: frozen dataclass of the options, all with defaults.
      base: ``"needed"``, ``"optional"`` or ``"unused"``.
      models: least and most number of models beside the base; None for no bound.
      pass_: ``pass_(config, leaves) -> config``: a first pass over all leaves that puts global
        numbers into the options, or None; ``leaves()`` iterates (path, base, [arrays]).
      blocks: how to work in pieces, or None if the leaf is worked on whole.

    >>> Method(leaf=None, config=dict, base="unused", models=(1, None)).pass_ is None
    True
    """

    leaf: Callable[..., Any] | None
    config: type
    base: str
    models: tuple[int, int | None]
    pass_: Callable[..., Any] | None = None
    blocks: Blocks | None = None


def find_method(methods: Mapping[str, Method], name: str) -> Method:
    """Look a method up by name.

    Raises:
      UserError: if there is none of that name.

    >>> find_method({}, "tiez")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: 'tiez' is no merge method; expected one of ...
    """
    if name not in methods:
        known = ", ".join(sorted(methods))
        raise UserError(f"{name!r} is no merge method; expected one of {known}; correct the name")
    return methods[name]


def check_inputs(name: str, method: Method, n_models: int, *, has_base: bool) -> None:
    """Refuse a number of models, or the lack or presence of a base, that a method cannot take.

    Raises:
      UserError: with what was got and what the method takes.

    >>> pair = Method(None, dict, "needed", (2, 2))
    >>> check_inputs("slerp", pair, 3, has_base=True)
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: slerp got 3 models; it takes 2 beside the base; name as many
    """
    least, most = method.models
    if n_models < least or (most is not None and n_models > most):
        takes = f"{least}" if least == most else f"{least} or more"
        if most is not None and least != most:
            takes = f"{least} to {most}"
        beside = " beside the base" if method.base == "needed" else ""
        raise UserError(f"{name} got {n_models} models; it takes {takes}{beside}; name as many")
    if method.base == "needed" and not has_base:
        raise UserError(f"{name} got no base model; it works on differences to one; name a base")
    if method.base == "unused" and has_base:
        raise UserError(f"{name} got a base model, which it has no use for; leave the base out")
