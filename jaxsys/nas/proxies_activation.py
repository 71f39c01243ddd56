"""Zero-cost proxies from activations and from gradients with respect to the input.

Same signature as in `proxies`. jacob_cov and epe_nas look at the input alone and have no parts.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsys.core.tree import path_key
from jaxsys.nas.model import Model, masked, needs
from jaxsys.nas.proxies import Score

_K = 1e-5


def _correlation(rows: Float[Array, "N D"]) -> Float[Array, "N N"]:
    """Correlate rows; a constant row correlates with nothing, itself included."""
    centred = rows - jnp.mean(rows, 1, keepdims=True)
    norm = jnp.sqrt(jnp.sum(jnp.square(centred), 1, keepdims=True))
    unit = centred / jnp.where(norm > 0, norm, 1.0)
    return unit @ unit.T


def _input_gradient(model: Model, theta: Any, images: Any) -> Any:
    g = jax.grad(lambda x: jnp.sum(model.logits(theta, x)))(images)
    return g.reshape(images.shape[0], -1)


def jacob_cov(model: Model, theta: Any, images: Any, labels: Any, key: Any) -> Score:
    """Compute −Σ_i [ln(λ_i + k) + 1/(λ_i + k)], λ of the correlation of the input gradients.

    Reference: Mellor et al., arXiv 2006.04647v1; k = 1e-5.

    >>> from jaxsys.nas.model import any_model
    >>> m = any_model(lambda k: jnp.eye(3), lambda p, x: jnp.sin(x @ p))
    >>> x = jnp.arange(6.0).reshape(2, 3)
    >>> bool(jnp.isfinite(jacob_cov(m, jnp.eye(3), x, None, None).total))
    True
    """
    values = jnp.linalg.eigvalsh(_correlation(_input_gradient(model, theta, images)))
    # Rounding can make the smallest eigenvalue of a singular matrix negative, and 1/(λ + k) huge.
    shifted = jnp.maximum(values, 0.0) + _K
    return Score(-jnp.sum(jnp.log(shifted) + 1 / shifted), None)


def epe_nas(model: Model, theta: Any, images: Any, labels: Any, key: Any) -> Score:
    """Compute Σ_c |e_c|, e_c = Σ ln(|corr| + k) over the input gradients of one class.

    Reference: Lopes et al., arXiv 2102.08099; the form for at most 100 classes.

    >>> from jaxsys.nas.model import any_model
    >>> m = any_model(lambda k: jnp.eye(3), lambda p, x: jnp.sin(x @ p))
    >>> x, y = jnp.arange(12.0).reshape(4, 3), jnp.array([0, 0, 1, 1])
    >>> bool(epe_nas(m, jnp.eye(3), x, y, None).total > 0)
    True
    """
    logs = jnp.log(jnp.abs(_correlation(_input_gradient(model, theta, images))) + _K)
    same = labels[:, None] == labels[None, :]
    # Each class's sum, found once for each of its images and divided by how many they are.
    of_class = same.astype(logs.dtype)
    sums = jnp.einsum("ij,jk,ik->i", of_class, logs, of_class)
    return Score(jnp.sum(jnp.abs(sums) / jnp.sum(of_class, 1)), None)


def naswot(model: Model, theta: Any, images: Any, labels: Any, key: Any) -> Score:
    """Compute ln|det K|, K = Σ_ReLU (C Cᵀ + (1−C)(1−C)ᵀ), C the binary activation codes.

    A node's share is ln|det| of its own kernel with a ridge of 1e-3, since few units make it
    singular.

    Reference: Mellor et al., arXiv 2006.04647v3.

    >>> from jaxsys.nas.model import dense_model
    >>> m = dense_model()
    >>> x = jax.random.normal(jax.random.key(1), (2, 1, 1, 3))
    >>> bool(naswot(m, m.init(jax.random.key(0)), x, None, None).total > 0)
    True
    """
    eye = jnp.eye(images.shape[0])

    def kernel(x: Any, y: Any, site: Any) -> Any:
        codes = (x > 0).astype(jnp.float32).reshape(x.shape[0], -1) * float(site.relu)
        inverse = (1 - codes) * float(site.relu)
        if site.rectified is not None:
            there = jnp.broadcast_to(site.rectified, x.shape[1:]).reshape(1, -1)
            codes, inverse = codes * there, inverse * there
        return codes @ codes.T + inverse @ inverse.T

    kernels = needs(model, "forward", "naswot")(theta, images, observe=kernel).observed
    held = jnp.trace(kernels, axis1=1, axis2=2) > 0
    own = jnp.where(held[:, None, None], kernels + 1e-3 * eye[None], eye[None])
    return Score(jnp.linalg.slogdet(jnp.sum(kernels, 0))[1], jnp.linalg.slogdet(own)[1])


def zen(model: Model, theta: Any, images: Any, labels: Any, key: Any) -> Score:
    """Compute ln mean_n ‖f(x) − f(x + 0.01·ε)‖₁ + Σ_norm ln sqrt(mean variance).

    Weights and x are drawn from N(0, 1); f is the map before the mean over the image. The nodes
    hold the logarithms of the variances before normalisation; the first term is no layer's.
    Reconstruction: the published code reads running variances, here they are the batch's own, and
    the normalisation before the last ReLU is left out of the sum.

    Reference: Lin et al., arXiv 2102.01063.

    >>> from jaxsys.nas.model import dense_model
    >>> m = dense_model()
    >>> x, k = jnp.ones((4, 1, 1, 3)), jax.random.key(0)
    >>> bool(jnp.isfinite(zen(m, m.init(k), x, None, k).total))
    True
    """
    forward = needs(model, "forward", "zen")
    leaves, structure = jax.tree.flatten(theta)
    keys = jax.random.split(path_key(key, "zen"), len(leaves) + 2)
    drawn = [
        jax.random.normal(k, v.shape) if v.ndim >= 2 else v
        for k, v in zip(keys[2:], leaves, strict=True)
    ]
    gaussian = _keep_norms(structure.unflatten(drawn), theta)
    x = jax.random.normal(keys[0], images.shape)
    near = x + 0.01 * jax.random.normal(keys[1], images.shape)

    def variance(inputs: Any, y: Any, site: Any) -> Any:
        mean = jnp.mean(y, (0, 1, 2), keepdims=True)
        found = jnp.mean(jnp.square(y - mean)) if site.norm else jnp.ones(())
        if not site.norm or site.outputs is None:
            return found
        return found / jnp.maximum(jnp.mean(site.outputs), 1e-6)  # absent channels vary by 0

    def one(inputs: Any) -> Any:
        out = forward(gaussian, inputs, observe=variance)
        return jax.nn.relu(out.map), out.observed

    maps, observed = jax.lax.map(one, jnp.stack([x, near]))  # compiled once for both
    gap = jnp.sum(jnp.abs(maps[0] - maps[1]), (1, 2, 3))
    positive = model.present & (observed[0] > 0)
    logs = masked(0.5 * jnp.log(jnp.where(positive, observed[0], 1.0)), positive)
    return Score(jnp.log(jnp.mean(gap) + 1e-12) + jnp.sum(logs), logs)


def _keep_norms(drawn: Any, theta: Any) -> Any:
    """Take scales and biases, which stacks of cells make look like matrices, from `theta`."""

    def choose(path: Any, new: Any, old: Any) -> Any:
        return old if getattr(path[-1], "key", "") in ("scale", "bias") else new

    return jax.tree_util.tree_map_with_path(choose, drawn, theta)


def meco(model: Model, theta: Any, images: Any, labels: Any, key: Any) -> Score:
    """Compute Σ_layers λ_min of the correlation of a layer's output channels over the pixels.

    The input is one random image of 64×64. Reconstruction: the published code takes the output of
    every module; here it is that of every convolution, before normalisation.

    Reference: Jiang et al., MeCo, NeurIPS 2023.

    >>> from jaxsys.nas.model import dense_model
    >>> m = dense_model()
    >>> k = jax.random.key(0)
    >>> float(meco(m, m.init(k), jnp.ones((1, 1, 1, 3)), None, k).total) < 1
    True
    """
    x = jax.random.normal(path_key(key, "meco"), (1, 64, 64, images.shape[-1]))

    def smallest(inputs: Any, y: Any, site: Any) -> Any:
        if y.shape[1] == 1:
            return jnp.zeros(())
        correlation = _correlation(y[0].reshape(-1, y.shape[-1]).T)
        if site.outputs is not None:  # give absent channels eigenvalue 1, as large as the mean
            correlation = correlation + jnp.diag(1 - site.outputs)
        return jnp.linalg.eigvalsh(correlation)[0]

    nodes = needs(model, "forward", "meco")(theta, x, observe=smallest).observed
    return Score(jnp.sum(nodes), nodes)


def az_parts(model: Model, theta: Any, images: Any, labels: Any, key: Any) -> dict[str, Score]:
    """Compute AZ-NAS's expressivity, progressivity and trainability; nodes are blocks, not layers.

    Expressivity: Σ_l of the entropy of the normalised spectrum of the features' covariance.
    Progressivity: the smallest increment of that entropy from one block to the next.
    Trainability: mean_l (2 − σ − 1/(σ + 1e-6)), σ the largest singular value of the mean
    g_in·g_outᵀ for random ±1 g_out. `az_nas` joins them by rank.

    Reference: Lee and Ham, arXiv 2403.19232.

    >>> from jaxsys.nas.model import dense_model
    >>> m = dense_model()
    >>> k = jax.random.key(0)
    >>> x = jax.random.normal(k, (4, 1, 1, 3))
    >>> sorted(az_parts(m, m.init(k), x, None, k))
    ['az_expressivity', 'az_progressivity', 'az_trainability']
    """
    forward, pull = needs(model, "forward", "az_nas"), needs(model, "pull", "az_nas")
    features = forward(theta, images).features
    entropy = jnp.stack([_spectral_entropy(f.reshape(-1, f.shape[-1])) for f in features])
    there = jnp.ones(len(features), bool) if model.blocks is None else model.blocks
    entropy = masked(entropy, there)
    steps = jnp.where(there[1:], entropy[1:] - entropy[:-1], 0.0)
    keys = jax.random.split(path_key(key, "az"), len(features))
    signs = [
        jax.random.rademacher(k, f.shape, jnp.float32)
        for k, f in zip(keys[1:], features[1:], strict=True)
    ]
    scores = jnp.stack([_trainability(i, o) for o, i in pull(theta, features, signs)])
    scores = masked(scores, there[1:])
    smallest = jnp.min(jnp.where(there[1:], steps, jnp.inf))
    return {
        "az_expressivity": _summed(entropy),
        "az_progressivity": Score(smallest, steps),
        "az_trainability": Score(jnp.sum(scores) / jnp.sum(there[1:]), scores),
    }


def _summed(nodes: Any) -> Score:
    return Score(jnp.sum(nodes), nodes)


def _spectral_entropy(rows: Float[Array, "N C"]) -> Float[Array, ""]:
    centred = rows - jnp.mean(rows, 0, keepdims=True)
    values = jnp.maximum(jnp.linalg.eigvalsh(centred.T @ centred / rows.shape[0]), 0.0)
    share = values / jnp.maximum(jnp.sum(values), 1e-30)
    return -jnp.sum(share * jnp.log(share + 1e-8))


def _trainability(g_in: Any, g_out: Any) -> Any:
    factor = g_in.shape[1] // g_out.shape[1]
    if factor > 1:  # a block that halves the image: compare at its output's resolution
        n, y, x, c = g_in.shape
        g_in = g_in.reshape(n, y // factor, factor, x // factor, factor, c).mean((2, 4))
    rows_in, rows_out = (g.reshape(-1, g.shape[-1]) for g in (g_in, g_out))
    sigma = jnp.linalg.norm(rows_in.T @ rows_out / rows_in.shape[0], ord=2)
    return 2 - sigma - 1 / (sigma + 1e-6)


def az_nas(columns: Mapping[str, Any]) -> Float[Array, "N"]:
    """Join columns over N architectures by Σ ln(rank/N), rank N for the largest.

    Args:
      columns: `[N]` each: `az_expressivity`, `az_progressivity`, `az_trainability` and `flops`, or
        any others.

    Returns:
      One score for each architecture, 0 at most.

    >>> az_nas({"a": jnp.array([3.0, 1.0]), "b": jnp.array([5.0, 4.0])})[0].item()
    0.0
    """
    from scipy.stats import rankdata

    ranks = [rankdata(jnp.asarray(v)) / len(v) for v in columns.values()]
    return jnp.sum(jnp.log(jnp.stack([jnp.asarray(r) for r in ranks])), 0)
