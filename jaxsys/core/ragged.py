"""Exchange slices of unequal sizes; XLA has that on accelerators only, so CPUs get an emulation."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Integer, Shaped

from jaxsys.core.mesh import on_cpu


def ragged_all_to_all(
    operand: Shaped[Array, "M ..."],
    output: Shaped[Array, "R ..."],
    input_offsets: Integer[Array, "S"],
    send_sizes: Integer[Array, "S"],
    output_offsets: Integer[Array, "S"],
    recv_sizes: Integer[Array, "S"],
    *,
    axis_name: str | tuple[str, ...],
    most: int | None = None,
    native: bool | None = None,
) -> Shaped[Array, "R ..."]:
    """Send slices of the leading axis to the ranks of a mesh axis, as `jax.lax.ragged_all_to_all`.

    With W ranks, slice i goes to rank ⌊i·W / S⌋ and is written there at ``output_offsets[i]``. The
    emulation moves S slices of ``most`` rows in one dense all-to-all, whatever their sizes.

    Args:
      operand: rows to send.
      output: rows that receive; those that nothing is written to stay.
      input_offsets: where each slice begins.
      send_sizes: its rows.
      output_offsets: where the receiver writes it.
      recv_sizes: rows received from slice i mod S/W of rank ⌊i·W / S⌋.
      axis_name: the mesh axis, or several.
      most: no slice has more rows; bounds what the emulation moves. All of the operand by default.
      native: use XLA's own operation; by default, on every backend but the CPU.

    Returns:
      The output with the received slices written.

    >>> from jaxsys.core.mesh import over_replicas
    >>> n, zero = jnp.array([[2]]), jnp.array([[0]])
    >>> def swap(x, n, o):
    ...     return ragged_all_to_all(x, jnp.zeros_like(x), o, n, o, n, axis_name="replica")
    >>> over_replicas(swap, "vmap")(jnp.array([[7.0, 8.0, 9.0]]), n, zero).tolist()
    [[7.0, 8.0, 0.0]]
    """
    if native if native is not None else not on_cpu():
        return lax.ragged_all_to_all(
            operand,
            output,
            input_offsets,
            send_sizes,
            output_offsets,
            recv_sizes,
            axis_name=axis_name,
        )
    rows = operand.shape[0] if most is None else most
    at = jnp.arange(rows, dtype=input_offsets.dtype)[None]
    within = at < send_sizes[:, None]
    index = jnp.where(within, input_offsets[:, None] + at, operand.shape[0])
    windows = operand.at[index].get(mode="fill", fill_value=0)

    def swap(x: jax.Array) -> jax.Array:
        return lax.all_to_all(x, axis_name, 0, 0, tiled=True)

    windows, offsets = swap(windows), swap(output_offsets)
    index = jnp.where(at < recv_sizes[:, None], offsets[:, None] + at, output.shape[0])
    return output.at[index].set(windows, mode="drop")
