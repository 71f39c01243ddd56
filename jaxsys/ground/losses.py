"""The losses of DA4LG: grounding (LGR), contrast (VLC), captioning (VGC), and their sum.

Axes: ``B`` rows, ``K`` candidates, ``N`` distractors of a row, ``D`` width, ``T`` tokens, ``V``
pieces of the captioner's vocabulary.

Reference: arXiv 2407.02846.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from jaxsys.models.encoder import unit

_LARGEST_SCALE = 100.0  # CLIP's bound on 1/τ


class Contrast(NamedTuple):
    """Hold the parts of VLC.

    Attributes:
        image_to_text: L_v→l.
        text_to_image: L_l→v.
        masked: share of the in-batch negatives that were left out as false ones.

    >>> Contrast(1.0, 2.0, 0.0).masked
    0.0
    """

    image_to_text: Float[Array, ""] | float
    text_to_image: Float[Array, ""] | float
    masked: Float[Array, ""] | float


def lgr_bce(scores: Float[Array, "B K"], answer: Integer[Array, "B"]) -> Float[Array, ""]:
    """Average DA4LG's grounding loss: is this candidate the one that is meant?

        L_LG = −(1/K) Σ_j [ y_j log σ(s_j) + (1 − y_j) log(1 − σ(s_j)) ]

    Args:
        scores: s.
        answer: the place where y is 1.

    Reference: arXiv 2407.02846.

    >>> round(float(lgr_bce(jnp.zeros((1, 2)), jnp.array([0]))), 4)
    0.6931
    """
    labels = jax.nn.one_hot(answer, scores.shape[1], dtype=scores.dtype)
    return jnp.mean(optax.sigmoid_binary_cross_entropy(scores, labels))


def lgr_ce(
    scores: Float[Array, "B K"], answer: Integer[Array, "B"], smoothing: float = 0.1
) -> Float[Array, ""]:
    """Average SNARE's grounding loss: cross entropy with smoothed labels.

        L = −Σ_j q_j log softmax(s)_j,    q = (1 − α)·onehot + α/K

    Args:
        scores: s.
        answer: the candidate that is meant.
        smoothing: α; for two candidates 0.1 gives targets 0.95 and 0.05.

    Reference: arXiv 2107.12514, whose code takes it from ShapeGlot (arXiv 1905.02925).

    >>> round(float(lgr_ce(jnp.zeros((1, 2)), jnp.array([0]))), 4)
    0.6931
    """
    n_candidates = scores.shape[1]
    hot = jax.nn.one_hot(answer, n_candidates, dtype=scores.dtype)
    target = (1 - smoothing) * hot + smoothing / n_candidates
    return -jnp.mean(jnp.sum(target * jax.nn.log_softmax(scores, -1), -1))


def vlc(
    images: Float[Array, "B D"],
    texts: Float[Array, "B D"],
    log_scale: Float[Array, ""],
    objects: Integer[Array, "B"],
    text_numbers: Integer[Array, "B"],
    distractors: Float[Array, "B N D"] | None = None,
    *,
    axis_name: str | None = None,
) -> tuple[Float[Array, ""], Contrast]:
    """Contrast the meant objects with the texts, in both directions.

        L_v→l = −mean_i log( e^{z_i·t_i/τ} / Σ_m e^{z_i·t_m/τ} ),    L_VLC = ½ (L_v→l + L_l→v)

    and L_l→v likewise over all z_m and the row's own distractors z_i⁻, the hard negatives. A column
    m ≠ i of the same object or of the same text as row i is left out of both sums: the same object
    is described several times, so it is no negative.

    Reconstruction: known is one positive against several negatives; the symmetric form, the hard
    negatives and the mask are chosen here.

    Args:
        images: vectors of the meant objects; normalised here to z.
        texts: of the descriptions; normalised here to t.
        log_scale: log(1/τ), learned; 1/τ is at most 100.
        objects: the meant objects' numbers.
        text_numbers: the texts' numbers.
        distractors: vectors of each row's other candidates.
        axis_name: mapped axis (`jax.vmap`, `jax.pmap`, `jax.shard_map`) over whose devices the
            columns are gathered; each device's loss is then over its own rows, so average losses
            and gradients over the axis.

    Returns:
        The loss and its parts.

    Reference: arXiv 2407.02846.

    >>> eye, rows = jnp.eye(2), jnp.arange(2)
    >>> loss, parts = vlc(eye, eye, jnp.float32(0.0), rows, rows)
    >>> round(float(loss), 4), float(parts.masked)
    (0.3133, 0.0)
    """
    z, t = unit(images), unit(texts)
    all_z, all_t, all_objects, all_numbers = z, t, objects, text_numbers
    start = 0
    if axis_name is not None:
        all_z, all_t, all_objects, all_numbers = (
            lax.all_gather(x, axis_name, tiled=True) for x in (z, t, objects, text_numbers)
        )
        start = lax.axis_index(axis_name) * z.shape[0]
    own = jnp.arange(all_z.shape[0])[None] == start + jnp.arange(z.shape[0])[:, None]
    same = objects[:, None] == all_objects[None]
    same |= text_numbers[:, None] == all_numbers[None]
    keep = own | ~same
    scale = jnp.minimum(jnp.exp(log_scale), _LARGEST_SCALE)
    positive = scale * jnp.einsum("BD,BD->B", z, t)
    to_text = jnp.where(keep, scale * jnp.einsum("BD,MD->BM", z, all_t), -jnp.inf)
    to_image = jnp.where(keep, scale * jnp.einsum("BD,MD->BM", t, all_z), -jnp.inf)
    if distractors is not None:
        hard = scale * jnp.einsum("BD,BND->BN", t, unit(distractors))
        to_image = jnp.concatenate([to_image, hard], 1)
    forward = jnp.mean(jax.nn.logsumexp(to_text, 1) - positive)
    back = jnp.mean(jax.nn.logsumexp(to_image, 1) - positive)
    masked = jnp.sum(~keep) / jnp.maximum(jnp.sum(~own), 1)
    return 0.5 * (forward + back), Contrast(forward, back, masked)


def vgc(
    logits: Float[Array, "B T V"], tokens: Integer[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Average the captioner's cross entropy over the tokens of each description.

        L_VGC = −(1/T) Σ_t log p(w_t | p, w_{<t})

    Args:
        logits: at the places that predict each token.
        tokens: w.
        mask: False where a row has no token; a row without any is left out.

    Returns:
        Nats per token: the mean over rows of each row's mean.

    Reference: arXiv 2407.02846.

    >>> round(float(vgc(jnp.zeros((1, 2, 8)), jnp.zeros((1, 2), int), jnp.ones((1, 2), bool))), 4)
    2.0794
    """
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
    counts = jnp.sum(mask, 1)
    rows = jnp.sum(jnp.where(mask, nats, 0.0), 1) / jnp.maximum(counts, 1)
    return jnp.sum(rows) / jnp.maximum(jnp.sum(counts > 0), 1)


def total(
    grounding: Float[Array, ""],
    contrast: Float[Array, ""] | float = 0.0,
    caption: Float[Array, ""] | float = 0.0,
    *,
    contrast_weight: float = 0.1,
    caption_weight: float = 0.1,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Add the three losses: L = L_LG + λ_c L_VLC + λ_g L_VGC.

    Reconstruction: the paper's weights were not read; λ_c = λ_g = 0.1 are chosen here.

    Args:
        grounding: L_LG.
        contrast: L_VLC.
        caption: L_VGC.
        contrast_weight: λ_c.
        caption_weight: λ_g.

    Returns:
        L, and the parts as they are before weighting.

    Reference: arXiv 2407.02846.

    >>> loss, parts = total(jnp.float32(1.0), jnp.float32(2.0), jnp.float32(3.0))
    >>> float(loss), float(parts["caption"])
    (1.5, 3.0)
    """
    loss = grounding + contrast_weight * contrast + caption_weight * caption
    parts = {"grounding": grounding, "contrast": contrast, "caption": caption}
    return loss, {name: jnp.asarray(part) for name, part in parts.items()}
