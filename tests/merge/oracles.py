"""Merge methods transcribed to NumPy in float64, straight from their formulas, whole and slow."""

import numpy as np


def linear(config, base, stack, w):
    total = np.tensordot(w, stack, 1)
    return total / w.sum() if config.normalize else total


def task_arithmetic(config, base, stack, w):
    total = np.tensordot(w, stack - base, 1)
    return base + config.lambda_ * (total / w.sum() if config.normalize else total)


def passthrough(config, base, stack, w):
    return stack[0] * (1.0 if config.scale is None else config.scale)


def keep_ranks(tau, first, last):
    """Zero all but the entries of descending magnitude rank first … last."""
    order = np.argsort(-np.abs(tau).reshape(-1), kind="stable")
    kept = np.zeros(tau.size, bool)
    kept[order[first - 1 : last]] = True
    return np.where(kept.reshape(tau.shape), tau, 0)


def l1(tau, kept):
    return kept * np.abs(tau).sum() / np.abs(kept).sum()


def band(config, tau, gamma=0.0):
    if config.density >= 1:
        return tau
    n = tau.size
    target, top = int(config.density * n), int(gamma * n)
    bottom = n - target - top
    top += min(bottom, 0)
    kept = keep_ranks(tau, top + 1, top + target)
    return l1(tau, kept) if config.rescale == "l1" else kept


def elect(config, base, parts, w):
    """Elect signs of weighted sparse differences and merge what agrees."""
    shape = (-1, *[1] * base.ndim)
    weighted = parts * w.reshape(shape)
    sign = np.where(weighted.sum(0) >= 0, 1, -1)
    agree = np.sign(weighted) == sign
    mixed = (weighted * agree).sum(0)
    if config.normalize:
        total = (w.reshape(shape) * agree).sum(0)
        mixed = mixed / np.where(total == 0, 1, total)
    return base + config.lambda_ * mixed


def ties(config, base, stack, w):
    return elect(config, base, np.array([band(config, x - base) for x in stack]), w)


def breadcrumbs(config, base, stack, w):
    parts = np.array([band(config, x - base, config.gamma) for x in stack])
    return base + config.lambda_ * np.tensordot(w, parts, 1)


def breadcrumbs_ties(config, base, stack, w):
    parts = np.array([band(config, x - base, config.gamma) for x in stack])
    return elect(config, base, parts, w)


def slerp(config, base, stack, w):
    a, b, t = base, stack[0], config.t
    cos = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    if abs(cos) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(cos)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def nuslerp(config, base, stack, w):
    t = w[1] / w.sum()
    a, b = stack if base is None else stack - base
    if config.nuslerp_flatten:
        rows = [(a.reshape(-1), b.reshape(-1))]
    elif config.nuslerp_row_wise:
        rows = list(zip(np.moveaxis(a, 0, -1), np.moveaxis(b, 0, -1), strict=True))
    else:
        rows = list(zip(a, b, strict=True))
    out = []
    for x, y in rows:
        angle = np.arccos(np.clip(x @ y / np.linalg.norm(x) / np.linalg.norm(y), -1, 1))
        out.append((np.sin((1 - t) * angle) * x + np.sin(t * angle) * y) / np.sin(angle))
    merged = np.array(out)
    if config.nuslerp_row_wise and not config.nuslerp_flatten:
        merged = np.moveaxis(merged, -1, 0)
    return merged.reshape(a.shape) + (0 if base is None else base)


def multislerp(config, base, stack, w):
    points = stack if base is None else stack - base
    flat = points.reshape(len(points), -1)
    w = w / w.sum()
    norms = np.linalg.norm(flat, axis=1)
    unit = flat / norms[:, None]
    mean = w @ unit
    mean /= np.linalg.norm(mean)
    tangent = w @ (unit - (unit @ mean)[:, None] * mean)
    length = np.linalg.norm(tangent)
    merged = (np.cos(length) * mean + np.sin(length) / length * tangent) * (norms @ w)
    return merged.reshape(points[0].shape) + (0 if base is None else base)


def karcher(config, base, stack, w):
    flat = stack.reshape(len(stack), -1)
    a = w / w.sum()
    norms = np.linalg.norm(flat, axis=1)
    unit = flat / norms[:, None]
    u = a @ unit
    u /= np.linalg.norm(u)
    for _ in range(config.max_iter):
        angle = np.arccos(np.clip(unit @ u, -1, 1))
        step = ((a * angle / np.sin(angle))[:, None] * (unit - np.cos(angle)[:, None] * u)).sum(0)
        size = np.linalg.norm(step)
        if size < config.tol:
            break
        u = np.cos(size) * u + np.sin(size) * step / size
        u /= np.linalg.norm(u)
    return ((a @ norms) * u).reshape(stack[0].shape)


def model_stock(config, base, stack, w):
    n = len(stack)
    flat = (stack - base).reshape(n, *((-1,) if not config.filter_wise else base.shape))
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    cos = np.mean(
        [
            (flat[i] * flat[j]).sum(-1)
            / np.linalg.norm(flat[i], axis=-1)
            / np.linalg.norm(flat[j], axis=-1)
            for i, j in pairs
        ],
        axis=0,
    )
    t = (n * cos / (1 + (n - 1) * cos))[..., None]
    return (t * flat.mean(0)).reshape(base.shape) + base


def sce(config, base, stack, w):
    taus = stack - base
    if config.select_topk < 1:
        variance = taus.var(0)
        k = int((variance != 0).sum() * config.select_topk)
        chosen = np.zeros(base.size, bool)
        chosen[np.argsort(-variance.reshape(-1))[:k]] = True
        taus = taus * chosen.reshape(base.shape)
    share = (taus**2).reshape(len(taus), -1).mean(1)
    share = share / share.sum()
    sign = np.where(taus.sum(0) >= 0, 1, -1)
    agree = (np.sign(taus) == sign) * share.reshape(-1, *[1] * base.ndim)
    return base + (taus * agree).sum(0) / np.maximum(agree.sum(0), 1e-6)


def ram(config, base, stack, w, factor=None):
    taus = stack - base
    changed = np.abs(taus) > config.epsilon
    count = changed.sum(0)
    factor = np.ones(len(stack)) if factor is None else factor
    own = (taus * changed * (count == 1) * factor.reshape(-1, *[1] * base.ndim)).sum(0)
    return base + own + (taus * changed * (count > 1)).sum(0) / np.maximum(count, 1)


def ramplus_tl(config, base, stack, w):
    changed = (np.abs(stack - base) > config.epsilon).reshape(len(stack), -1)
    count = changed.sum(0)
    shared, unique = (changed & (count > 1)).sum(1), (changed & (count == 1)).sum(1)
    factor = 1 + config.r * np.clip(shared / np.maximum(unique, config.epsilon), 0, config.alpha)
    return ram(config, base, stack, w, factor)


def nearswap(config, base, stack, w):
    share = np.clip(config.t / np.maximum(np.abs(base - stack[0]), 1e-6), 0, 1)
    return share * stack[0] + (1 - share) * base


def arcee_fusion(config, base, stack, w):
    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True) + 1e-8

    p, q = softmax(stack[0]), softmax(base)
    importance = np.abs(stack[0] - base) * (p * np.log(p / q)).sum(-1, keepdims=True)
    ordered = np.sort(importance.reshape(-1))
    low, middle, high = (ordered[int(f * (ordered.size - 1))] for f in (0.25, 0.5, 0.75))
    return np.where(importance >= middle + 1.5 * (high - low), stack[0], base)
