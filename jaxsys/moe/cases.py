"""Closed forms of a pipelined layer's time: the paper's four cases, and an exact form.

A layer runs r chunks through dispatch (a), all-gather (g), experts (e), reduce-scatter (s) and
combine (a); between the dispatches and the combines the link that carries them is given y seconds
of gradient all-reduce. All formulas take the time of one chunk.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxsys.moe.costs import Costs
from jaxsys.moe.volumes import Volumes


class Chunk(NamedTuple):
    """Hold the seconds that one of r chunks spends in each operation.

    Attributes:
        a: all-to-all, dispatch or combine.
        g: all-gather.
        s: reduce-scatter.
        e: experts.

    >>> Chunk(1.0, 2.0, 2.0, 4.0).e
    4.0
    """

    a: Any
    g: Any
    s: Any
    e: Any


def chunk_times(costs: Costs, volumes: Volumes, degree: Any, *, backward: bool = False) -> Chunk:
    """Predict the seconds of one chunk, ``α + (n/r)·β`` each.

    Args:
        costs: fitted lines.
        volumes: elements of the whole layer.
        degree: r; may be an array or traced.
        backward: whether the experts' work is that of the backward pass, twice the forward's: α and
            β double, as in the released code (the paper's text doubles n too).

    Returns:
        Seconds, of the broadcast shape.

    Reference: arXiv 2501.10714, performance models.

    >>> from jaxsys.moe.costs import TESTBED_B
    >>> round(chunk_times(TESTBED_B, Volumes(4e6, 16e6, 16e6, 5e10), 2).a * 1e3, 3)
    0.787
    """
    e = costs.expert(volumes.expert / degree)
    return Chunk(
        costs.all_to_all(volumes.all_to_all / degree),
        costs.all_gather(volumes.all_gather / degree),
        costs.reduce_scatter(volumes.reduce_scatter / degree),
        2 * e if backward else e,
    )


def four_cases(chunk: Chunk, degree: Any, gradient_s: Any = 0.0) -> tuple[Any, Any, Any, Any]:
    """Evaluate f₁ … f₄ of the paper.

    ``f₁ = 2ra + y``, ``f₂ = 2a + g + s + re``, ``f₃ = 2ra + g + s``, ``f₄ = 2a + r(g + s)``.

    Args:
        chunk: seconds of one chunk.
        degree: r.
        gradient_s: y.

    Returns:
        The four times in seconds.

    Reference: arXiv 2501.10714, cases 1 to 4.

    >>> four_cases(Chunk(1.0, 2.0, 2.0, 4.0), 2, 3.0)
    (7.0, 14.0, 8.0, 10.0)
    """
    a, g, s, e = chunk
    r = degree
    return 2 * r * a + gradient_s, 2 * a + g + s + r * e, 2 * r * a + g + s, 2 * a + r * (g + s)


def which_case(chunk: Chunk, degree: Any, gradient_s: Any = 0.0) -> Any:
    """Name the case that the paper's predicates Q1 … Q7 choose.

    ``Q1 a>g``, ``Q2 re>2(r−1)a``, ``Q3 re>(r−1)(g+s)``, ``Q4 y>g+s``, ``Q5 = Q7
    y>re−2(r−1)a+g+s``, ``Q6 y>r(g+s)−2(r−1)a``.

    Args:
        chunk: seconds of one chunk.
        degree: r.
        gradient_s: y.

    Returns:
        1, 2, 3 or 4, of the broadcast shape.

    Reference: arXiv 2501.10714.

    >>> int(which_case(Chunk(1.0, 2.0, 2.0, 4.0), 2, 3.0))
    2
    """
    a, g, s, e = chunk
    r, y = degree, gradient_s
    q1 = jnp.greater(a, g)
    q2 = jnp.greater(r * e, 2 * (r - 1) * a)
    q3 = jnp.greater(r * e, (r - 1) * (g + s))
    q4 = jnp.greater(y, g + s)
    q5 = jnp.greater(y, r * e - 2 * (r - 1) * a + g + s)
    q6 = jnp.greater(y, r * (g + s) - 2 * (r - 1) * a)
    compute = (q1 & q2) | (~q1 & q3)  # cases 1 and 2, told apart by Q5 = Q7
    inter = jnp.where(q4, 1, 3)
    intra = jnp.where(q6, 1, 4)
    return jnp.where(compute, jnp.where(q5, 1, 2), jnp.where(q1, inter, intra))


def case_max_s(chunk: Chunk, degree: Any, gradient_s: Any = 0.0) -> Any:
    """Predict the seconds of a layer as ``max(f₁, f₂, f₃, f₄)``.

    It is exact where all-gather and reduce-scatter take equally long (g = s), as the paper assumes.

    Args:
        chunk: seconds of one chunk.
        degree: r.
        gradient_s: y.

    Returns:
        Seconds, of the broadcast shape.

    >>> float(case_max_s(Chunk(1.0, 2.0, 2.0, 4.0), 2, 3.0))
    14.0
    """
    f1, f2, f3, f4 = four_cases(chunk, degree, gradient_s)
    return jnp.maximum(jnp.maximum(f1, f2), jnp.maximum(f3, f4))


def closed_form_s(chunk: Chunk, degree: Any, gradient_s: Any = 0.0) -> Any:
    """Predict the seconds of a layer exactly, for any g and s.

    The recurrence of `recurrence.makespan_s` unrolls to a maximum of nine terms, for the times of
    the stages are convex in the chunk's number and so largest at the first or the last chunk: the
    four cases, and

        (r+1)a + rg + s,  (r+1)a + g + rs,  (r+1)a + g + e + s,
        2a + rg + e + s,  2a + g + e + rs.

    With g = s the further five never exceed the four. Every term is c₀ + c₁r + c₂/r with
    coefficients that are not negative, hence convex in r.

    Args:
        chunk: seconds of one chunk.
        degree: r.
        gradient_s: y.

    Returns:
        Seconds, of the broadcast shape.

    Reference: this package's; arXiv 2501.10714 has the four cases.

    >>> float(closed_form_s(Chunk(1.0, 4.0, 1.0, 1.0), 2))
    12.0
    """
    a, g, s, e = chunk
    r = degree
    longest = case_max_s(chunk, degree, gradient_s)
    for term in (
        (r + 1) * a + r * g + s,
        (r + 1) * a + g + r * s,
        (r + 1) * a + g + e + s,
        2 * a + r * g + e + s,
        2 * a + g + e + r * s,
    ):
        longest = jnp.maximum(longest, term)
    return longest


def one_link_s(chunk: Chunk, degree: Any, gradient_s: Any = 0.0) -> Any:
    """Predict a layer whose all-to-alls, gathers and scatters share one link, without overlap.

    Each chunk's dispatch and all-gather run back to back, and so do its reduce-scatter and combine;
    only the experts run beside them (Tutel, PipeMoE, and FSMoE without intra/inter overlap):

        max(r(2a+g+s) + y,  a+g+e + r(a+s),  2a+g+s + re,  r(a+g) + e+a+s).

    Args:
        chunk: seconds of one chunk.
        degree: r.
        gradient_s: y.

    Returns:
        Seconds, of the broadcast shape.

    >>> float(one_link_s(Chunk(1.0, 2.0, 2.0, 4.0), 2))
    14.0
    """
    a, g, s, e = chunk
    r = degree
    longest = jnp.maximum(r * (2 * a + g + s) + gradient_s, 2 * a + g + s + r * e)
    return jnp.maximum(longest, jnp.maximum(a + g + e + r * (a + s), r * (a + g) + e + a + s))
