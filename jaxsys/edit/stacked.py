"""Many models that differ in a few tensors, run as one.

Single edits of one model share all but a matrix or two. Stacked, with the shared tensors read once
for all of them, row b of every call is answered by model b.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxsys.core.errors import UserError
from jaxsys.core.tree import size_bytes
from jaxsys.edit.editable import with_leaf
from jaxsys.edit.keep import changed_leaves
from jaxsys.evaluate.protocol import Model, from_lm
from jaxsys.models import lm


def stack_models(config: Any, base: Any, edited: Sequence[Any]) -> Model:
    """Make one model of R edited ones, for `jaxsys.evaluate.generate`.

    Args:
      config: an `LMConfig`.
      base: the unedited parameters.
      edited: R parameters that share with ``base`` the very leaves that they did not change.

    Returns:
      A model that takes exactly R rows, and answers row b as `from_lm(edited[b], config)` would.

    Raises:
      UserError: without parameters.

    >>> from jaxsys.models import lm
    >>> config = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> base = lm.init(jax.random.key(0), config)
    >>> stack_models(config, base, [base, base]).context
    64
    """
    if not edited:
        raise UserError("there is no edited model to stack; give at least one")
    changed = [changed_leaves(params, base) for params in edited]
    paths = tuple(sorted({path for leaves in changed for path in leaves}))
    plain = changed_leaves(base, {})
    own = tuple(jnp.stack([leaves.get(p, plain[p]) for leaves in changed]) for p in paths)
    single = from_lm(base, config)
    blocks = tuple(f"{lm.layer_prefix(config, i)}." for i in range(config.layers))
    outside = not all(path.startswith(blocks) for path in paths)
    apply, head = _functions(single.apply, single.head, paths, outside)
    return Model((base, own), apply, head, single.init_cache, config.vocab_size, single.context)


def stacked_bytes(base: Any, edited: Any) -> int:
    """Count the bytes that one edited model adds to a stack.

    >>> stacked_bytes({}, {"w": jnp.zeros(2)})
    8
    """
    return sum(size_bytes(leaf) for leaf in changed_leaves(edited, base).values())


@functools.lru_cache(maxsize=64)
def _functions(single: Callable, single_head: Callable, paths: tuple[str, ...], outside: bool):
    def put(base: Any, leaves: Sequence[Any]) -> Any:
        for path, leaf in zip(paths, leaves, strict=True):
            base = with_leaf(base, path, leaf)
        return base

    def apply(params, tokens, cache, lengths):
        base, own = params

        def one(leaves, row, store, length):
            rows = jax.tree.map(lambda x: x[None], (row, store, length))
            x, store = single(put(base, leaves), *rows)
            return x[0], jax.tree.map(lambda x: x[0], store)

        return jax.vmap(one)(own, tokens, cache, lengths)

    def head(params, x):
        base, own = params
        if not outside:  # blocks alone differ, and the head is read once for all rows
            return single_head(base, x)
        return jax.vmap(lambda leaves, y: single_head(put(base, leaves), y))(own, x)

    return apply, head
