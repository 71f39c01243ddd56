"""A lower bound on what a pass can take, by linear programming over fractions of experts."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.offload.partition import Whole

Modules = Sequence[tuple[Whole, float]]  # each active expert and its resident share


def layer_bound_s(modules: Modules) -> float:
    """Bound the seconds of one layer's experts from below.

    Every expert may be cut at will: a share x on the CPU, a ≤ g of what is resident on the
    accelerator, the rest copied over. Launches, latencies and the order of copy and compute are
    left out, so no schedule of these modules takes less.

    Args:
        modules: active experts with their resident shares g.

    Returns:
        Seconds.

    >>> round(layer_bound_s([(Whole(4.0, 12.0, 1.0), 0.0)]), 9)
    3.0
    """
    return _layer(tuple((Whole(*w), float(g)) for w, g in modules))


@lru_cache(maxsize=4096)
def _layer(modules: tuple[tuple[Whole, float], ...]) -> float:
    return pass_bound_s([0.0], [modules])


def pass_bound_s(
    fixed_s: Sequence[float], layers: Sequence[Modules], *, lookahead: bool = False
) -> float:
    """Bound the seconds of a pass through layers that run in order.

    ``min Σ_l (fixed_l + t_l)`` where t_l is at least what the CPU and the accelerator have to do in
    layer l. Copies and the CPU's memory must keep up within each layer or, with ``lookahead`` (an
    engine that copies before the router has spoken), by the end of every layer counted from the
    beginning of the pass.

    Args:
        fixed_s: of each layer, seconds before its experts begin, [L].
        layers: active experts of each layer with the shares that are resident as the pass begins.
        lookahead: copies may be made for later layers.

    Returns:
        Seconds.

    Raises:
        UserError: lists of different lengths, or a programme that cannot be solved.

    >>> expert = (Whole(4.0, 12.0, 1.0), 0.0)
    >>> round(pass_bound_s([1.0, 1.0], [[expert]] * 2), 9)
    8.0
    >>> round(pass_bound_s([1.0, 1.0], [[expert]] * 2, lookahead=True), 9)
    7.5
    """
    from scipy.optimize import linprog

    if len(fixed_s) != len(layers):
        raise UserError(
            f"{len(fixed_s)} fixed times and {len(layers)} layers were given; expected one per "
            "layer; pass 0 where there is none"
        )
    n_layers, n = len(layers), sum(map(len, layers))
    # Variables: t of each layer, then x (CPU) and a (resident on the accelerator) of each expert.
    width = n_layers + 2 * n
    bounds: list[tuple[float, float | None]] = [(0.0, None)] * n_layers
    rows, right, whole_rows, begin = [], [], [], n_layers
    past = [np.zeros(width), np.zeros(width)]  # link and memory, up to here
    past_right = [0.0, 0.0]
    for layer, modules in enumerate(layers):
        cpu, link, accelerator, dram = (np.zeros(width) for _ in range(4))
        constant = [0.0, 0.0, 0.0]  # link, accelerator, memory without x and a
        for w, g in modules:
            x, a = begin, begin + 1
            begin += 2
            bounds += [(0.0, 1.0), (0.0, g)]
            cpu[x] = w.cpu_s
            link[x] = link[a] = -w.link_s
            accelerator[x] = -w.accelerator_s
            dram[a] = -w.dram_s
            constant = [c + t for c, t in zip(constant, w[1:4], strict=True)]
            together = np.zeros(width)
            together[[x, a]] = 1.0
            whole_rows.append(together)
        for row, c in ((cpu, 0.0), (accelerator, constant[1])):
            row[layer] = -1.0
            rows.append(row)
            right.append(-c)
        for j, (row, c) in enumerate(((link, constant[0]), (dram, constant[2]))):
            past[j] = past[j] + row if lookahead else row.copy()
            past[j][layer] = -1.0
            room = fixed_s[layer] if lookahead else 0.0
            past_right[j] = (past_right[j] if lookahead else 0.0) + room - c
            rows.append(past[j].copy())
            right.append(past_right[j])
    cost = np.zeros(width)
    cost[:n_layers] = 1.0
    if not n:
        return float(sum(fixed_s))
    found = linprog(
        cost,
        A_ub=np.array(rows + whole_rows),
        b_ub=np.array(right + [1.0] * n),
        bounds=bounds,
        method="highs",
    )
    if not found.success:
        raise UserError(
            f"the bound's programme has no solution ({found.message}); expected finite times that "
            "are not negative; check the machine's rates"
        )
    return float(sum(fixed_s) + found.fun)
