"""What is settled before pruning starts: which layers, whether the pattern fits, what it needs."""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array

from jaxsys.core.errors import UserError
from jaxsys.core.tree import size_bytes
from jaxsys.prune.blocks import Blocks, Tensors
from jaxsys.prune.methods import Method, PrunedLinear
from jaxsys.prune.patterns import Pattern


class PrunedBlock(NamedTuple):
    """Hold what became of a block (or, from dense statistics, of all layers).

    Attributes:
        index: which block.
        tensors: full path to pruned weight, in the checkpoint's orientation.
        masks: full path to mask, in the same orientation; True kept.
        permutations: full path to the permutation of input channels, where there is one.
        rows: for each layer its name, sparsity and seconds.

    >>> PrunedBlock(0, {}, {}, {}, ()).index
    0
    """

    index: int
    tensors: dict[str, Array]
    masks: dict[str, Array]
    permutations: dict[str, Any]
    rows: tuple[dict[str, Any], ...]


def check_model(blocks: Blocks, tensors: Tensors, method: Method, pattern: Pattern) -> None:
    """Refuse, before work starts, a pattern that does not fit every layer.

    Raises:
        UserError: naming the layer; or for ratios or a scope that do not go together.

    >>> from jaxsys.models import lm
    >>> from jaxsys.prune.blocks import lm_blocks
    >>> config = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> check_model(lm_blocks(config), lm.shapes(config), Method(), Pattern(nm=(2, 5)))
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: pattern 2:5 does not divide the 32 inputs of model.layers.0...
    """
    if method.ratios != "uniform" and (pattern.nm or pattern.scope == "global"):
        raise UserError(
            f"the ratios {method.ratios!r} are asked for with {pattern.nm or 'a global scope'}, "
            "which fixes the sparsity of a layer already; use an unstructured pattern"
        )
    for i in range(blocks.count):
        for name in blocks.linears(i):
            path = f"{blocks.prefix(i)}.{name}"
            shape = shape_of(tensors, f"{path}.weight")
            pattern.check(shape[::-1] if blocks.in_out else shape, path)


def layer_units(blocks: Blocks, tensors: Tensors, pattern: Pattern) -> list[dict[str, int]]:
    """Count what can be removed (weights, or the pattern's blocks) of each layer, by block.

    >>> from jaxsys.models import lm
    >>> from jaxsys.prune.blocks import lm_blocks
    >>> config = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> layer_units(lm_blocks(config), lm.shapes(config), Pattern(0.5))[1]["mlp.up_proj"]
    1536
    """

    def own(path: str) -> int:
        shape = shape_of(tensors, f"{path}.weight")
        return pattern.units(shape[::-1] if blocks.in_out else shape)

    return [
        {name: own(f"{blocks.prefix(i)}.{name}") for name in blocks.linears(i)}
        for i in range(blocks.count)
    ]


def shape_of(tensors: Tensors, path: str) -> tuple[int, int]:
    """Find the shape of a matrix without reading it.

    >>> import jax.numpy as jnp
    >>> shape_of({"w": jnp.ones((2, 3))}, "w")
    (2, 3)
    """
    # A GGUF file's tensors are made when asked for, but their shapes are known.
    known = getattr(tensors, "shapes", None)
    rows, columns = known[path] if known else tensors[path].shape
    return int(rows), int(columns)


def turn(weight: Any, in_out: bool) -> Any:
    """Bring a weight to [O, I], or back: transpose it where the checkpoint has [in, out].

    >>> import jax.numpy as jnp
    >>> turn(jnp.ones((2, 3)), True).shape
    (3, 2)
    """
    return weight.T if in_out else weight


def put(found: PrunedBlock, path: str, pruned: PrunedLinear, in_out: bool) -> None:
    """Enter a pruned layer, in the checkpoint's orientation.

    >>> import jax.numpy as jnp
    >>> found = PrunedBlock(0, {}, {}, {}, ())
    >>> one = jnp.ones((1, 2))
    >>> put(found, "h.weight", PrunedLinear(one, one > 0, None), True)
    >>> found.tensors["h.weight"].shape
    (2, 1)
    """
    found.tensors[path] = turn(pruned.weight, in_out)
    found.masks[path] = turn(pruned.mask, in_out)
    if pruned.permutation is not None:
        found.permutations[path] = np.asarray(pruned.permutation, np.int32)


def memory_bytes(
    blocks: Blocks,
    shapes: Mapping[str, Any],
    method: Method,
    n_sequences: int,
    length: int,
    *,
    batch: int = 1,
) -> dict[str, int]:
    """Estimate what sequential pruning needs, before anything is loaded.

    The device holds either the tensors outside the blocks or one block: its weights, as much again
    twice for scores and results, the activations that its taps give, and H where it is needed. The
    host holds the activations between blocks (in and out), and the gradients where they are needed.

    Args:
        blocks: the model.
        shapes: full path to what has shape and dtype.
        method: what to do.
        n_sequences: N.
        length: T.
        batch: sequences at a time.

    Returns:
        Bytes on the ``device`` and on the ``host``.

    >>> from jaxsys.models import lm
    >>> from jaxsys.prune.blocks import lm_blocks
    >>> config = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> need = memory_bytes(lm_blocks(config), lm.shapes(config), Method(), 8, 64)
    >>> need["host"]
    131072
    """
    outside = sum(size_bytes(shapes[name]) for name in blocks.outside)
    device, pruned, width = outside, 0, 0
    for i in range(blocks.count):
        own = [leaf for n, leaf in shapes.items() if n.startswith(f"{blocks.prefix(i)}.")]
        linears = [shapes[f"{blocks.prefix(i)}.{n}.weight"].shape for n in blocks.linears(i)]
        inputs = [shape[0] if blocks.in_out else shape[1] for shape in linears]
        outputs = [shape[1] if blocks.in_out else shape[0] for shape in linears]
        width = inputs[0]
        need = 3 * sum(map(size_bytes, own)) + 4 * batch * length * sum(inputs + outputs)
        if "H" in method.needs:
            need += 4 * sum(n * n for n in inputs)
        device = max(device, need)
        pruned += sum(rows * columns for rows, columns in linears)
    host = 2 * 4 * n_sequences * length * width
    if method.needs & {"G", "G1"}:
        host += 8 * pruned + 4 * n_sequences * length * width * blocks.count
    return {"device": device, "host": host}


def layers_matching(blocks: Blocks, patterns: Sequence[str]) -> Blocks:
    """Keep only the layers whose full paths match a glob.

    Args:
        blocks: the model.
        patterns: globs over paths such as ``*.mlp.*``.

    Raises:
        UserError: for a pattern without a match.

    >>> from jaxsys.models import lm
    >>> from jaxsys.prune.blocks import lm_blocks
    >>> blocks = lm_blocks(lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64))
    >>> layers_matching(blocks, ("*.1.mlp.*",)).linears(1)
    ('mlp.gate_proj', 'mlp.up_proj', 'mlp.down_proj')
    """

    def paths(i: int) -> dict[str, str]:
        return {name: f"{blocks.prefix(i)}.{name}" for name in blocks.linears(i)}

    everything = [path for i in range(blocks.count) for path in paths(i).values()]
    for pattern in patterns:
        if not fnmatch.filter(everything, pattern):
            raise UserError(
                f"pattern {pattern!r} matches no layer; expected a glob over paths such as "
                f"{everything[0]}; correct it"
            )

    def linears(i: int) -> tuple[str, ...]:
        return tuple(
            name
            for name, path in paths(i).items()
            if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
        )

    return blocks._replace(linears=linears)
