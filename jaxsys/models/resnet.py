"""Residual networks as `flax.nnx` modules: a small one for small images, and the published ones.

Normalisation is over groups of channels, not over the batch: batch statistics would be state that
changes in the forward pass and would differ between replicas, while here ``loss(graphdef, params,
batch)`` stays a pure function of the parameters and one example does not influence another.

Axes: ``B`` batch, ``Y`` and ``X`` image rows and columns, ``C`` channels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Integer

from jaxsys.core.errors import UserError

Batch = tuple[Float[Array, "B Y X C"], Integer[Array, "B"]]
_GROUPS = 8  # Wu and He use 32 on networks four and more times as wide
_he_normal = nnx.initializers.he_normal()


@dataclass(frozen=True)
class ResNetConfig:
    """Describe a CIFAR-style ResNet: three stages, each twice as wide and half as high as the last.

    Its depth is 6 · ``blocks_per_stage`` + 2 weighted layers (He et al. 2015, section 4.2), so 3
    blocks make ResNet-20. Images are 32×32 in the paper; 8×8 leaves 2×2 in the last stage.

    Raises:
        UserError: for a width that the groups of the normalisation do not divide.

    >>> ResNetConfig(n_channels=3, blocks_per_stage=3).width
    16
    """

    n_channels: int = 1
    n_classes: int = 10
    width: int = 16
    blocks_per_stage: int = 1

    def __post_init__(self):
        if self.width < 1 or self.width % _GROUPS:
            raise UserError(
                f"width is {self.width}; the normalisation needs groups of equal size; choose a "
                f"multiple of {_GROUPS}"
            )
        if self.blocks_per_stage < 1:
            raise UserError(
                f"blocks_per_stage is {self.blocks_per_stage}; a stage has at least one; raise it"
            )


class Block(nnx.Module):
    """Two 3×3 convolutions and a way around them: relu(x' + norm(conv(relu(norm(conv(x)))))).

    The way around is the identity, or a 1×1 convolution where width or resolution change.

    >>> Block(8, 16, stride=2, rngs=nnx.Rngs(0))(jnp.zeros((1, 4, 4, 8))).shape
    (1, 2, 2, 16)
    """

    def __init__(self, width_in: int, width: int, stride: int, *, rngs: nnx.Rngs):
        self.conv1 = _conv(width_in, width, 3, stride, rngs)
        self.norm1 = nnx.GroupNorm(width, num_groups=_GROUPS, rngs=rngs)
        self.conv2 = _conv(width, width, 3, 1, rngs)
        self.norm2 = nnx.GroupNorm(width, num_groups=_GROUPS, rngs=rngs)
        if stride == 1 and width_in == width:
            self.shortcut = None
        else:
            self.shortcut = _conv(width_in, width, 1, stride, rngs)

    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B Y2 X2 C2"]:
        """Run the block."""
        inner = self.norm2(self.conv2(jax.nn.relu(self.norm1(self.conv1(x)))))
        return jax.nn.relu(inner + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nnx.Module):
    """A convolution, three stages of blocks, the mean over the image, one linear layer.

    Reference: He et al., arXiv 1512.03385; group normalisation: Wu and He, arXiv 1803.08494.

    >>> model = nnx.eval_shape(lambda: ResNet(ResNetConfig(), rngs=nnx.Rngs(0)))
    >>> len(model.blocks), model.head.kernel.shape
    (3, (64, 10))
    """

    def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs):
        self.stem = _conv(config.n_channels, config.width, 3, 1, rngs)
        self.norm = nnx.GroupNorm(config.width, num_groups=_GROUPS, rngs=rngs)
        blocks, width_in = [], config.width
        for stage in range(3):
            width = config.width * 2**stage
            for i in range(config.blocks_per_stage):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(Block(width_in, width, stride, rngs=rngs))
                width_in = width
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(width_in, config.n_classes, rngs=rngs)

    def __call__(self, images: Float[Array, "B Y X C"]) -> Float[Array, "B classes"]:
        """Compute class logits."""
        x = jax.nn.relu(self.norm(self.stem(images)))
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, axis=(1, 2)))


def _conv(width_in: int, width: int, size: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    # No bias: a normalisation brings its own.
    return nnx.Conv(
        width_in, width, (size, size), stride, use_bias=False, kernel_init=_he_normal, rngs=rngs
    )


@dataclass(frozen=True)
class DeepConfig:
    """Describe a ResNet of four stages as published for ImageNet (He et al. 2015, table 1).

    Args:
        blocks: blocks in each stage; each stage is twice as wide and half as high as the last.
        bottleneck: blocks of 1×1, 3×3 and 1×1 convolutions, four times as wide outside as inside,
            rather than of two 3×3 ones.
        n_channels: of the images.
        n_classes: of the head.
        width: channels of the first stage, a multiple of ``groups``.
        groups: of the normalisation; 32 is Wu and He's number.
        small_images: begin with a 3×3 convolution that keeps the resolution, as is usual for
            images of 32×32, rather than with a 7×7 one of stride 2 and a 3×3 maximum of stride 2.

    Raises:
        UserError: for a width that the groups do not divide, or a stage without blocks.

    >>> DeepConfig((2, 2, 2, 2)).depth, DeepConfig((3, 4, 23, 3), bottleneck=True).depth
    (18, 101)
    """

    blocks: tuple[int, int, int, int]
    bottleneck: bool = False
    n_channels: int = 3
    n_classes: int = 1000
    width: int = 64
    groups: int = 32
    small_images: bool = False

    def __post_init__(self):
        if self.width < 1 or self.groups < 1 or self.width % self.groups:
            raise UserError(
                f"width is {self.width} and groups is {self.groups}; the normalisation needs "
                "groups of equal size; choose the width as a multiple of the groups"
            )
        if len(self.blocks) != 4 or min(self.blocks) < 1:
            raise UserError(
                f"blocks is {self.blocks}; the network has four stages of at least one block; "
                "give four numbers from 1 up"
            )

    @property
    def depth(self) -> int:
        """Count the weighted layers off the shortcuts: convolutions and the linear layer."""
        return 2 + sum(self.blocks) * (3 if self.bottleneck else 2)


NAMED = {
    "resnet18": DeepConfig((2, 2, 2, 2)),
    "resnet50": DeepConfig((3, 4, 6, 3), bottleneck=True),
    "resnet101": DeepConfig((3, 4, 23, 3), bottleneck=True),
}


class DeepBlock(nnx.Module):
    """A block of `DeepResNet`: relu(x' + norm(conv(… relu(norm(conv(x))) …))).

    The way around is the identity, or a normalised 1×1 convolution where width or resolution
    change. In a bottleneck the 3×3 convolution has the stride, as in the implementations in use
    (the paper gives it to the first 1×1).

    >>> config = DeepConfig((1, 1, 1, 1), bottleneck=True, width=4, groups=2)
    >>> DeepBlock(4, 4, 2, config, rngs=nnx.Rngs(0))(jnp.zeros((1, 4, 4, 4))).shape
    (1, 2, 2, 16)
    """

    def __init__(
        self, width_in: int, width: int, stride: int, config: DeepConfig, *, rngs: nnx.Rngs
    ):
        width_out = width * (4 if config.bottleneck else 1)
        if config.bottleneck:
            layers = [(width_in, width, 1, 1), (width, width, 3, stride), (width, width_out, 1, 1)]
        else:
            layers = [(width_in, width, 3, stride), (width, width, 3, 1)]
        self.layers = nnx.List([_Normed(*layer, config.groups, rngs) for layer in layers])
        if stride == 1 and width_in == width_out:
            self.shortcut = None
        else:
            self.shortcut = _Normed(width_in, width_out, 1, stride, config.groups, rngs)

    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B Y2 X2 C2"]:
        """Run the block."""
        inner = x
        for layer in self.layers[:-1]:
            inner = jax.nn.relu(layer(inner))
        inner = self.layers[-1](inner)
        return jax.nn.relu(inner + (x if self.shortcut is None else self.shortcut(x)))


class _Normed(nnx.Module):
    """A convolution and a normalisation, padded alike on all sides."""

    def __init__(self, width_in, width, size, stride, groups, rngs):
        side = (size // 2, size // 2)
        self.conv = nnx.Conv(
            width_in, width, (size, size), stride, padding=(side, side), use_bias=False,
            kernel_init=_he_normal, rngs=rngs,
        )  # fmt: skip
        self.norm = nnx.GroupNorm(width, num_groups=groups, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.conv(x))


class DeepResNet(nnx.Module):
    """A stem, four stages of blocks, the mean over the image, one linear layer.

    Reference: He et al., arXiv 1512.03385; group normalisation: Wu and He, arXiv 1803.08494.

    >>> model = nnx.eval_shape(lambda: DeepResNet(NAMED["resnet18"], rngs=nnx.Rngs(0)))
    >>> len(model.blocks), model.head.kernel.shape
    (8, (512, 1000))
    """

    def __init__(self, config: DeepConfig, *, rngs: nnx.Rngs):
        size, stride = (3, 1) if config.small_images else (7, 2)
        self.stem = _Normed(config.n_channels, config.width, size, stride, config.groups, rngs)
        self.pooled = not config.small_images
        blocks, width_in = [], config.width
        for stage, count in enumerate(config.blocks):
            width = config.width * 2**stage
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(DeepBlock(width_in, width, stride, config, rngs=rngs))
                width_in = width * (4 if config.bottleneck else 1)
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(width_in, config.n_classes, rngs=rngs)

    def __call__(self, images: Float[Array, "B Y X C"]) -> Float[Array, "B classes"]:
        """Compute class logits."""
        x = jax.nn.relu(self.stem(images))
        if self.pooled:
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))  # type: ignore
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, axis=(1, 2)))


def named(
    name: str, *, n_channels: int = 3, n_classes: int = 1000, small_images: bool = False
) -> tuple[Any, Callable[[Any], Any]]:
    """Give a published ResNet by its name, making no parameters yet.

    With 3 channels and 1,000 classes the networks have the 11,689,512, 25,557,032 and 44,549,160
    parameters of the published ones: a group normalisation has as many as the batch normalisation
    there, though other statistics, so weights do not carry over.

    Args:
        name: ``resnet18``, ``resnet50`` or ``resnet101``.
        n_channels: of the images.
        n_classes: of the head.
        small_images: the stem for images of about 32×32; see `DeepConfig`.

    Returns:
        ``graphdef`` for `apply` and `loss`, and ``init(key) -> params``.

    Raises:
        UserError: unknown name.

    >>> graphdef, init = named("resnet50")
    >>> params = jax.eval_shape(init, jax.random.key(0))
    >>> sum(x.size for x in jax.tree.leaves(params))
    25557032
    """
    if name not in NAMED:
        raise UserError(f"model {name!r} is not known; expected one of {', '.join(NAMED)}; use one")
    config = replace(
        NAMED[name], n_channels=n_channels, n_classes=n_classes, small_images=small_images
    )
    return built(config)


def built(config: DeepConfig) -> tuple[Any, Callable[[Any], Any]]:
    """Give a ResNet of any shape, making no parameters yet.

    Args:
        config: the network.

    Returns:
        ``graphdef`` for `apply` and `loss`, and ``init(key) -> params``.

    >>> graphdef, init = built(DeepConfig((1, 1, 1, 1), n_classes=7, width=4, groups=2))
    >>> apply(graphdef, init(jax.random.key(0)), jnp.zeros((2, 32, 32, 3))).shape
    (2, 7)
    """
    graphdef, _ = split(nnx.eval_shape(lambda: DeepResNet(config, rngs=nnx.Rngs(0))))
    return graphdef, lambda key: split(DeepResNet(config, rngs=nnx.Rngs(key)))[1]


def split(model: nnx.Module) -> tuple[Any, Any]:
    """Split a module once into a static description and a pytree of plain arrays.

    Args:
        model: any `flax.nnx` module whose only state is its parameters.

    Returns:
        ``graphdef`` (hashable, static under `jax.jit`) and ``params``, whose dotted paths name the
        attributes, as in ``blocks.0.conv1.kernel``.

    Raises:
        UserError: when the module holds other state (batch statistics, dropout counters).

    >>> from jaxsys.core import tree
    >>> _, params = split(ResNet(ResNetConfig(), rngs=nnx.Rngs(0)))
    >>> tree.paths(params)[0]
    'blocks.0.conv1.kernel'
    """
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    if jax.tree.leaves(rest):
        raise UserError(
            f"the module has {len(jax.tree.leaves(rest))} arrays of state that are not parameters; "
            "expected none, so that the loss is a pure function; use normalisation without "
            "running statistics and no dropout"
        )
    return graphdef, nnx.as_pure(params)


def apply(graphdef: Any, params: Any, images: Float[Array, "B Y X C"]) -> Float[Array, "B classes"]:
    """Run a split module.

    Args:
        graphdef: from `split`.
        params: from `split`, or any tree of the same structure.
        images: [B, Y, X, C].

    Returns:
        [B, classes] logits.

    >>> graphdef, params = split(ResNet(ResNetConfig(), rngs=nnx.Rngs(0)))
    >>> apply(graphdef, params, jnp.zeros((2, 8, 8, 1))).shape
    (2, 10)
    """
    return nnx.merge(graphdef, params)(images)


def loss(graphdef: Any, params: Any, batch: Batch) -> Float[Array, ""]:
    """Average the cross-entropy of the right class, in nats per image.

    Args:
        graphdef: from `split`.
        params: from `split`, or any tree of the same structure.
        batch: images [B, Y, X, C] and labels [B].

    Returns:
        Scalar.

    >>> graphdef, params = split(ResNet(ResNetConfig(), rngs=nnx.Rngs(0)))
    >>> loss(graphdef, params, (jnp.zeros((2, 8, 8, 1)), jnp.array([3, 4]))).shape
    ()
    """
    images, labels = batch
    logits = apply(graphdef, params, images)
    chosen = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)
