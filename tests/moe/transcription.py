"""The gates, the drop policies and the layer once more, in NumPy, in float64, token by token."""

import numpy as np


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def sigma(x):
    return 1 / (1 + np.exp(-x))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def largest(row, k):
    """Indices of the k largest, best first, the first of equals first."""
    return np.argsort(-row, kind="stable")[:k]


def by_token(scores, weigh, k):
    """Each token's experts and weights as a matrix [N, E], zeros elsewhere."""
    out = np.zeros_like(scores)
    for n, row in enumerate(scores):
        chosen = largest(row, k)
        out[n, chosen] = weigh(n, chosen)
    return out


def gshard(p, x, k=2, noise=None):
    h = x @ p["weight"].T
    if noise is not None:
        h = h + noise * np.log1p(np.exp(x @ p["noise"].T))
    return by_token(h, lambda n, c: softmax(h[n, c]), k)


def switch(p, x, k=1):
    h = x @ p["weight"].T
    return by_token(h, lambda n, c: softmax(h[n])[c], k)


def sigmoid(p, x, k=2):
    h = x @ p["weight"].T
    return by_token(h, lambda n, c: sigma(h[n, c]), k)


def cosine(p, x, k=2):
    heat = np.exp(min(p["temperature"], np.log(100)))
    h = heat * unit(x @ p["projection"].T) @ unit(p["weight"]).T
    return by_token(h, lambda n, c: softmax(h[n, c]), k)


def sinkhorn(p, x, k=1):
    h = x @ p["weight"].T
    q = np.exp(h)
    for _ in range(60):
        q = q / q.sum(1, keepdims=True)
        q = q / q.sum(0, keepdims=True)
    q = q / q.sum(1, keepdims=True)
    share = sigma(h) if k == 1 else softmax(h)
    return by_token(q, lambda n, c: share[n, c], k)


def grouped(scores, groups, kept):
    out = np.full_like(scores, -np.inf)
    size = scores.shape[1] // groups
    for n, row in enumerate(scores):
        total = [np.sort(row[g * size : (g + 1) * size])[-2:].sum() for g in range(groups)]
        for g in largest(np.array(total), kept):
            out[n, g * size : (g + 1) * size] = row[g * size : (g + 1) * size]
    return out


def group_limited(p, x, k=2, groups=3, kept=2):
    h = x @ p["weight"].T
    share = softmax(h)
    return by_token(grouped(share, groups, kept), lambda n, c: softmax(h[n, c]), k)


def biased(p, x, k=2, groups=3, kept=2, scale=2.5):
    s = sigma(x @ p["weight"].T)
    open_ = grouped(s + p["bias"], groups, kept)
    return by_token(open_, lambda n, c: scale * s[n, c] / s[n, c].sum(), k)


def expert_choice(p, x, factor=2, over="experts"):
    h = x @ p["weight"].T
    share = softmax(h)
    size = min(len(x), int(np.ceil(factor * len(x) / h.shape[1])))
    out = np.zeros_like(h)
    for e in range(h.shape[1]):
        chosen = largest(share[:, e] if over == "experts" else h[:, e], size)
        out[chosen, e] = share[chosen, e] if over == "experts" else softmax(h[chosen, e])
    return out


def soft(p, x, normalise=False):
    """Dispatch and combine, [T, E, C], of one sequence."""
    phi = p["weight"]
    if normalise:
        x, phi = unit(x), unit(phi) * p["scale"]
    z = np.einsum("td,ecd->tec", x, phi)
    return softmax(z, 0), softmax(z.reshape(len(x), -1)).reshape(z.shape)


def drop(experts, weights, size, policy):
    """Which choices [N, k] are kept, and in which slot, one choice after the other."""
    n, k = experts.shape
    choices = [(j, t) for j in range(k) for t in range(n)]
    if policy == "probability":
        choices.sort(key=lambda c: -weights[c[1], c[0]])
    if policy == "priority":
        choices.sort(key=lambda c: (c[0], -weights[c[1]].max()))
    taken, slot = {}, np.full((n, k), -1)
    for j, t in choices:
        e = int(experts[t, j])
        if taken.get(e, 0) < size:
            slot[t, j] = taken.get(e, 0)
            taken[e] = taken.get(e, 0) + 1
    return slot


def silu(x):
    return x * sigma(x)


def gelu_new(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def swiglu(p, e, rows):
    return (silu(rows @ p["gate"][e]) * (rows @ p["up"][e])) @ p["down"][e]


def gpt(p, e, rows):
    return gelu_new(rows @ p["up"][e] + p["up_bias"][e]) @ p["down"][e] + p["down_bias"][e]


def weighted(weights, params, rows, ffn=swiglu):
    """Σ_e w_ne · expert_e(x_n): every expert on every token."""
    return sum(weights[:, e, None] * ffn(params, e, rows) for e in range(weights.shape[1]))


def slope(f, x, step=1e-6):
    """Central differences of a scalar function."""
    out = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += step
        down[i] -= step
        out[i] = (f(up) - f(down)) / (2 * step)
    return out
