"""Twin-Merging: one shared model from any merge, and for each task a compressed rest."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.dtypes import canonicalize_dtype

from jaxsys.merge.conflict import as_flat, check_family
from jaxsys.merge.routed import Routed
from jaxsys.merge.sparse import Bits, encode


def twin(
    shared: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    *,
    density: float | int = 0.1,
    bits: Bits = 16,
    dtype: Any = None,
) -> Routed:
    """Build Twin-Merging: v_n = sparsify(θ_n − θ*), served as θ* + Σ_n w_n v_n.

    Args:
      shared: θ*, of any merge of the models: a tree or a flat checkpoint.
      models: N experts.
      density: share of entries kept in v_n, by magnitude and per tensor.
      bits: of a value.
      dtype: of the shared leaves; their own by default.

    Returns:
      The family; every leaf has parts.

    Raises:
      UserError: if the models are not of one form, or the density is outside (0, 1].

    Reference: Lu et al., arXiv 2406.15479.

    >>> routed = twin({"w": np.zeros(2)}, [{"w": np.array([1.0, 4.0])}], density=0.5, bits=32)
    >>> from jaxsys.merge.routed import materialise
    >>> materialise(routed, np.ones(1))["w"].tolist()
    [0.0, 4.0]
    """
    flat, others = as_flat(shared), [as_flat(model) for model in models]
    check_family(flat, others)
    leaves, parts = {}, {}
    for path, leaf in flat.items():
        target = canonicalize_dtype(leaf.dtype if dtype is None else dtype)
        leaves[path] = jnp.asarray(leaf).astype(target)
        start = np.asarray(leaves[path], np.float32)
        rest = np.stack([np.asarray(m[path], np.float32) - start for m in others])
        parts[path] = encode(rest, density, bits=bits)
    return Routed(leaves, parts)
