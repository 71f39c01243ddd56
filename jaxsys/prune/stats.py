"""What pruning metrics read of a layer besides its weights: statistics of inputs and gradients.

Everything is accumulated batch by batch, so a calibration set of any size needs the memory of one
batch. The model enters as a function with taps or as a loss; W itself comes from the tree.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsys.core.errors import UserError
from jaxsys.core.tree import flatten

# The factor that Pruner-Zero's and GBLM's codes put before a gradient (against underflow in fp16).
GRADIENT_SCALE = 100.0


class Stats(NamedTuple):
    """Hold the statistics of one linear layer; what was not gathered is None.

    Attributes:
        X: mean over sequences of the squared L2 norm of each input channel, [I]. Wanda takes its
            square root, Pruner-Zero passes it as it is.
        G: √(Σ_s (100 g_s)²) over calibration sequences s, [O, I]; g_s is the gradient of the mean
            next-token loss of sequence s.
        G1: Σ_s |100 g_s|, [O, I].
        H: (2 / n) Σ x xᵀ over all tokens of the n sequences, [I, I].
        mean: of each input channel over tokens, [I].
        var: of each input channel over tokens, [I].

    >>> Stats(X=jnp.ones(2)).H is None
    True
    """

    X: Any = None
    G: Any = None
    G1: Any = None
    H: Any = None
    mean: Any = None
    var: Any = None


class Moments(NamedTuple):
    """Hold running sums over the inputs of a layer.

    >>> init_moments(3).outer is None
    True
    """

    sequences: Float[Array, ""]
    tokens: Float[Array, ""]
    total: Float[Array, "I"]
    squares: Float[Array, "I"]
    outer: Any  # [I, I], or None


def init_moments(inputs: int, *, outer: bool = False) -> Moments:
    """Begin running sums.

    Args:
        inputs: I.
        outer: sum x xᵀ too, for H.

    >>> init_moments(3, outer=True).outer.shape
    (3, 3)
    """
    none = jnp.zeros((), jnp.float32)
    zero = jnp.zeros(inputs, jnp.float32)
    square = jnp.zeros((inputs, inputs), jnp.float32) if outer else None
    return Moments(none, none, zero, zero, square)


@jax.jit
def add_inputs(moments: Moments, x: Float[Array, "B T I"]) -> Moments:
    """Add the inputs of B sequences.

    Args:
        moments: so far.
        x: what the layer multiplies.

    Returns:
        The sums with x.

    >>> add_inputs(init_moments(1), jnp.full((1, 2, 1), 3.0)).squares.tolist()
    [18.0]
    """
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    outer = moments.outer
    if outer is not None:
        outer = outer + jnp.dot(rows.T, rows, precision=jax.lax.Precision.HIGHEST)
    return Moments(
        moments.sequences + x.shape[0],
        moments.tokens + rows.shape[0],
        moments.total + jnp.sum(rows, axis=0),
        moments.squares + jnp.sum(jnp.square(rows), axis=0),
        outer,
    )


@jax.jit
def finish(moments: Moments) -> Stats:
    """Turn running sums into statistics.

    >>> stats = finish(add_inputs(init_moments(1), jnp.full((2, 2, 1), 3.0)))
    >>> stats.X.tolist(), stats.mean.tolist(), stats.var.tolist()
    ([18.0], [3.0], [0.0])
    """
    mean = moments.total / moments.tokens
    var = jnp.maximum(moments.squares / moments.tokens - jnp.square(mean), 0.0)
    outer = moments.outer
    return Stats(
        X=moments.squares / moments.sequences,
        H=None if outer is None else (2.0 / moments.sequences) * outer,
        mean=mean,
        var=var,
    )


def collect(
    apply_fn: Callable[[Any, Any], Mapping[str, Float[Array, "B T I"]]],
    params: Any,
    batches: Iterable[Any],
    *,
    outer: bool = False,
) -> dict[str, Stats]:
    """Gather the inputs' statistics of a model as it stands (dense-statistics protocol).

    Args:
        apply_fn: (params, batch) to the inputs of each layer wanted, by the layer's name; for
            `models.lm` that is `apply` with taps ``path:in``. It is jitted here.
        params: any tree.
        batches: what ``apply_fn`` takes.
        outer: gather H too.

    Returns:
        `Stats` by layer, without gradients.

    Raises:
        UserError: without a batch.

    >>> double = lambda params, x: {"first": x, "second": 2 * x}
    >>> collect(double, {}, [jnp.ones((1, 2, 3))])["second"].X.tolist()
    [8.0, 8.0, 8.0]
    """
    taps = jax.jit(apply_fn)
    sums: dict[str, Moments] = {}
    for batch in batches:
        for name, x in taps(params, batch).items():
            if name not in sums:
                sums[name] = init_moments(x.shape[-1], outer=outer)
            sums[name] = add_inputs(sums[name], x)
    if not sums:
        raise UserError("there is no calibration batch or no layer is tapped; give at least one")
    return {name: finish(total) for name, total in sums.items()}


def gradients(
    loss_fn: Callable[[Any, Any], Float[Array, ""]],
    params: Any,
    sequences: Iterable[Any],
    paths: Sequence[str],
) -> dict[str, tuple[Float[Array, "..."], Float[Array, "..."]]]:
    """Accumulate the gradients' magnitudes, one calibration sequence at a time.

    G = √(Σ_s (100 g_s)²) and G1 = Σ_s |100 g_s|, elementwise, as the released codes of Pruner-Zero
    and GBLM-Pruner do, in float32 throughout.

    Args:
        loss_fn: (params, sequence) to the mean next-token loss.
        params: any tree; its leaves at ``paths`` are differentiated.
        sequences: each is one sample s.
        paths: dotted paths of the weights wanted.

    Returns:
        (G, G1) by path, in the shape of the weight.

    Raises:
        UserError: for a path that the tree lacks.

    >>> found = gradients(lambda p, x: p["w"] @ x, {"w": jnp.zeros(1)}, [jnp.ones(1)] * 4, ("w",))
    >>> found["w"][0].tolist(), found["w"][1].tolist()
    ([200.0], [400.0])
    """
    flat = flatten(params)
    missing = [path for path in paths if path not in flat]
    if missing:
        raise UserError(f"the tree has no parameter {missing[0]!r}; correct the path")
    treedef = jax.tree.structure(params)
    chosen = {path: flat[path] for path in paths}

    def loss(chosen: dict[str, Array], rest: dict[str, Array], sequence: Any) -> Array:
        return loss_fn(jax.tree.unflatten(treedef, list((rest | chosen).values())), sequence)

    @jax.jit
    def step(sums: Any, chosen: Any, rest: Any, sequence: Any) -> Any:
        return add_gradients(sums, jax.grad(loss)(chosen, rest, sequence))

    sums = {path: init_gradients(leaf.shape) for path, leaf in chosen.items()}
    for sequence in sequences:
        sums = step(sums, chosen, flat, sequence)
    return {path: (jnp.sqrt(squares), total) for path, (squares, total) in sums.items()}


def init_gradients(shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Begin the sums of squared and of absolute gradients.

    >>> init_gradients((2,))[0].tolist()
    [0.0, 0.0]
    """
    return jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32)


def add_gradients(
    sums: Mapping[str, tuple[Array, Array]], grads: Mapping[str, Array]
) -> dict[str, tuple[Array, Array]]:
    """Add one sequence's gradients to the sums of squared and of absolute ones.

    >>> add_gradients({"w": init_gradients((1,))}, {"w": jnp.full(1, 0.02)})["w"][0].tolist()
    [4.0]
    """
    found = {}
    for path, (squares, total) in sums.items():
        g = GRADIENT_SCALE * grads[path].astype(jnp.float32)
        found[path] = squares + jnp.square(g), total + jnp.abs(g)
    return found


@partial(jax.jit, static_argnames="axis")
def weight_sums(weight: Float[Array, "O I"], axis: int) -> Float[Array, "..."]:
    """Sum |W| over rows (``axis`` 0, one number for each column) or over columns (``axis`` 1).

    >>> weight_sums(jnp.array([[1.0, -2.0], [3.0, 4.0]]), 0).tolist()
    [[4.0, 6.0]]
    """
    return jnp.sum(jnp.abs(weight.astype(jnp.float32)), axis=axis, keepdims=True)
