"""A change spread over several layers, each of which takes its share of what is still missing."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxsys.edit.contract import Editable, Edited, Info, Request
from jaxsys.edit.editable import add_delta, matrix_path
from jaxsys.edit.factors import check_finite
from jaxsys.edit.keys import KeyReader, half_bare
from jaxsys.edit.targets import Targets

Solve = Callable[[int, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def spread(
    model: Editable,
    params: Any,
    requests: Sequence[Request],
    layers: Sequence[int],
    point: str,
    found: Targets,
    prefixes: Sequence[str],
    share: Callable[[int], float | int],
    solve: Solve,
    batch: int,
) -> Edited:
    """Go through the layers from the lowest up, editing each.

    For every layer l keys K and the outputs of the last layer H are taken anew, with the edits so
    far; R = (Z - H) / share(layers left, l included); ΔW_l = A Bᵀ = solve(l, K, R).

    Args:
      model: the model.
      params: its parameters.
      requests: N.
      layers: ascending.
      point: of the last of them, relative to its block, where Z and H stand.
      found: Z.
      prefixes: texts before the prompts.
      share: divides the residual, given how many layers are left.
      solve: (layer, K [F, N], R [D, N]) to (A, B).
      batch: requests whose activations exist at one time.

    Returns:
      `Edited`; its state is layer to K [F, N], taken again when all layers were edited.

    >>> import jax.numpy as jnp
    >>> from jaxsys.data import ByteTokenizer
    >>> from jaxsys.models import lm
    >>> model = Editable(lm.LMConfig("llama", 256, 32, 1, 4, 2, 8, 48, 64), ByteTokenizer())
    >>> params = {"model": {"embed_tokens": {"weight": jnp.ones((256, 32))}}}
    >>> found = Targets(*[np.zeros((1, 32))] * 2, *[np.zeros(1)] * 3)
    >>> one = [Request("In Rome is", "Rome", "x")]
    >>> spread(model, params, one, (), ":out", found, (), lambda n: n, min, 1).info.factors
    {}
    """
    reader = KeyReader(model, params, requests, prefixes, batch)
    factors, missing = {}, []
    for i, layer in enumerate(layers):
        keys = half_bare(reader.read(params, layer)[0])
        residual = found.value - reader.look_ahead(params, layers[-1], point)
        missing.append(np.linalg.norm(residual, axis=1))
        a, b = solve(layer, keys.T, residual.T / share(len(layers) - i))
        path = matrix_path(model.config, layer)
        check_finite(path, a, b)
        params = add_delta(model.config, params, path, a, b)
        factors[path] = (a, b)
    notes = {
        "loss": found.loss,
        "nll": found.nll,
        "steps": found.steps,
        "missing": np.reshape(missing, (len(layers), len(requests))),
    }
    return Edited(params, None, Info(factors, notes))


def keys_of(
    model: Editable,
    params: Any,
    requests: Sequence[Request],
    layers: Sequence[int],
    prefixes: Sequence[str],
    batch: int,
) -> dict[int, np.ndarray]:
    """Take the keys of finished edits, [F, N] by layer.

    >>> import jax.numpy as jnp
    >>> from jaxsys.data import ByteTokenizer
    >>> from jaxsys.models import lm
    >>> model = Editable(lm.LMConfig("llama", 256, 32, 1, 4, 2, 8, 48, 64), ByteTokenizer())
    >>> params = {"model": {"embed_tokens": {"weight": jnp.ones((256, 32))}}}
    >>> keys_of(model, params, [Request("In Rome is", "Rome", "x")], (), (), 1)
    {}
    """
    reader = KeyReader(model, params, requests, prefixes, batch)
    return {layer: half_bare(reader.read(params, layer)[0]).T for layer in layers}


def add_keys(state: dict[int, Any] | None, keys: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Add K Kᵀ of a batch to the sums of a sequence, S_l ← S_l + K Kᵀ.

    >>> add_keys(None, {3: np.array([[1.0], [2.0]])})[3].tolist()
    [[1.0, 2.0], [2.0, 4.0]]
    """
    added = {layer: k.astype(np.float64) @ k.T.astype(np.float64) for layer, k in keys.items()}
    return {layer: s if state is None else state[layer] + s for layer, s in added.items()}
