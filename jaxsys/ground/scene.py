"""A tiny renderer of toy furniture in JAX, for tests and notebooks: no mesh, no file, no window.

A scene is a handful of solids given by their signed distance; a ray walks along by the distance to
the nearest one until it meets it. The toys are pieces of furniture in six colours and two heights,
so that their names are true descriptions.

Axes: ``S`` solids of a scene, ``N`` scenes, ``V`` views, ``Y`` rows and ``X`` columns of pixels.
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsys.core.errors import UserError

BOX, BALL, CYLINDER, RING, NOTHING = range(5)
COLOURS = {
    "red": (0.85, 0.1, 0.1),
    "green": (0.1, 0.65, 0.2),
    "blue": (0.15, 0.25, 0.85),
    "yellow": (0.95, 0.8, 0.1),
    "black": (0.08, 0.08, 0.08),
    "brown": (0.45, 0.27, 0.12),
}
HEIGHTS = {"low": 0.6, "tall": 1.2}
NOUNS = ("table", "stool", "lamp", "chair")
TOYS = tuple(
    f"a {height} {colour} {noun}" for noun, colour, height in product(NOUNS, COLOURS, HEIGHTS)
)
_SOLIDS = 6
_DISTANCE, _FOCAL = 4.0, 2.7  # of the camera; of its lens, in half heights of the picture
_ELEVATION_RAD = math.radians(30)
_STEPS = 32
_HIT = 0.02


class Scene(NamedTuple):
    """Hold solids; a leading axis makes it N scenes.

    Attributes:
        kind: [S], one of BOX, BALL, CYLINDER, RING, NOTHING.
        centre: [S, 3], z upwards.
        size: [S, 3]: half edges; radius; radius and half height; radius and thickness.
        colour: [S, 3], red, green and blue in 0..1.

    >>> toy("a low red table").kind.shape
    (6,)
    """

    kind: Any
    centre: Any
    size: Any
    colour: Any


def toy(name: str) -> Scene:
    """Build the toy of a name.

    Args:
        name: one of `TOYS`.

    Raises:
        UserError: for another name.

    >>> int((toy("a tall blue lamp").kind != NOTHING).sum())
    3
    """
    if name not in TOYS:
        raise UserError(f"toy {name!r} does not exist; expected one like {TOYS[0]!r}; see TOYS")
    _, height, colour, noun = name.split()
    h = HEIGHTS[height]
    corners = list(product((-0.45, 0.45), (-0.45, 0.45)))
    legs = [(CYLINDER, (x, y, -0.05), (0.06, h / 2, 0.0)) for x, y in corners]
    slab = (BOX, (0.0, 0.0, h / 2), (0.6, 0.6, 0.06))
    solids = {
        "table": [slab, *legs],
        "chair": [*legs, slab, (BOX, (0.0, 0.55, h / 2 + 0.4), (0.6, 0.06, 0.4))],
        "stool": [
            (CYLINDER, (0.0, 0.0, h / 2), (0.45, 0.07, 0.0)),
            (CYLINDER, (0.0, 0.0, 0.0), (0.1, h / 2, 0.0)),
            (RING, (0.0, 0.0, -h / 2), (0.35, 0.06, 0.0)),
        ],
        "lamp": [
            (BALL, (0.0, 0.0, h / 2 + 0.2), (0.35, 0.0, 0.0)),
            (CYLINDER, (0.0, 0.0, 0.0), (0.05, h / 2, 0.0)),
            (CYLINDER, (0.0, 0.0, -h / 2), (0.3, 0.05, 0.0)),
        ],
    }[noun]
    solids += [(NOTHING, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))] * (_SOLIDS - len(solids))
    kind, centre, size = zip(*solids, strict=True)
    return Scene(
        np.array(kind, np.int32),
        np.array(centre, np.float32),
        np.array(size, np.float32),
        np.tile(np.array(COLOURS[colour], np.float32), (_SOLIDS, 1)),
    )


def stack(scenes: Sequence[Scene]) -> Scene:
    """Put scenes of equally many solids together, on a new first axis.

    >>> stack([toy(TOYS[0]), toy(TOYS[1])]).centre.shape
    (2, 6, 3)
    """
    return Scene(*(np.stack(parts) for parts in zip(*scenes, strict=True)))


def distances(scene: Scene, points: Float[Array, "P 3"]) -> Float[Array, "P S"]:
    """Measure the signed distance from points to each solid; negative inside.

    >>> ball = Scene(jnp.array([BALL]), jnp.zeros((1, 3)), jnp.ones((1, 3)), jnp.ones((1, 3)))
    >>> distances(ball, jnp.array([[0.0, 0.0, 3.0]])).tolist()
    [[2.0]]
    """
    at = points[:, None] - jnp.asarray(scene.centre)[None]
    size, kind = jnp.asarray(scene.size)[None], jnp.asarray(scene.kind)[None]
    beyond = jnp.abs(at) - size
    box = _length(jnp.maximum(beyond, 0.0)) + jnp.minimum(jnp.max(beyond, -1), 0.0)
    ball = _length(at) - size[..., 0]
    around = _length(at[..., :2])
    edge = jnp.stack([around - size[..., 0], jnp.abs(at[..., 2]) - size[..., 1]], -1)
    cylinder = _length(jnp.maximum(edge, 0.0)) + jnp.minimum(jnp.max(edge, -1), 0.0)
    ring = _length(jnp.stack([around - size[..., 0], at[..., 2]], -1)) - size[..., 1]
    far = jnp.full_like(ball, 100.0)
    kinds = [jnp.broadcast_to(kind == k, ball.shape) for k in range(5)]
    return jnp.select(kinds, [box, ball, cylinder, ring, far])


def _length(x: Array) -> Array:
    return jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), -1), 1e-12))


def render(
    scene: Scene,
    azimuth_rad: Float[Array, ""] | float,
    elevation_rad: Float[Array, ""] | float = _ELEVATION_RAD,
    *,
    size: int = 32,
    light: tuple[float, float, float] = (0.4, -0.5, 0.8),
) -> Float[Array, "Y X 3"]:
    """Draw a scene from one side, on white.

    Args:
        scene: without a leading axis.
        azimuth_rad: of the camera around the z axis.
        elevation_rad: of the camera above the ground.
        size: Y = X.
        light: direction to the light, in the scene's axes.

    Returns:
        [Y, X, 3] in 0..1.

    >>> picture = jax.jit(render, static_argnames="size")(toy(TOYS[0]), 0.0, size=8)
    >>> picture.shape, picture[0, 0].tolist()
    ((8, 8, 3), [1.0, 1.0, 1.0])
    """
    flat, up = jnp.cos(elevation_rad), jnp.sin(elevation_rad)
    x, y = jnp.sin(azimuth_rad), -jnp.cos(azimuth_rad)
    eye = jnp.stack([flat * x, flat * y, up])
    right = jnp.stack([-y, x, jnp.zeros_like(x)])
    above = jnp.cross(eye, right)
    ticks = (jnp.arange(size) + 0.5) / size * 2 - 1
    across, down = jnp.meshgrid(ticks, ticks)
    rays = across.reshape(-1, 1) * right[None] - down.reshape(-1, 1) * above[None]
    rays = rays - _FOCAL * eye[None]
    rays = rays / _length(rays)[:, None]

    def near(points: Array) -> Array:
        return jnp.min(distances(scene, points), -1)

    def walk(_: Any, travelled: Array) -> Array:
        return travelled + near(_DISTANCE * eye[None] + travelled[:, None] * rays)

    travelled = jax.lax.fori_loop(0, _STEPS, walk, jnp.zeros(size * size))
    points = _DISTANCE * eye[None] + travelled[:, None] * rays
    apart = distances(scene, points)
    hit = jnp.min(apart, -1) < _HIT
    # The normal is the distance's gradient; four corners of a tetrahedron give it.
    corners = jnp.array([[1.0, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]])
    slopes = jax.vmap(lambda corner: near(points + 1e-3 * corner[None]))(corners)
    normal = jnp.einsum("CP,CA->PA", slopes, corners)
    normal = normal / _length(normal)[:, None]
    to_light = jnp.asarray(light) / math.hypot(*light)
    bright = 0.4 + 0.6 * jnp.maximum(jnp.einsum("PA,A->P", normal, to_light), 0.0)
    colour = jnp.asarray(scene.colour)[jnp.argmin(apart, -1)] * bright[:, None]
    return jnp.where(hit[:, None], colour, 1.0).reshape(size, size, 3)


@partial(jax.jit, static_argnames=("n_views", "size", "light"))
def render_views(
    scenes: Scene,
    *,
    n_views: int = 8,
    elevation_deg: Any = 30,
    size: int = 32,
    light: tuple[float, float, float] = (0.4, -0.5, 0.8),
) -> Float[Array, "N V Y X 3"]:
    """Draw scenes from all around: V views, 360/V degrees apart.

    Args:
        scenes: with a leading axis N, as from `stack`.
        n_views: V.
        elevation_deg: of the camera above the ground, degrees.
        size: Y = X.
        light: direction to the light.

    Returns:
        [N, V, Y, X, 3] in 0..1.

    >>> render_views(stack([toy(TOYS[0])]), n_views=2, size=8).shape
    (1, 2, 8, 8, 3)
    """
    turns = jnp.arange(n_views) * (2 * math.pi / n_views)
    lift = jnp.deg2rad(jnp.float32(elevation_deg))
    draw = partial(render, size=size, light=light)
    around = lambda scene: jax.vmap(lambda turn: draw(scene, turn, lift))(turns)  # noqa: E731
    return jax.lax.map(around, jax.tree.map(jnp.asarray, scenes))
