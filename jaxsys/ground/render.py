"""Draw meshes from all around by casting rays on the processor: no window, no OpenGL.

Axes: ``F`` triangles, ``V`` views, ``Y`` rows and ``X`` columns of pixels, ``P`` rays.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from jaxsys.core.errors import UserError
from jaxsys.ground.mesh import Mesh

_DISTANCE = 4.0  # of the camera, in radii of the object
_MARGIN = 0.94  # of the picture's half height that the object reaches
_LAYERS = 4  # of translucent surfaces behind each other
_STEP = 1e-4  # past a translucent surface
_OPAQUE = 0.03  # the light that is left when a ray ends


@dataclass(frozen=True)
class RenderConfig:
    """Describe the views; equal settings give equal pictures.

    Attributes:
        views: V, evenly around the object, the first from its front.
        size: Y = X.
        elevation_deg: of the camera above the ground.
        light: direction to the light, to the right of, above and towards the camera.
        ambient: share of the light that has no direction.
        samples: rays for each pixel, along each side of it.

    Raises:
        UserError: for zero views, or numbers out of range.

    >>> RenderConfig().views
    8
    """

    views: int = 8
    size: int = 160
    elevation_deg: float | int = 30
    light: tuple[float, float, float] = (-0.4, 0.7, 0.6)
    ambient: float = 0.45
    samples: int = 2

    def __post_init__(self) -> None:
        sound = (
            1 <= self.views <= 360
            and 8 <= self.size <= 2048
            and 1 <= self.samples <= 8
            and -90 < self.elevation_deg < 90
            and 0 <= self.ambient <= 1
            and any(self.light)
            and np.isfinite(self.light).all()
        )
        if not sound:
            raise UserError(
                f"views cannot be drawn as {self}; expected 1 to 360 views of 8 to 2048 pixels, an "
                "elevation between -90 and 90 degrees, ambient light in 0..1, 1 to 8 samples and "
                "a light from somewhere; correct them"
            )


def fit(
    mesh: Mesh,
    size_cm: Sequence[float | int] | None = None,
    rotation: Sequence[float | int] | None = None,
) -> Float32[np.ndarray, "F 3 3"]:
    """Turn a model upright, stretch it to its true proportions and scale it to radius 1.

    Args:
        mesh: a model.
        size_cm: width (x), depth (z) and height (y); None keeps the model's proportions.
        rotation: row-major 3 × 3, applied first.

    Returns:
        Corners around the origin, the farthest at distance 1.

    Raises:
        UserError: for a model without extent.

    >>> from jaxsys.ground.mesh import read_mesh
    >>> flat = read_mesh(b"v 0 0 0\\nv 1 0 0\\nv 0 1 0\\nf 1 2 3\\n")
    >>> corners = fit(flat, (300, 50, 400))
    >>> np.ptp(corners.reshape(-1, 3), 0).round(4)
    array([1.2, 1.6, 0. ], dtype=float32)
    """
    corners = mesh.triangles.astype(np.float64)
    if rotation is not None:
        corners = corners @ np.asarray(rotation, np.float64).reshape(3, 3).T
    low, high = corners.min((0, 1)), corners.max((0, 1))
    corners = corners - (low + high) / 2
    extent = high - low
    if size_cm is not None:
        width, depth, height = size_cm
        # A model without thickness stays flat.
        corners = (
            corners
            * np.where(extent > 0, [width, height, depth], 0)
            / np.where(extent > 0, extent, 1)
        )
    radius = float(np.sqrt((corners**2).sum(-1)).max())
    if not (np.isfinite(radius) and radius > 0):
        raise UserError(
            "the model is a point or has no finite size; expected an extent; mend it or leave it "
            "out"
        )
    return (corners / radius).astype(np.float32)


def render(
    mesh: Mesh,
    config: RenderConfig | None = None,
    *,
    size_cm: Sequence[float | int] | None = None,
    rotation: Sequence[float | int] | None = None,
) -> UInt8[np.ndarray, "V Y X 3"]:
    """Draw a model from all around on white, so large that every view holds it whole.

    Each triangle is flat: its colour, or its texture's, times

        a + (1 − a) · max(n · l, 0)

    with a the ambient share, l the direction to the light and n the normal on the camera's side.
    What lies behind a translucent surface is mixed in.

    Args:
        mesh: a model.
        config: how; None is the default.
        size_cm: its true width, depth and height.
        rotation: turns it upright.

    Returns:
        One picture for each view, turning to the object's right by 360/V degrees.

    Raises:
        UserError: for a model without extent, or without embreex.

    >>> from jaxsys.ground.mesh import read_mesh
    >>> flat = b"v 0 0 0\\nv 1 0 0\\nv 0 1 0\\nf 1 2 3\\n"
    >>> render(read_mesh(flat), RenderConfig(2, 8)).shape
    (2, 8, 8, 3)
    """
    config = config or RenderConfig()
    corners = fit(mesh, size_cm, rotation)
    cast = _caster(corners)
    cameras = [_camera(config, turn) for turn in np.arange(config.views) * 2 * np.pi / config.views]
    points = corners.reshape(-1, 3)
    spans = []
    for camera in cameras:
        seen = points @ camera.T.astype(np.float32)
        flat = seen[:, :2] / (_DISTANCE - seen[:, 2:])
        spans.append((flat.min(0), flat.max(0)))
    # One focal length for all views, by the corner that reaches farthest in any of them.
    half = float(np.abs(spans).max()) / _MARGIN
    pictures = [
        _draw(mesh, cast, camera, half, span, config)
        for camera, span in zip(cameras, spans, strict=True)
    ]
    return np.stack(pictures)


def _caster(corners: np.ndarray) -> Any:
    try:
        from embreex.mesh_construction import TriangleMesh
        from embreex.rtcore_scene import EmbreeScene
    except ImportError:
        raise UserError(
            "rays are cast by embreex, which is missing; run pip install 'jaxsys[ground]'"
        ) from None
    scene = EmbreeScene()
    TriangleMesh(scene, np.ascontiguousarray(corners, np.float32))
    return lambda origins, rays: scene.run(origins, rays, output=1)


def _camera(config: RenderConfig, turn_rad: float) -> np.ndarray:
    """Give the camera's axes in the object's: to the right, above, and towards the camera."""
    lift = np.deg2rad(config.elevation_deg)
    sin, cos = np.sin(turn_rad), np.cos(turn_rad)
    right = np.array([cos, 0, -sin])
    back = np.array([np.cos(lift) * sin, np.sin(lift), np.cos(lift) * cos])
    return np.stack([right, np.cross(back, right), back])


def _draw(
    mesh: Mesh,
    cast: Any,
    camera: np.ndarray,
    half: float,
    span: tuple[np.ndarray, np.ndarray],
    config: RenderConfig,
) -> UInt8[np.ndarray, "Y X 3"]:
    """Draw one view.

    Args:
        mesh: a model.
        cast: origins and rays -> where they meet it.
        camera: its axes.
        half: the tangent of half the angle of view.
        span: the lowest and highest tangents at which the model is seen.
        config: how.
    """
    side = config.size * config.samples
    ticks = (((np.arange(side) + 0.5) / side * 2 - 1) * half).astype(np.float32)
    rim = 2 * half / side
    columns = np.flatnonzero((ticks > span[0][0] - rim) & (ticks < span[1][0] + rim))
    rows = np.flatnonzero((-ticks > span[0][1] - rim) & (-ticks < span[1][1] + rim))
    across, down = np.meshgrid(ticks[columns], ticks[rows])
    towards = np.stack([across.ravel(), -down.ravel(), np.full(across.size, -1, np.float32)], 1)
    towards /= np.sqrt(np.einsum("pa,pa->p", towards, towards))[:, None]
    axes = camera.astype(np.float32)
    rays = towards @ axes
    at = np.tile(np.float32(_DISTANCE) * axes[2], (len(rays), 1))
    light = np.asarray(config.light, np.float32) @ axes
    light /= np.linalg.norm(light)
    seen = np.zeros((len(rays), 3), np.float32)
    left = np.ones(len(rays), np.float32)  # the light that still comes from behind
    active = np.arange(len(rays))
    for _ in range(_LAYERS):
        hits = cast(at, rays)
        met = np.flatnonzero(hits["primID"] >= 0)
        active, at, rays = active[met], at[met], rays[met]
        hits = {name: part[met] for name, part in hits.items()}
        colour, opacity = _surface(mesh, hits)
        normal = hits["Ng"]
        length = np.sqrt(np.einsum("pa,pa->p", normal, normal))
        facing = -np.sign(np.einsum("pa,pa->p", normal, rays)) / np.maximum(length, 1e-20)
        bright = config.ambient + (1 - config.ambient) * np.maximum(facing * (normal @ light), 0)
        seen[active] += (left[active] * opacity * bright)[:, None] * colour
        left[active] *= 1 - opacity
        through = np.flatnonzero(left[active] > _OPAQUE)
        if not len(through):
            break
        active, rays = active[through], rays[through]
        at = at[through] + (hits["tfar"][through] + _STEP)[:, None] * rays
    picture = np.ones((side, side, 3), np.float32)
    seen += left[:, None]
    picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = seen.reshape(*across.shape, 3)
    n = config.samples
    mixed = sum(picture[i::n, j::n] for i in range(n) for j in range(n)) / n**2
    return (np.clip(mixed, 0, 1) * 255 + 0.5).astype(np.uint8)


def _surface(
    mesh: Mesh, hits: dict[str, np.ndarray]
) -> tuple[Float32[np.ndarray, "P 3"], Float32[np.ndarray, " P"]]:
    """Look up colour and opacity where rays meet the mesh."""
    triangle = hits["primID"]
    material = mesh.material[triangle]
    found = mesh.colours[material]
    u, v = hits["u"][:, None], hits["v"][:, None]
    corner = mesh.uv[triangle]
    place = (1 - u - v) * corner[:, 0] + u * corner[:, 1] + v * corner[:, 2]
    for number in np.unique(material).tolist():
        texture = mesh.textures[number]
        if texture is None:
            continue
        mine = material == number
        rows, columns = texture.shape[:2]
        x, y = np.floor(place[mine] % 1 * [columns, rows]).astype(int).T
        texel = texture[rows - 1 - np.minimum(y, rows - 1), np.minimum(x, columns - 1)]
        texel = texel.astype(np.float32) / 255
        found[mine, :3] = texel[:, :3]
        found[mine, 3] *= texel[:, 3]
    return found[:, :3], found[:, 3]
