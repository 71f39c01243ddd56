"""Linear systems of the closed forms, accurate although the factors are float32.

Matrices of keys' second moments have condition numbers beyond what float32 carries. Each system is
factored in float32, after scaling its diagonal to one, and solved by conjugate gradients in float64
with that factor as preconditioner: iterative refinement that cannot diverge.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxsys.core.errors import UserError

Matrix = jax.Array | np.ndarray
TOLERANCE = 1e-12  # of the residual, relative to the right-hand side
MOST_STEPS = 400
LEAST_ACCURATE = 1e-3


def solve(
    a: Float[Matrix, "F F"],
    b: Float[Matrix, "F N"],
    k: Float[Matrix, "F M"] | None = None,
    *,
    factor: Any = None,
    what: str = "the second moment of the keys",
) -> Float[np.ndarray, "F N"]:
    """Solve (A + K Kᵀ) X = B for symmetric positive definite A + K Kᵀ.

    Args:
      a: A.
      b: B.
      k: K; its square is not formed in float64.
      factor: of A, or of any multiple of it, from `factorise`, where K is None.
      what: names the matrix in the message.

    Returns:
      X in float64.

    Raises:
      UserError: if the matrix is singular to the precision at hand.

    >>> solve(np.diag([2.0, 4.0]), np.ones((2, 1))).round(6).tolist()
    [[0.5], [0.25]]
    """
    with jax.enable_x64(True):
        k = np.zeros((np.shape(a)[0], 0)) if k is None else k
        a, b, k = (jnp.asarray(np.asarray(v, np.float64)) for v in (a, b, k))
        x, error = _solve(a, b, k, _factor(a, k) if factor is None else factor)
        x, error = np.asarray(x), float(error)
    if not error <= LEAST_ACCURATE:
        raise UserError(
            f"{what} is singular to working precision (relative residual {error:.1e}); expected a "
            "definite matrix; take statistics over more text or raise the regularisation"
        )
    return x


def factorise(a: Float[Matrix, "F F"]) -> Any:
    """Factor a matrix once, for several calls of `solve`.

    >>> solve(np.eye(2), np.ones((2, 1)), factor=factorise(3 * np.eye(2))).tolist()
    [[1.0], [1.0]]
    """
    with jax.enable_x64(True):
        a = jnp.asarray(np.asarray(a, np.float64))
        return _factor(a, jnp.zeros((a.shape[0], 0)))


def _scale(a: jax.Array, k: jax.Array) -> jax.Array:
    """Give what makes the diagonal of A + K Kᵀ one, [F, 1]."""
    diagonal = jnp.diagonal(a) + jnp.sum(k * k, axis=1)
    safe = jnp.where(diagonal > 0, diagonal, 1.0)
    return (1.0 / jnp.sqrt(safe))[:, None]


@jax.jit
def _factor(a: jax.Array, k: jax.Array) -> jax.Array:
    """Factor the scaled matrix in float32, lifting its diagonal until that succeeds."""
    d = _scale(a, k)
    k32 = (k * d).astype(jnp.float32)
    square = jnp.dot(k32, k32.T, precision=jax.lax.Precision.HIGHEST)
    m = (a * d * d[:, 0][None]).astype(jnp.float32) + square
    eye = jnp.eye(m.shape[0], dtype=jnp.float32)

    def attempt(lift: jax.Array) -> jax.Array:
        return jnp.linalg.cholesky(m + lift * eye)

    def failed(state: Any) -> jax.Array:
        return ~jnp.all(jnp.isfinite(state[1])) & (state[0] < 1.0)

    def again(state: Any) -> Any:
        lift = jnp.maximum(state[0] * 10, jnp.float32(1e-7))
        return lift, attempt(lift)

    start = jnp.float32(0.0)
    return jax.lax.while_loop(failed, again, (start, attempt(start)))[1]


@jax.jit
def _solve(
    a: jax.Array, b: jax.Array, k: jax.Array, factor: jax.Array
) -> tuple[jax.Array, jax.Array]:
    d = _scale(a, k)
    a, b, k = a * d * d[:, 0][None], b * d, k * d
    size = jnp.maximum(jnp.sqrt(jnp.sum(b * b, axis=0)), 1e-300)

    def product(x: jax.Array) -> jax.Array:
        return a @ x + k @ (k.T @ x)

    def precondition(r: jax.Array) -> jax.Array:
        # Each column at its own scale, so that a small one does not vanish in float32.
        scale = jnp.maximum(jnp.max(jnp.abs(r), axis=0, keepdims=True), 1e-300)
        z = jax.scipy.linalg.cho_solve((factor, True), (r / scale).astype(jnp.float32))
        return z.astype(jnp.float64) * scale

    def error(r: jax.Array) -> jax.Array:
        return jnp.max(jnp.sqrt(jnp.sum(r * r, axis=0)) / size, initial=0.0)

    def step(state: Any) -> Any:
        i, x, r, z, p, rz = state
        q = product(p)
        curve = jnp.sum(p * q, axis=0)
        length = jnp.where(curve > 0, rz / jnp.where(curve > 0, curve, 1.0), 0.0)[None]
        x, r = x + length * p, r - length * q
        z = precondition(r)
        new = jnp.sum(r * z, axis=0)
        grow = jnp.where(rz > 0, new / jnp.where(rz > 0, rz, 1.0), 0.0)[None]
        return i + 1, x, r, z, z + grow * p, new

    def going(state: Any) -> jax.Array:
        return (state[0] < MOST_STEPS) & (error(state[2]) > TOLERANCE)

    z = precondition(b)
    start = (jnp.int32(0), jnp.zeros_like(b), b, z, z, jnp.sum(b * z, axis=0))
    _, x, _, _, _, _ = jax.lax.while_loop(going, step, start)
    return x * d, error(b - product(x))


def ridge(
    m: Float[Matrix, "F F"] | float | int,
    k: Float[Matrix, "F N"],
    r: Float[Matrix, "O N"],
    weight: float | int = 1.0,
    factor: Any = None,
) -> tuple[Float[np.ndarray, "O N"], Float[np.ndarray, "F N"]]:
    """Give factors of ΔW = R Kᵀ (w M + K Kᵀ)⁻¹, the least change that maps K to R.

    With fewer requests than inputs Woodbury's form is used,
    ΔW = R (w I + Kᵀ M⁻¹ K)⁻¹ Kᵀ M⁻¹, whose only large system has the matrix M.

    Args:
      m: M, [F, F], or a number c for c I.
      k: keys, one column for each request.
      r: residuals, one column for each request.
      weight: w.
      factor: of M or a multiple of it, from `factorise`.

    Returns:
      (A, B) with ΔW = A Bᵀ: A = R, B = (w M + K Kᵀ)⁻¹ K; float32.

    Raises:
      UserError: if a system is singular, or, without weight, two keys are alike.

    >>> a, b = ridge(1.0, np.eye(2), np.eye(2))
    >>> (a @ b.T).tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    """
    k64 = np.asarray(k, np.float64)
    if k64.shape[1] >= k64.shape[0]:
        dense = np.eye(k64.shape[0]) * m if isinstance(m, float | int) else m
        b = solve(weight * np.asarray(dense, np.float64), k64, k64)
    else:
        y = k64 / m if isinstance(m, float | int) else solve(m, k64, factor=factor)
        inner = k64.T @ y
        if not weight:
            _check_apart(inner)
        inner = inner + weight * np.eye(k64.shape[1])
        b = solve((inner + inner.T) / 2, y.T, what="the matrix of the requests' keys").T
    return np.asarray(r, np.float32), b.astype(np.float32)


def _check_apart(inner: np.ndarray) -> None:
    size = np.sqrt(np.diagonal(inner))
    alike = np.triu(inner / np.outer(size, size), 1) > 1 - 1e-9
    if alike.any():
        i, j = (int(x[0]) for x in np.nonzero(alike))
        raise UserError(
            f"requests {i} and {j} have the same key, as two facts about one subject do whose "
            "prompts begin alike; equality for both cannot be had; allow slack or edit one of them"
        )


def rank_one(
    moment: Float[Matrix, "F F"] | None,
    direction: Float[Matrix, "F"],
    key: Float[Matrix, "F"],
    residual: Float[Matrix, "O"],
    factor: Any = None,
) -> tuple[Float[np.ndarray, "O 1"], Float[np.ndarray, "F 1"]]:
    """Give factors of ROME's update, ΔW = r uᵀ / (kᵀ u) with u = C⁻¹ k* / ‖C⁻¹ k*‖.

    Args:
      moment: C; None for the identity.
      direction: k*.
      key: k, which is mapped to its value plus r exactly.
      residual: r = v* - W k.
      factor: of C, from `factorise`.

    Returns:
      (A, B) with ΔW = A Bᵀ, float32.

    Raises:
      UserError: if C is singular, or k has nothing of the direction.

    >>> a, b = rank_one(None, np.array([2.0, 0.0]), np.array([2.0, 1.0]), np.ones(2))
    >>> (a @ b.T @ np.array([2.0, 1.0])).tolist()
    [1.0, 1.0]
    """
    k_star = np.asarray(direction, np.float64)
    u = k_star if moment is None else solve(moment, k_star[:, None], factor=factor)[:, 0]
    u = u / np.linalg.norm(u)
    part = float(np.asarray(key, np.float64) @ u)
    if not abs(part) > 1e-12 * np.linalg.norm(np.asarray(key, np.float64)):
        raise UserError(
            "the request's key is orthogonal to the direction of its update; expected a key like "
            "those after the prefixes; use other prefixes"
        )
    b = u.astype(np.float32)[:, None]
    return (np.asarray(residual, np.float64) / part).astype(np.float32)[:, None], b
