"""Which weights are compared with which, and how many of them go."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Array, Bool, Float

from jaxsys.core.errors import UserError
from jaxsys.prune import masks


@dataclass(frozen=True)
class Pattern:
    """Say how much is removed, and in which form.

    Attributes:
        sparsity: share of the weights to remove, in [0, 1); with ``nm`` it is 1 - n/m.
        scope: compare the weights of a row, of a matrix, or of all layers (``global``, with dense
            statistics only); ``auto`` is what the metric was published with.
        nm: (n, m): keep n of every m consecutive weights of a row.
        block: (rows, columns): remove whole blocks.

    Raises:
        UserError: for a sparsity outside [0, 1), or forms that exclude each other.

    >>> Pattern(nm=(2, 4)).sparsity, str(Pattern(0.6)), str(Pattern(nm=(2, 4)))
    (0.5, '60%', '2:4')
    """

    sparsity: float = 0.5
    scope: Literal["auto", "row", "matrix", "global"] = "auto"
    nm: tuple[int, int] | None = None
    block: tuple[int, int] | None = None

    def __post_init__(self):
        masks.n_removed(1, self.sparsity)
        if self.nm is not None:
            masks.check_nm(*self.nm, self.nm[1] or 1)
            object.__setattr__(self, "sparsity", 1 - self.nm[0] / self.nm[1])
        if self.nm is not None and self.block is not None:
            raise UserError("both an N:M pattern and blocks are asked for; choose one of them")
        if self.scope != "auto" and (self.nm or self.block):
            form = "an N:M pattern" if self.nm else "blocks"
            raise UserError(
                f"the scope {self.scope!r} is asked for together with {form}, which has its own; "
                "leave the scope at auto"
            )

    def __str__(self) -> str:
        if self.nm:
            return f"{self.nm[0]}:{self.nm[1]}"
        share = f"{100 * self.sparsity:g}%"
        return f"{share} in {self.block[0]}x{self.block[1]}" if self.block else share

    def units(self, shape: tuple[int, ...]) -> int:
        """Count what is removed as one in a layer: weights, or blocks.

        >>> Pattern().units((4, 6)), Pattern(block=(2, 2)).units((4, 6))
        (24, 6)
        """
        rows, columns = self.block or (1, 1)
        return (shape[0] // rows) * (shape[1] // columns)

    def check(self, shape: tuple[int, ...], where: str) -> None:
        """Refuse a layer that the pattern does not divide.

        Args:
            shape: (outputs, inputs).
            where: the layer, for the message.

        Raises:
            UserError: naming the layer.

        >>> Pattern(nm=(2, 4)).check((4, 6), "h.3")
        Traceback (most recent call last):
        ...
        jaxsys.core.errors.UserError: pattern 2:4 does not divide the 6 inputs of h.3; ...
        """
        if self.nm:
            masks.check_nm(*self.nm, shape[1], where)
        if self.block:
            masks.check_block(self.block, shape, where)


def parse_pattern(text: str, sparsity: float = 0.5) -> Pattern:
    """Read ``unstructured``, ``row``, ``matrix``, ``global``, ``2:4`` or ``16x16``.

    Args:
        text: as above.
        sparsity: share to remove, for all but N:M.

    Raises:
        UserError: for any other text.

    >>> parse_pattern("4:8").nm, parse_pattern("16x8", 0.3).block
    ((4, 8), (16, 8))
    """
    if text == "unstructured":
        return Pattern(sparsity)
    if text in ("row", "matrix", "global"):
        return Pattern(sparsity, scope=text)
    for sign in (":", "x"):
        first, found, second = text.partition(sign)
        if found and first.isdecimal() and second.isdecimal():
            pair = (int(first), int(second))
            return Pattern(nm=pair) if sign == ":" else Pattern(sparsity, block=pair)
    raise UserError(
        f"pattern is {text!r}; expected unstructured, row, matrix, global, kept weights of a group "
        "such as 2:4, or blocks such as 16x16"
    )


def mask_of(
    scores: Float[Array, "O I"],
    pattern: Pattern,
    scope: Literal["row", "matrix"] = "row",
    count: int | None = None,
) -> Bool[Array, "O I"]:
    """Apply a pattern to the scores of one layer.

    Args:
        scores: S.
        pattern: see `Pattern`; not ``global``.
        scope: what ``auto`` means.
        count: weights (or whole blocks) to remove, exactly; None for the pattern's share, which
            every row rounds down by itself. An N:M pattern has a count of its own.

    Returns:
        Mask, True keeps.

    >>> import jax.numpy as jnp
    >>> mask_of(jnp.array([[1.0, 2.0], [3.0, 4.0]]), Pattern(0.5), "matrix").tolist()
    [[False, False], [True, True]]
    """
    if pattern.nm:
        return masks.nm_mask(scores, *pattern.nm)
    if pattern.block:
        return masks.block_mask(scores, pattern.block, pattern.sparsity, count)
    chosen = scope if pattern.scope == "auto" else pattern.scope
    if chosen == "global":
        raise UserError(
            "a global threshold needs the scores of all layers at once; use the dense protocol"
        )
    if count is not None:
        return masks.counted_mask(scores, count, chosen)
    whole = chosen == "matrix"
    return (masks.matrix_mask if whole else masks.row_mask)(scores, pattern.sparsity)
