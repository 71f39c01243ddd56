"""A small residual network for small images, as a `flax.nnx` module.

Normalisation is over groups of channels, not over the batch: batch statistics would be state that
changes in the forward pass and would differ between replicas, while here ``loss(graphdef, params,
batch)`` stays a pure function of the parameters and one example does not influence another.

Axes: ``B`` batch, ``Y`` and ``X`` image rows and columns, ``C`` channels.
"""

from dataclasses import dataclass
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
