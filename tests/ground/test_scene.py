"""The toy renderer: distances against sampled surfaces, silhouettes, and pictures that differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.ground import scene


def one(kind, size):
    return scene.Scene(
        np.array([kind]), np.zeros((1, 3), np.float32), np.float32([size]), np.ones((1, 3))
    )


def surface(kind, size, rng, n=60_000):
    """Draw points on a solid's surface."""
    turn, other = rng.uniform(0, 2 * np.pi, (2, n))
    x = rng.uniform(-1, 1, (n, 3))
    if kind == scene.BOX:
        side, axis = rng.choice([-1.0, 1.0], n), rng.integers(3, size=n)
        x[np.arange(n), axis] = side
        return x * np.array(size)
    if kind == scene.BALL:
        x = rng.normal(size=(n, 3))
        return size[0] * x / np.linalg.norm(x, axis=1, keepdims=True)
    if kind == scene.RING:
        around = size[0] + size[1] * np.cos(other)
        return np.stack([around * np.cos(turn), around * np.sin(turn), size[1] * np.sin(other)], 1)
    radius = np.where(rng.random(n) < 0.5, 1.0, np.sqrt(rng.random(n))) * size[0]
    height = np.where(radius == size[0], x[:, 2], np.sign(x[:, 2])) * size[1]
    return np.stack([radius * np.cos(turn), radius * np.sin(turn), height], 1)


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        (scene.BOX, (0.5, 0.3, 0.8)),
        (scene.BALL, (0.7, 0.0, 0.0)),
        (scene.CYLINDER, (0.4, 0.6, 0.0)),
        (scene.RING, (0.6, 0.2, 0.0)),
    ],
)
def test_distances_are_to_the_nearest_point_of_the_surface(kind, size):
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.uniform(-1.5, 1.5, (20, 3)), [[0.05, 0.0, 0.1], [0.6, 0.1, 0.0]]])
    got = np.asarray(scene.distances(one(kind, size), jnp.asarray(points, jnp.float32)))[:, 0]
    near = surface(kind, size, rng)
    want = np.linalg.norm(points[:, None] - near[None], axis=-1).min(1)
    np.testing.assert_allclose(np.abs(got), want, atol=0.03)
    inside = {scene.BOX: 0, scene.BALL: 0, scene.CYLINDER: 0, scene.RING: 1}[kind] - 2
    assert got[inside] < 0


def test_a_ball_covers_the_disk_that_a_camera_would_see():
    size, radius = 64, 0.8
    picture = jax.jit(scene.render, static_argnames="size")(
        one(scene.BALL, (radius, 0.0, 0.0)), 0.3, 0.5, size=size
    )
    covered = np.asarray(picture < 1.0).any(-1).mean()
    # The rim is seen at the angle asin(r / distance); the lens makes it focal · tan of that.
    rim = scene._FOCAL * np.tan(np.arcsin(radius / scene._DISTANCE))
    assert covered == pytest.approx(np.pi * rim**2 / 4, rel=0.03)


def test_toys_differ_and_are_as_they_are_called():
    pictures = np.asarray(
        scene.render_views(scene.stack([scene.toy(n) for n in scene.TOYS]), n_views=2, size=32)
    )
    assert pictures.shape == (len(scene.TOYS), 2, 32, 32, 3)
    assert (pictures >= 0).all()
    assert (pictures <= 1).all()
    assert len({p.tobytes() for p in pictures}) == len(scene.TOYS) == 48
    for name, toy in zip(scene.TOYS, pictures, strict=True):
        colour = np.array(scene.COLOURS[name.split()[2]])
        seen = toy[(toy < 1.0).any(-1)]
        # Light only scales a colour, so its direction stays.
        cosine = seen @ colour / np.linalg.norm(seen, axis=-1) / np.linalg.norm(colour)
        assert cosine.min() > 0.999
    rows = (pictures < 1.0).any((-1, -2)).sum(-1)  # lines of each picture that show the toy
    low = np.array([" low " in name for name in scene.TOYS])
    assert (rows[~low] > rows[low]).all()


def test_another_toy_is_a_mistake():
    with pytest.raises(UserError, match="toy 'a purple cow' does not exist"):
        scene.toy("a purple cow")
