"""DA4LG: a frozen vision encoder beside one that adapts to the domain, and three tasks.

    f_v = E_vision(v),  f_d = E_domain(v),  f_l = E_lang(l)
    s_j = MLP( pool(RW(f_d^j)), pool(f_v^j), f_l )

E_vision and E_lang are frozen; E_domain (the domain-specific encoder, DSE) starts as E_vision and
learns low-rank adapters only. In training, a contrastive (VLC) and a captioning task (VGC) are
added to grounding (LGR); inference uses the score alone.

Reconstruction: the paper's abstract, a review of it and the leaderboard could be read, its tables
and settings could not. Established are the encoders, the form of the score, what RW is for, and the
three tasks. Rank, temperature, pooling of both encoders, the head's sizes and the weights of the
losses are chosen here, each an option.

Axes: ``B`` rows, ``K`` candidates, ``V`` views, ``D`` image width, ``L`` text width.

Reference: arXiv 2407.02846.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxsys.core.errors import UserError
from jaxsys.ground import losses, views
from jaxsys.ground.caption import Captioner
from jaxsys.ground.contract import Batch, Grounder, keys_for, stateless
from jaxsys.ground.layers import Mlp
from jaxsys.ground.match import beside, need
from jaxsys.models import lora
from jaxsys.models.encoder import unit

Domain = Literal["lora", "full", "frozen", "none", "residual"]
Encode = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Da4lgConfig:
    """Describe DA4LG; every ablation is an option.

    Attributes:
        width: D.
        text_width: L. Where it is not D, cosines are taken between learned projections.
        domain: E_domain is E_vision with ``lora`` adapters; a copy trained in ``full``; E_vision
            itself (``frozen``); left out (``none``: the head sees f_v and f_l only, without RW); or
            ``residual``, f_v + MLP(f_v), for features without an encoder (a variant of ours).
        rank: r of the adapters.
        alpha: α.
        patterns: globs over the paths of the vision encoder's matrices that are adapted; the
            default is the query and value projections of CLIP.
        weighting: RW.
        temperature: τ_w of RW.
        pooling: of views; ``one`` is the single-view setting: a view is drawn before encoding.
        hidden: of the score head.
        dropout: rate in it.
        grounding: ``bce`` (the paper's) or ``ce`` (SNARE's, smoothed by 0.1).
        contrast: λ_c; 0 leaves VLC out.
        caption: λ_g; VGC needs a captioner.
        shared: width of the space in which VLC compares.

    Raises:
        UserError: for an unknown domain, or a temperature that is not positive.

    >>> Da4lgConfig().rank, Da4lgConfig().contrast
    (8, 0.1)
    """

    width: int = 512
    text_width: int = 512
    domain: Domain = "lora"
    rank: int = 8
    alpha: float = 16.0
    patterns: tuple[str, ...] = ("*q_proj.weight", "*v_proj.weight")
    weighting: views.Weighting = "softmax"
    temperature: float = 0.1
    pooling: views.Pooling = "max"
    hidden: tuple[int, ...] = (512, 256)
    dropout: float = 0.1
    grounding: Literal["bce", "ce"] = "bce"
    contrast: float = 0.1
    caption: float = 0.1
    shared: int = 512

    def __post_init__(self) -> None:
        if self.domain not in get_args(Domain):
            raise UserError(
                f"domain is {self.domain!r}; expected one of {', '.join(get_args(Domain))}; "
                "correct the name"
            )
        if self.temperature <= 0:
            raise UserError(
                f"temperature is {self.temperature}; expected more than 0, for cosines are divided "
                "by it; raise it"
            )


class Seen(NamedTuple):
    """Hold what both encoders see.

    Attributes:
        vision: f_v, [B, K, V, D].
        domain: f_d, [B, K, V, D]; f_v itself where there is no other encoder.
        mask: [B, K, V]; False where a view is missing.

    >>> Seen(jnp.ones((1, 2, 3, 4)), jnp.ones((1, 2, 3, 4)), jnp.ones((1, 2, 3), bool)).mask.shape
    (1, 2, 3)
    """

    vision: Float[Array, "B K V D"]
    domain: Float[Array, "B K V D"]
    mask: Bool[Array, "B K V"]


class _Heads(nnx.Module):
    """All of DA4LG that is neither an encoder nor a language model."""

    def __init__(self, config: Da4lgConfig, captioner: Captioner | None, *, rngs: nnx.Rngs):
        d, text = config.width, config.text_width
        images = d if config.domain == "none" else 2 * d
        self.score = Mlp((images + text, *config.hidden, 1), config.dropout, rngs=rngs)
        self.compares = config.contrast > 0 or (d != text and config.domain != "none")
        if self.compares:
            self.image = nnx.Linear(d, config.shared, use_bias=False, rngs=rngs)
            self.text = nnx.Linear(text, config.shared, use_bias=False, rngs=rngs)
        if config.contrast > 0:
            self.log_scale = nnx.Param(jnp.float32(math.log(1 / 0.07)))
        if config.domain == "residual":
            self.narrow = nnx.Linear(d, max(d // 4, 1), rngs=rngs)
            zeros = nnx.initializers.zeros
            self.widen = nnx.Linear(max(d // 4, 1), d, kernel_init=zeros, rngs=rngs)
        if captioner is not None:
            prefix = captioner.length * captioner.width
            self.inner = nnx.Linear(d, max(prefix // 2, 1), rngs=rngs)
            self.prefix = nnx.Linear(max(prefix // 2, 1), prefix, rngs=rngs)


def da4lg(
    config: Da4lgConfig,
    encode: Encode | None = None,
    captioner: Captioner | None = None,
    *,
    axis_name: str | None = None,
) -> Grounder:
    """Make DA4LG over any vision encoder.

    Its trainable parameters are ``heads``, ``domain`` (adapters, or a copy of the encoder) and
    ``captioner`` (if that is trained); the frozen ones are ``vision`` and ``captioner``.

    Args:
        config: sizes, and what is left out.
        encode: (parameters, [N, ...]) -> [N, D], the vision encoder; it computes through
            `jaxsys.models.lora` where weights have adapters. Without one, `Batch.views` must hold
            f_v and ``domain`` be ``frozen``, ``none`` or ``residual``.
        captioner: the language model of VGC; without one the task is left out.
        axis_name: mapped axis whose devices share VLC's negatives.

    Returns:
        A grounder. Batches need `pixels` where there is an adapted encoder; f_v is taken from
        `views` where it is given. Its loss also needs `answer`, with VLC `objects` and `texts`, and
        with VGC `tokens` and `token_mask`.

    Raises:
        UserError: for an adapted domain without an encoder.

    Reference: arXiv 2407.02846.

    >>> config = Da4lgConfig(4, 4, "residual", hidden=(8,), contrast=0.0)
    >>> model, batch = da4lg(config), Batch(jnp.ones((2, 4)), jnp.ones((2, 3, 6), bool))
    >>> batch, key = batch._replace(views=jnp.ones((2, 3, 6, 4))), jax.random.key(0)
    >>> jax.eval_shape(lambda: model.scores(model.init(key, {}), {}, batch)).shape
    (2, 3)
    """
    if encode is None and config.domain in ("lora", "full"):
        raise UserError(
            f"domain is {config.domain!r} and there is no encoder to adapt; expected one; pass "
            "encode, or choose domain='residual' for features that are fixed"
        )
    graphdef, init_heads = stateless(lambda rngs: _Heads(config, captioner, rngs=rngs))

    def init(key: Any, frozen: Any) -> Any:
        keys = jax.random.split(key, 3)
        trainable: dict[str, Any] = {"heads": init_heads(keys[0])}
        if config.domain == "lora":
            trainable["domain"] = lora.init(
                keys[1], frozen["vision"], config.patterns, rank=config.rank, alpha=config.alpha
            )
        elif config.domain == "full":
            # A copy: a training step may give its buffers away while the frozen ones live on.
            trainable["domain"] = jax.tree.map(lambda x: jnp.array(x, copy=True), frozen["vision"])
        if captioner is not None and captioner.init is not None:
            trainable["captioner"] = captioner.init(keys[2])
        return trainable

    def scores(
        trainable: Any, frozen: Any, batch: Batch, *, key: Any = None, train: bool = False
    ) -> Float[Array, "B K"]:
        return _score(config, graphdef, encode, trainable, frozen, batch, key, train)[0]

    def loss(trainable: Any, frozen: Any, batch: Batch, *, key: Any) -> tuple[Array, dict]:
        found, pooled = _score(config, graphdef, encode, trainable, frozen, batch, key, True)
        grounding = losses.lgr_bce if config.grounding == "bce" else losses.lgr_ce
        contrast = caption = 0.0
        heads = nnx.merge(graphdef, trainable["heads"])
        if config.contrast > 0:
            contrast = _contrast(heads, pooled, batch, axis_name)
        if captioner is not None and config.caption > 0:
            owner = frozen if captioner.init is None else trainable
            caption = _caption(heads, captioner, owner["captioner"], pooled, batch)
        return losses.total(
            grounding(found, need(batch.answer, "answer")),
            contrast,
            caption,
            contrast_weight=config.contrast,
            caption_weight=config.caption,
        )

    return Grounder(init, scores, loss)


def look(
    config: Da4lgConfig,
    encode: Encode | None,
    trainable: Mapping[str, Any],
    frozen: Mapping[str, Any],
    batch: Batch,
    key: Any = None,
    residual: Callable[[Any], Any] | None = None,
) -> Seen:
    """Run both encoders over the views, only those drawn where the pooling is random.

    Args:
        config: as `da4lg` has it.
        encode: the vision encoder.
        trainable: with ``domain`` where the encoder is adapted.
        frozen: with ``vision`` where there is an encoder.
        batch: with `pixels` or `views`.
        key: for random views.
        residual: what ``residual`` adds to f_v.

    Raises:
        UserError: for a batch that lacks what the encoders read.

    >>> batch = Batch(jnp.ones((1, 4)), jnp.ones((1, 2, 3), bool), jnp.ones((1, 2, 3, 4)))
    >>> look(Da4lgConfig(4, 4, "frozen"), None, {}, {}, batch).domain.shape
    (1, 2, 3, 4)
    """
    mask = jnp.asarray(batch.mask)
    parts = {"views": batch.views, "pixels": batch.pixels}
    drawn = None
    if config.pooling in ("one", "two"):
        drawn = views.draw(mask, 1 if config.pooling == "one" else 2, key)
        parts = {
            name: part
            if part is None or (name == "pixels" and batch.places is not None)
            else views.take(jnp.asarray(part), drawn)
            for name, part in parts.items()
        }
        mask = jnp.take_along_axis(mask, drawn, 2)

    def run(params: Any) -> Array:
        pixels = jnp.asarray(need(parts["pixels"], "pixels"))
        assert encode is not None
        if batch.places is None:
            return encode(params, pixels.reshape(-1, *pixels.shape[3:])).reshape(*mask.shape, -1)
        each = encode(params, pixels.reshape(-1, *pixels.shape[2:]))
        found = each.reshape(*pixels.shape[:2], -1)[jnp.asarray(batch.places)]
        return found if drawn is None else views.take(found, drawn)

    if parts["views"] is not None:
        vision = jnp.asarray(parts["views"])
    elif encode is not None:
        vision = run(frozen["vision"])
    else:
        vision = jnp.asarray(need(None, "views"))
    if config.domain == "lora":
        domain = run(lora.apply(frozen["vision"], trainable["domain"]))
    elif config.domain == "full":
        domain = run(trainable["domain"])
    else:
        domain = vision if residual is None else vision + residual(vision)
    return Seen(vision, domain, mask)


def _score(
    config: Da4lgConfig,
    graphdef: Any,
    encode: Encode | None,
    trainable: Any,
    frozen: Any,
    batch: Batch,
    key: Any,
    train: bool,
) -> tuple[Float[Array, "B K"], Float[Array, "B K D"]]:
    """Give the scores, and f_d pooled without weights for the other tasks."""
    view_key, drop_key = keys_for(key, 2, train=train)
    heads = nnx.merge(graphdef, trainable["heads"])
    seen = look(config, encode, trainable, frozen, batch, view_key, _residual(config, heads))
    kind = "mean" if config.pooling == "mean" else "max"  # random views are drawn by now
    text = jnp.asarray(batch.text)
    images = unit(views.pool(seen.vision, seen.mask, kind))
    if config.domain != "none":
        weights = _weights(config, heads, seen, text)
        weighed = views.pool(weights[..., None] * seen.domain, seen.mask, kind)
        images = jnp.concatenate([unit(weighed), images], -1)
    found = heads.score(beside(images, unit(text)), drop_key if train else None)[..., 0]
    return found, views.pool(seen.domain, seen.mask, kind)


def _residual(config: Da4lgConfig, heads: Any) -> Callable[[Any], Any] | None:
    if config.domain != "residual":
        return None
    return lambda x: heads.widen(jax.nn.gelu(heads.narrow(x)))


def _weights(config: Da4lgConfig, heads: Any, seen: Seen, text: Array) -> Float[Array, "B K V"]:
    """Give RW's weights; where widths differ, cosines are of learned projections."""
    alike = config.width == config.text_width
    return views.weights(
        seen.domain if alike else heads.image(seen.domain),
        text if alike else heads.text(text),
        seen.mask,
        config.weighting,
        config.temperature,
    )


def view_weights(
    config: Da4lgConfig,
    encode: Encode | None,
    trainable: Mapping[str, Any],
    frozen: Mapping[str, Any],
    batch: Batch,
    captioner: Captioner | None = None,
) -> Float[Array, "B K V"]:
    """Show how RW weighs each view for its description, for pictures and reports.

    Args:
        config: as `da4lg` has it, with pooling ``max`` or ``mean``, and a domain encoder.
        encode: the vision encoder.
        trainable: parameters.
        frozen: parameters.
        batch: as for `Grounder.scores`.
        captioner: the one that the parameters were made with.

    Raises:
        UserError: for a grounder that weighs no views.

    >>> config = Da4lgConfig(4, 4, "frozen", hidden=(8,), contrast=0.0)
    >>> batch = Batch(jnp.ones((1, 4)), jnp.ones((1, 2, 3), bool), jnp.ones((1, 2, 3, 4)))
    >>> init = lambda: da4lg(config).init(jax.random.key(0), {})
    >>> jax.eval_shape(lambda: view_weights(config, None, init(), {}, batch)).shape
    (1, 2, 3)
    """
    if config.domain == "none" or config.pooling in ("one", "two"):
        raise UserError(
            f"domain is {config.domain!r} and pooling {config.pooling!r}; expected a domain "
            "encoder and all views, or nothing weighs them; choose other settings"
        )
    graphdef, _ = stateless(lambda rngs: _Heads(config, captioner, rngs=rngs))
    heads = nnx.merge(graphdef, trainable["heads"])
    residual = _residual(config, heads)
    seen = look(config, encode, trainable, frozen, batch, residual=residual)
    return _weights(config, heads, seen, jnp.asarray(batch.text))


def _contrast(heads: Any, pooled: Array, batch: Batch, axis_name: str | None) -> Array:
    """Give VLC: the meant object's pooled f_d against texts, its distractors hard negatives."""
    n_candidates = pooled.shape[1]
    answer = jnp.asarray(need(batch.answer, "answer"))
    objects = jnp.asarray(need(batch.objects, "objects"))
    others = (answer[:, None] + jnp.arange(1, n_candidates)[None]) % n_candidates
    images = heads.image(pooled)
    return losses.vlc(
        jnp.take_along_axis(images, answer[:, None, None], 1)[:, 0],
        heads.text(jnp.asarray(batch.text)),
        heads.log_scale[...],
        jnp.take_along_axis(objects, answer[:, None], 1)[:, 0],
        jnp.asarray(need(batch.texts, "texts")),
        jnp.take_along_axis(images, others[..., None], 1),
        axis_name=axis_name,
    )[0]


def _caption(
    heads: Any, captioner: Captioner, params: Any, pooled: Array, batch: Batch
) -> Float[Array, ""]:
    """Give VGC: the language model writes the description from the meant object's f_d."""
    answer = jnp.asarray(need(batch.answer, "answer"))
    meant = jnp.take_along_axis(pooled, answer[:, None, None], 1)[:, 0]
    prefix = heads.prefix(jnp.tanh(heads.inner(meant)))
    prefix = prefix.reshape(-1, captioner.length, captioner.width)
    tokens = jnp.asarray(need(batch.tokens, "tokens"))
    logits = captioner.logits(params, prefix, tokens)
    return losses.vgc(logits, tokens, jnp.asarray(need(batch.token_mask, "token_mask")))
