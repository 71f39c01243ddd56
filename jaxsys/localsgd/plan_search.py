"""Two searches beside the exact programme: the released one, and one over any assignment."""

import numpy as np

from jaxsys.localsgd.plan_time import phase_wait_s

EXACT_LAYERS = 12  # 3^12 pairs of a set and a subset: half a second
SWAP_LAYERS = 256  # swaps need an L × L table
_MAX_STEPS = 2000


def dfs_search(backward_s, comm_s, period: int) -> tuple[tuple[tuple[int, ...], ...], float]:
    """Search as the released DreamDDP scheduler does, with its own accounting of free time.

    Layers are taken in backward order. An iteration takes layers while their communication fits
    into the backward time that remains (property 1). At the first that does not fit: if the
    iteration is empty it takes it and pays the overflow (property 3); otherwise it either takes it
    and pays, or leaves it to the next iteration (property 2); the cheaper continuation wins, ties
    pay. The last iteration takes all that is left.

    The remaining time is counted as the release counts it: the channel's position is a layer and
    the part of that layer's backward still unused. When the channel had to wait for the next layer,
    a search step keeps the unused part of the layer before it, and an unused part of exactly zero
    counts as a whole layer. The reported wait therefore differs from `plan_time.wait_s` by up to a
    few per cent; use that function for the truth about the schedule found. Branches are tabulated,
    which gives the result of the recursion in time O(period · L²) instead of O(2^period).

    Args:
        backward_s: backward seconds per layer, backward order, [L].
        comm_s: communication seconds per layer, [L].
        period: iterations H.

    Returns:
        The phases (empty ones at the end where layers ran out), and the total wait as the release
        would report it.

    Reference: arXiv 2502.11058, three properties of the schedule; released code of the paper.

    >>> dfs_search([1.0] * 6, [2.0, 1, 1, 3, 1, 1], 2)
    (((0, 1, 2, 3), (4, 5)), 3.0)
    """
    backward_s, comm_s = [float(b) for b in backward_s], [float(c) for c in comm_s]
    n = len(comm_s)
    levels: list[dict[int, tuple[int, float, bool]]] = []
    frontier = {0}
    for _ in range(period - 1):
        level = {i: _fill_iteration(i, backward_s, comm_s) for i in sorted(frontier) if i < n}
        levels.append(level)
        paid = {end + 1 for end, _, _ in level.values()}
        frontier = paid | {end for end, _, may_leave in level.values() if may_leave}
    last = {i: (released_wait_s(i, n, backward_s, comm_s), n) for i in sorted(frontier) if i < n}
    choices: list[dict[int, tuple[float, int]]] = [last]  # first layer -> (wait from here on, end)
    for level in reversed(levels):
        later, here = choices[0], {}
        for i, (end, overflow, may_leave) in level.items():
            options = [(overflow + (later[end + 1][0] if end + 1 < n else 0.0), min(end + 1, n))]
            if may_leave:
                options.append((later[end][0], end))
            here[i] = min(options, key=lambda option: option[0])
        choices.insert(0, here)
    phases, i = [], 0
    for here in choices:
        end = here[i][1] if i < n else n
        phases.append(tuple(range(i, end)))
        i = end
    return tuple(phases), choices[0][0][0]


def released_wait_s(start: int, end: int, backward_s, comm_s) -> float:
    """Count the wait of a run of layers as the released code does.

    It runs the channel while everything fits; from the first layer that does not fit into the
    backward time left, that layer's excess and all later layers in full are waited for.

    Args:
        start: first layer of the run.
        end: one past its last layer.
        backward_s: backward seconds per layer, backward order, [L].
        comm_s: communication seconds per layer, [L].

    Returns:
        Seconds of waiting in the release's accounting; see `dfs_search` for where it differs.

    >>> released_wait_s(0, 4, [1.0] * 6, [2.0, 1, 1, 3, 1, 1])
    2.0
    """
    backward_s, comm_s = list(backward_s), list(comm_s)
    after = _suffix_sums(backward_s)
    layer, unused = start + 1, 0.0
    for i in range(start, end):
        if i == layer:
            layer, unused = layer + 1, 0.0
        remaining = _remaining(after, layer, unused)
        if comm_s[i] >= remaining:
            return comm_s[i] - remaining + sum(comm_s[i + 1 : end])
        layer, unused = _advance(backward_s, comm_s[i], layer, unused)
    return 0.0


def _fill_iteration(first, backward_s, comm_s):
    """Take layers while they fit; returns (end, overflow of `end`, whether it may be left)."""
    after = _suffix_sums(backward_s)
    layer, unused = first + 1, 0.0
    for i in range(first, len(comm_s)):
        layer += i == layer  # here the release keeps `unused`
        remaining = _remaining(after, layer, unused)
        if comm_s[i] > remaining:
            return i, comm_s[i] - remaining, i > first
        layer, unused = _advance(backward_s, comm_s[i], layer, unused)
    return len(comm_s), 0.0, False


def _suffix_sums(backward_s):
    return [*np.cumsum(backward_s[::-1])[::-1].tolist(), 0.0]


def _remaining(after, layer, unused):
    """Backward time left when the channel stands in a layer with this much of it unused."""
    if layer >= len(after) - 1:
        return 0.0
    return after[layer] if unused == 0 else after[layer + 1] + unused


def _advance(backward_s, cost, layer, unused):
    """Spend channel time; returns the layer in whose backward it ends, and what is unused of it."""
    if cost <= unused:
        return layer, unused - cost
    need, spent = cost - unused, 0.0
    for k in range(layer if unused == 0 else layer + 1, len(backward_s)):
        spent += backward_s[k]
        if need <= spent:
            return (k, spent - need) if spent > need else (k + 1, 0.0)
    return len(backward_s), 0.0  # only rounding leads here


def best_assignment(start, period: int, release, end: float, comm_s):
    """Assign layers to iterations in any way, for the least total wait.

    Up to 12 layers it is exact: with w(S) the wait of every set S by the channel rule,
    ``F_h(U) = min_{S⊆U} w(S) + F_{h−1}(U∖S)``. Beyond that it descends by the best single move of a
    layer to another iteration, and up to 256 layers by the best swap of two where no move helps,
    from `start` and from a longest-first greedy assignment; the cheaper result is returned.

    Args:
        start: phases to improve on (those of the exact programme over runs).
        period: iterations H.
        release: release times, [L].
        end: end of the compute, on the same clock.
        comm_s: communication seconds, [L].

    Returns:
        Phases, each ascending, never costlier than `start`.

    >>> runs = ((0, 1), (2, 3))
    >>> best_assignment(runs, 2, np.arange(1.0, 5.0), 4.0, np.array([3.0, 1.0, 1.0, 1.0]))
    ((0,), (1, 2, 3))
    """

    def total(phases):
        return sum(phase_wait_s(layers, release, end, comm_s) for layers in phases)

    if total(start) == 0:
        return start
    if len(comm_s) <= EXACT_LAYERS:
        found = [_exact(period, release, end, comm_s)]
    else:
        found = [_Descent(start, release, end, comm_s).run()]
        if len(comm_s) * period <= 20_000:
            greedy = _longest_first(period, release, end, comm_s)
            found.append(_Descent(greedy, release, end, comm_s).run())
    return min((start, *found), key=total)


def _exact(period, release, end, comm_s):
    n = len(comm_s)
    finish = np.full(1, -np.inf)
    for ready, cost in zip(release, comm_s, strict=True):  # bit i of the index is layer i
        finish = np.concatenate([finish, np.maximum(finish, ready) + cost])
    wait = np.maximum(finish - end, 0)
    sets = np.arange(2**n)
    least, taken = wait, []
    for _ in range(min(period, n) - 1):
        cost, subset = wait.copy(), sets.copy()  # take all of U now
        for s in range(2**n):
            rest = sets[sets & s == 0]
            union = rest | s
            better = wait[s] + least[rest] < cost[union]
            cost[union[better]] = wait[s] + least[rest[better]]
            subset[union[better]] = s
        least = cost
        taken.append(subset)
    left, masks = 2**n - 1, []
    for subset in reversed(taken):
        masks.append(int(subset[left]))
        left &= ~masks[-1]
    masks += [left] + [0] * (period - len(masks) - 1)
    return _in_order(tuple(i for i in range(n) if mask >> i & 1) for mask in masks)


def _in_order(phases):
    """Put the iteration of the earliest layer first and empty ones last."""
    return tuple(sorted(map(tuple, phases), key=lambda layers: layers[:1] or (np.inf,)))


def _longest_first(period, release, end, comm_s):
    phases: list[list[int]] = [[] for _ in range(period)]
    finish = [-np.inf] * period
    for layer in np.argsort(-comm_s, kind="stable"):
        options = []
        for h, members in enumerate(phases):
            new = _finish_with(np.asarray(members, int), release, comm_s, layer)
            added = max(0.0, new - end) - max(0.0, finish[h] - end)
            options.append((added, new, h))
        _, finish_h, h = min(options)
        finish[h] = finish_h
        phases[h] = sorted([*phases[h], int(layer)])
    return _in_order(phases)


def _finish_with(members, release, comm_s, added):
    """Finish of a phase (ascending indices) with one more layer, for each layer in `added`.

    From ``finish = max_k (r_k + Σ_{l≥k} c_l)``: the added layer's cost falls on the terms of the
    layers before it, it brings a term of its own, and the terms after it stay.
    """
    remaining, before, behind = _terms(members, release, comm_s)
    at = np.searchsorted(members, added)
    own = release[added] + comm_s[added] + remaining[at]
    return np.maximum(np.maximum(before[at] + comm_s[added], own), behind[at])


def _finish_without(members, release, comm_s):
    """Finish of a phase (ascending indices) without each of its layers in turn."""
    _, before, behind = _terms(members, release, comm_s)
    return np.maximum(before[:-1] - comm_s[members], behind[1:])


def _terms(members, release, comm_s):
    """Per position: the cost from there on, and the largest r_k + Σ_{l≥k} c_l before and from."""
    remaining = np.append(np.cumsum(comm_s[members][::-1])[::-1], 0.0)
    terms = release[members] + remaining[:-1]
    before = np.maximum.accumulate(np.concatenate([[-np.inf], terms]))
    behind = np.maximum.accumulate(np.concatenate([terms, [-np.inf]])[::-1])[::-1]
    return remaining, before, behind


class _Descent:
    """Improve an assignment by the best move, or swap, until none helps."""

    def __init__(self, phases, release, end, comm_s):
        self.release, self.end, self.comm_s = release, end, comm_s
        self.n = len(comm_s)
        self.members = [np.asarray(layers, int) for layers in phases]
        self.where = np.empty(self.n, int)  # each layer's phase
        self.wait = np.zeros(len(phases))
        self.joined = np.empty((len(phases), self.n))  # wait of a phase with one more layer
        self.left = np.empty(self.n)  # wait of a layer's phase without it
        self.swapped = np.empty((self.n, self.n)) if self.n <= SWAP_LAYERS else None
        for h in range(len(phases)):
            self._refresh(h)

    def _waits(self, finish):
        return np.maximum(finish - self.end, 0)

    def _refresh(self, h):
        members, everyone = self.members[h], np.arange(self.n)
        self.where[members] = h
        self.wait[h] = phase_wait_s(members, self.release, self.end, self.comm_s)
        self.joined[h] = self._waits(_finish_with(members, self.release, self.comm_s, everyone))
        self.left[members] = self._waits(_finish_without(members, self.release, self.comm_s))
        if self.swapped is not None:
            for q, layer in enumerate(members):
                others = np.delete(members, q)
                finish = _finish_with(others, self.release, self.comm_s, everyone)
                self.swapped[layer] = self._waits(finish)

    def _reassign(self, layer, h):
        a = self.where[layer]
        self.members[a] = self.members[a][self.members[a] != layer]
        self.members[h] = np.sort(np.append(self.members[h], layer))
        return {int(a), int(h)}

    def _step(self):
        """Apply the best improvement; returns whether there was one."""
        tolerance = 1e-12 * float(self.comm_s.sum())
        mine = self.wait[self.where]
        gain = mine - self.left + self.wait[:, None] - self.joined
        gain[self.where, np.arange(self.n)] = 0
        h, layer = np.unravel_index(np.argmax(gain), gain.shape)
        if gain[h, layer] > tolerance:
            touched = self._reassign(layer, h)
        elif self.swapped is not None:
            gain = mine[:, None] + mine - self.swapped - self.swapped.T
            gain[self.where[:, None] == self.where] = 0
            x, y = np.unravel_index(np.argmax(gain), gain.shape)
            if gain[x, y] <= tolerance:
                return False
            a, b = self.where[x], self.where[y]
            touched = self._reassign(x, b) | self._reassign(y, a)
        else:
            return False
        for h in touched:
            self._refresh(h)
        return True

    def run(self):
        for _ in range(_MAX_STEPS):
            if not self._step():
                break
        return _in_order(tuple(members.tolist()) for members in self.members)
