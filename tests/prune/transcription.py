"""The published formulas in float64, written column by column as the papers state them."""

import numpy as np


def smallest(scores: np.ndarray, count: int) -> np.ndarray:
    """Mark the ``count`` smallest entries, ties by index; True is removed."""
    drop = np.zeros(scores.size, bool)
    drop[np.argsort(scores.reshape(-1), kind="stable")[:count]] = True
    return drop.reshape(scores.shape)


def rows_kept(scores: np.ndarray, sparsity: float) -> np.ndarray:
    count = int(scores.shape[1] * sparsity)
    return ~np.stack([smallest(row, count) for row in scores])


def nm_kept(scores: np.ndarray, n: int, m: int) -> np.ndarray:
    kept = [[~smallest(g, m - n) for g in row.reshape(-1, m)] for row in scores]
    return np.array(kept).reshape(scores.shape)


def scores(name: str, w: np.ndarray, x: np.ndarray, g: np.ndarray) -> np.ndarray:
    """x: mean squared channel norms [I]; g: accumulated gradients [O, I]."""
    size = np.abs(w)
    if name == "magnitude":
        return size
    if name == "wanda":
        return size * np.sqrt(x)
    if name == "ria":
        shares = size / size.sum(0, keepdims=True) + size / size.sum(1, keepdims=True)
        return shares * np.sqrt(np.sqrt(x))
    if name == "gradient":
        return size * g
    if name == "gblm":
        return size * np.sqrt(x) + size * g
    assert name == "pruner_zero"
    return np.abs(size * size) * (g - g.min()) / (g.max() - g.min())


def wanda_alpha(scores: np.ndarray, sparsity: float) -> np.ndarray:
    """Bisect α as the released code does, until the sparsity is met."""
    order = np.sort(scores, axis=1)
    sums, total = np.cumsum(order, axis=1), scores.sum(1, keepdims=True)
    low, high = 0.0, 1.0
    for _ in range(200):
        alpha = (low + high) / 2
        count = (sums <= alpha * total).sum(1)
        if count.sum() < int(scores.size * sparsity):
            low = alpha
        else:
            high = alpha
    count = (sums <= high * total).sum(1)
    return ~np.stack([smallest(row, k) for row, k in zip(scores, count, strict=True)])


def sparsegpt(
    w: np.ndarray,
    h: np.ndarray,
    sparsity: float = 0.5,
    nm: tuple[int, int] | None = None,
    given: np.ndarray | None = None,
    damping: float = 0.01,
    block: int = 128,
) -> tuple[np.ndarray, np.ndarray]:
    """Weights and mask: the inverse, its upper factor, and one column after another."""
    w, h = w.astype(np.float64).copy(), h.astype(np.float64).copy()
    dead = np.diag(h) == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h += damping * np.mean(np.diag(h)) * np.eye(len(h))
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    o, i = w.shape
    kept = np.ones(w.shape, bool)
    for a in range(0, i, block):
        b = min(a + block, i)
        errors = np.zeros((o, b - a))
        if given is not None:
            kept[:, a:b] = given[:, a:b]
        elif nm is None:
            count = int(o * b * sparsity + 1e-9) - int(o * a * sparsity + 1e-9)
            kept[:, a:b] = ~smallest((w[:, a:b] / np.diag(u)[a:b]) ** 2, count)
        for j in range(a, b):
            if nm is not None and j % nm[1] == 0:
                part = slice(j, j + nm[1])
                kept[:, part] = nm_kept((w[:, part] / np.diag(u)[part]) ** 2, *nm)
            q = np.where(kept[:, j], w[:, j], 0)
            e = (w[:, j] - q) / u[j, j]
            w[:, j:b] -= np.outer(e, u[j, j:b])
            w[:, j] = q
            errors[:, j - a] = e
        w[:, b:] -= errors @ u[a:b, b:]
    return w, kept


def least_squares(w: np.ndarray, h: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The weights on a support that minimise tr((W' - W) H (W' - W)ᵀ), row by row."""
    best = np.zeros_like(w)
    for row, (own, keep) in enumerate(zip(w, kept, strict=True)):
        at = np.flatnonzero(keep)
        best[row, at] = np.linalg.solve(h[np.ix_(at, at)], h[at] @ own)
    return best


def dsnot(
    w: np.ndarray, kept: np.ndarray, x: np.ndarray, mean: np.ndarray, var: np.ndarray
) -> np.ndarray:
    """One row after another, one exchange after another."""
    kept = kept.copy()
    for i in range(len(w)):
        change = w[i] * mean
        for _ in range(50):
            error = change[~kept[i]].sum()
            sign = np.sign(error)
            back = [j for j in range(len(mean)) if not kept[i, j] and change[j] * sign > 0]
            gone = [j for j in range(len(mean)) if kept[i, j] and change[j] * sign < 0]
            if abs(error) <= 0.1 or not back or not gone:
                break
            j = max(back, key=lambda j: abs(change[j]) / var[j])
            k = min(gone, key=lambda k: abs(w[i, k]) * np.sqrt(x[k]))
            if abs(error - change[j] + change[k]) >= abs(error):
                break
            kept[i, j], kept[i, k] = True, False
    return kept


def alps(w: np.ndarray, h: np.ndarray, sparsity: float) -> tuple[np.ndarray, np.ndarray]:
    """ADMM with the released schedule of ρ, then the exact least squares on the support."""
    h = h + 0.01 * np.mean(np.diag(h)) * np.eye(len(h))
    scale = np.sqrt(np.diag(h))
    a = h / np.outer(scale, scale)
    b0 = (w * scale).T
    count, kept = int(w.size * sparsity), w.size - int(w.size * sparsity)

    def support(b: np.ndarray) -> np.ndarray:
        return ~smallest(b.T**2, count).T

    d, v, rho, raised, before = b0, np.zeros_like(b0), 0.1, False, support(b0)
    for t in range(1, 301):
        b = np.linalg.solve(a + rho * np.eye(len(a)), a @ b0 - v + rho * d)
        now = support(b + v / rho)
        d = np.where(now, b + v / rho, 0)
        v = v + rho * (b - d)
        if t % 3:
            continue
        changed, before = (now != before).sum(), now
        if changed / kept > 0.005:
            raised, rho = True, rho * (1.3 if changed / kept > 0.1 else 1.2)
        elif changed >= 1 and raised:
            rho *= 1.1
            if t >= 30 and changed / kept < 3e-4:
                break
        elif raised:
            break
        else:
            rho /= 5
            if changed >= 1:
                d, v = b0, np.zeros_like(b0)
    mask = support(d).T
    return least_squares(w, h, mask), mask
