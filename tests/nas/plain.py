"""Networks of one architecture in plain NumPy: no masks, no padding, every layer of its own size.

Each function reads the weights that the layer needs out of the shared parameters and notes them in
`used`, so that counting parameters is adding up sizes.
"""

import numpy as np
from scipy.special import erf

from jaxsys.nas import darts, nb101


class Weights:
    """Note what is used."""

    def __init__(self, norm=True):
        self.norm = norm
        self.used = []

    def take(self, array):
        self.used.append(array)
        return array

    def count(self, dimensions=1):
        return sum(a.size for a in self.used if a.ndim >= dimensions)

    def conv(self, x, w, stride=1):
        """Convolve; a matrix is a 1×1 kernel."""
        w = self.take(w)
        w = w if w.ndim == 4 else w[None, None]
        y, _ = _taps(x, w, stride, 1, lambda part, tap: part @ tap)
        return y

    def depthwise(self, x, w, stride, dilation):
        y, _ = _taps(x, self.take(w), stride, dilation, lambda part, tap: part * tap)
        return y

    def batch_norm(self, x, scale, bias):
        scale, bias = self.take(scale), self.take(bias)
        if not self.norm:
            return x
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    def layer_norm(self, x, scale, bias):
        scale, bias = self.take(scale), self.take(bias)
        if not self.norm:
            return x
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    def linear(self, x, w, bias):
        w, bias = self.take(w), self.take(bias)
        return x @ w + (bias if self.norm else 0)


def _taps(x, w, stride, dilation, product):
    reach = dilation * (w.shape[0] // 2)
    padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    rows, columns = x.shape[1:3]
    total = 0
    for i in range(w.shape[0]):
        for j in range(w.shape[1]):
            part = padded[:, i * dilation :, j * dilation :][:, :rows:stride, :columns:stride]
            total = total + product(part, w[i, j])
    return total, padded


def relu(x):
    return np.maximum(x, 0)


def pool(x, size, stride, reduce):
    """Reduce each window over the pixels that exist; windows of 3 are centred."""
    before = (size - 1) // 2
    rows, columns = x.shape[1:3]
    out = np.zeros((x.shape[0], rows // stride, columns // stride, x.shape[3]))
    for i in range(0, rows, stride):
        for j in range(0, columns, stride):
            window = x[
                :,
                max(i - before, 0) : i - before + size,
                max(j - before, 0) : j - before + size,
            ]
            out[:, i // stride, j // stride] = reduce(window, (1, 2))
    return out


def channels_of(matrix, total):
    """Divide channels among vertices by the benchmark's description."""
    last = len(matrix) - 1
    direct = [v for v in range(1, last) if matrix[v][last]]
    own = {}
    for place, v in enumerate(direct):
        own[v] = total // len(direct) + (place < total % len(direct))
    for v in reversed(range(1, last)):
        if v not in own:
            own[v] = max(own[u] for u in range(v + 1, last) if matrix[v][u])
    return own


def nas_bench_101(p, arch, x, weights):
    def conv_norm_relu(x, w, q):
        n = w.shape[-1]
        y = weights.conv(x, w)
        return relu(weights.batch_norm(y, q["scale"][:n], q["bias"][:n]))

    matrix, names = nb101.decode(arch)
    last = len(names) - 1
    x = conv_norm_relu(x, p["stem"]["w"], p["stem"])
    for s in range(3):
        x = pool(x, 2, 2, np.max) if s else x
        stack = p["stacks"][str(s)]
        wide = stack["w1"].shape[-1]
        own = channels_of(matrix, wide)
        for n in range(len(stack["w1"])):
            c_in = x.shape[-1]

            def norms(kind, place, n=n, stack=stack):
                return {k: v[n, place] for k, v in stack[kind].items()}

            values = {}
            for v in range(1, last):
                c, place = own[v], v - 1
                parts = [values[u][..., :c] for u in range(1, v) if matrix[u][v]]
                if matrix[0][v]:
                    w = stack["wp"][n, place][:c_in, :c]
                    parts.append(conv_norm_relu(x, w, norms("project", place)))
                h = sum(parts)
                if names[v] == "maxpool3x3":
                    values[v] = pool(h, 3, 1, np.max)
                else:
                    w = stack["w3" if "3x3" in names[v] else "w1"][n, place][..., :c, :c]
                    values[v] = conv_norm_relu(h, w, norms("op", place))
            joined = [values[v] for v in range(1, last) if matrix[v][last]]
            out = np.concatenate(joined, -1) if joined else 0
            if matrix[0][last]:
                out = out + conv_norm_relu(x, stack["wp"][n, 5][:c_in], norms("project", 5))
            x = out
    return weights.linear(x.mean((1, 2)), p["head"]["w"], p["head"]["bias"])


def _halved(x, w, real, weights):
    """Halve the image: even pixels through one half of the outputs, odd through the other."""
    side, half = w.shape[0] // 2, w.shape[1] // 2
    even = weights.conv(relu(x)[:, ::2, ::2], w[:real, :half])
    odd = weights.conv(relu(x)[:, 1::2, 1::2], w[side : side + real, half:])
    return np.concatenate([even, odd], -1)


def darts_edge(op, x, p, stride, weights):
    def half(x, k, size, stride, dilation):
        w = p["dw" + k] if size == 5 else p["dw" + k][1:4, 1:4]
        y = weights.depthwise(relu(x), w, stride, dilation)
        return weights.batch_norm(weights.conv(y, p["pw" + k]), **p["n" + k])

    name = darts.OPERATIONS[op]
    if name == "none":
        return 0 * x[:, ::stride, ::stride]
    if "pool" in name:
        return pool(x, 3, stride, np.max if "max" in name else np.mean)
    if name == "skip_connect":
        if stride == 1:
            return x
        twice = np.concatenate([p["pw1"], p["pw1"]])  # rows for even and for odd pixels
        return weights.batch_norm(_halved(x, twice, x.shape[-1], weights), **p["n1"])
    size = int(name[-1])
    if "dil" in name:
        return half(x, "1", size, stride, 2)
    return half(half(x, "1", size, stride, 1), "2", size, 1, 1)


def darts_network(p, arch, x, weights, cells):
    c = p["stem"]["w"].shape[-1] // 3
    s1 = weights.batch_norm(weights.conv(x, p["stem"]["w"]), p["stem"]["scale"], p["stem"]["bias"])
    s0, halve = s1, False
    runs = [own for own in p["groups"].values() for _ in range(len(own["pre"]))]
    places = [i for own in p["groups"].values() for i in range(len(own["pre"]))]
    for i in range(cells):
        reduces = i in (cells // 3, 2 * cells // 3)
        c = 2 * c if reduces else c
        own, place = runs[i], places[i]
        q = {k: own[k][place] for k in ("pre", "dw1", "pw1", "dw2", "pw2")}
        norms = {
            k: [{m: v[place, e] for m, v in own[k].items()} for e in range(len(own[k]["bias"][0]))]
            for k in ("n0", "n1", "n2")
        }
        if halve:
            a = _halved(s0, q["pre"][0], s0.shape[-1], weights)
        else:
            a = weights.conv(relu(s0), q["pre"][0][: s0.shape[-1]])
        b = weights.conv(relu(s1), q["pre"][1][: s1.shape[-1]])
        states = [weights.batch_norm(v, **norms["n0"][k]) for k, v in enumerate((a, b))]
        edges = arch[int(reduces)]
        for step in range(4):
            total = 0
            for e in (2 * step, 2 * step + 1):
                op, source = edges[e]
                mine = {k: q[k][e] for k in ("dw1", "pw1", "dw2", "pw2")}
                mine |= {k: norms[k][e] for k in ("n1", "n2")}
                stride = 2 if reduces and source < 2 else 1
                total = total + darts_edge(op, states[source], mine, stride, weights)
            states.append(total)
        s0, s1, halve = s1, np.concatenate(states[2:], -1), reduces
    return weights.linear(s1.mean((1, 2)), p["head"]["w"], p["head"]["bias"])


def transformer(p, arch, x, weights, config):
    width, depth = int(arch[0]), int(arch[1])
    heads = arch[2 : 2 + config.layers]
    hidden = arch[2 + config.layers :]
    b, size, c = x.shape[0], config.patch, config.head_width
    grid = [
        x[:, i : i + size, j : j + size].reshape(b, -1)
        for i in range(0, x.shape[1], size)
        for j in range(0, x.shape[2], size)
    ]
    patches = p["patches"]
    x = weights.linear(np.stack(grid, 1), patches["w"][:, :width], patches["bias"][:width])
    whole = patches["w"].shape[1]
    if weights.norm:
        for t in range(x.shape[1]):
            for i in range(width):
                angle = t / 10_000 ** (2 * (i // 2) / whole)
                x[:, t, i] += np.cos(angle) if i % 2 else np.sin(angle)
    for n in range(depth):
        h, f = int(heads[n]), int(hidden[n])
        own = {k: {m: v[n] for m, v in q.items()} for k, q in p["layers"].items()}
        y = weights.layer_norm(x, *(own["ln1"][k][:width] for k in ("scale", "bias")))
        parts = []
        for w, bias in zip(
            np.split(own["qkv"]["w"], 3, 1), np.split(own["qkv"]["bias"], 3), strict=True
        ):
            parts.append(weights.linear(y, w[:width, : h * c], bias[: h * c]))
        mixed = []
        for q, k, v in zip(*(np.split(part, h, -1) for part in parts), strict=True):
            score = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(c)) if weights.norm else np.ones(1)
            share = np.broadcast_to(score, (b, x.shape[1], x.shape[1]))
            mixed.append(share / share.sum(-1, keepdims=True) @ v)
        y = np.concatenate(mixed, -1)
        x = x + weights.linear(
            y, own["project"]["w"][: h * c, :width], own["project"]["bias"][:width]
        )
        y = weights.layer_norm(x, *(own["ln2"][k][:width] for k in ("scale", "bias")))
        y = weights.linear(y, own["fc1"]["w"][:width, :f], own["fc1"]["bias"][:f])
        y = y * (1 + erf(y / np.sqrt(2))) / 2 if weights.norm else relu(y)
        x = x + weights.linear(y, own["fc2"]["w"][:f, :width], own["fc2"]["bias"][:width])
    x = weights.layer_norm(x, *(p["last"][k][:width] for k in ("scale", "bias")))
    return weights.linear(x.mean(1), p["head"]["w"][:width], p["head"]["bias"])
