"""Read a Wavefront model with its materials and textures into plain arrays.

trimesh parses; this module bounds what it is given, gives colours to materials that nothing
describes, and puts all parts of a model together.

Axes: ``F`` triangles, ``M`` materials, ``Y`` and ``X`` pixels of a texture.
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from jaxsys.core.errors import UserError

_MOST_FACES = 2_000_000
_MOST_TEXTURE_PIXELS = 1 << 25
_TEXTURE_SIDE = 512  # more than a rendered view can show
_LEAST_OPACITY = 0.25  # so that glass is seen
_USED = re.compile(rb"^[ \t]*usemtl[ \t]+([^\r\n]+)", re.MULTILINE)
_NAMED = re.compile(r"^[ \t]*newmtl[ \t]+([^\r\n]+)", re.MULTILINE)
_LIBRARY = "jaxsys-materials.mtl"

# Sweet Home 3D's own models name the viewer's built-in materials without describing them.
# Reconstruction: known is that their names are words for colours; the values are chosen here.
_COLOURS = {
    "yellow_green": (0.6, 0.75, 0.2),
    "redwood": (0.45, 0.2, 0.12),
    "lavendar": (0.7, 0.6, 0.85),
    "orange": (0.95, 0.55, 0.1),
    "blonde": (0.85, 0.7, 0.45),
    "yellow": (0.95, 0.85, 0.2),
    "silver": (0.75, 0.75, 0.78),
    "amber": (0.6, 0.35, 0.1),
    "white": (0.92, 0.92, 0.92),
    "black": (0.08, 0.08, 0.08),
    "brown": (0.42, 0.27, 0.14),
    "flesh": (0.9, 0.7, 0.58),
    "green": (0.2, 0.6, 0.25),
    "sand": (0.8, 0.7, 0.5),
    "bone": (0.87, 0.83, 0.7),
    "ruby": (0.6, 0.07, 0.12),
    "grey": (0.5, 0.5, 0.5),
    "gray": (0.5, 0.5, 0.5),
    "iris": (0.35, 0.3, 0.6),
    "gold": (0.85, 0.65, 0.15),
    "blue": (0.2, 0.3, 0.75),
    "sky": (0.5, 0.7, 0.9),
    "red": (0.8, 0.12, 0.1),
    "tan": (0.7, 0.55, 0.35),
}
_UNKNOWN = (0.7, 0.7, 0.7)


class Mesh(NamedTuple):
    """Hold a model.

    Attributes:
        triangles: [F, 3, 3], corners, y upwards.
        uv: [F, 3, 2], where the corners lie in the texture, its origin at the lower left.
        material: [F], of each triangle.
        colours: [M, 4], red, green, blue and opacity in 0..1.
        textures: M of them, uint8 [Y, X, 4] or None.

    >>> read_mesh(b"v 0 0 0\\nv 1 0 0\\nv 0 1 0\\nf 1 2 3\\n").triangles.shape
    (1, 3, 3)
    """

    triangles: Float32[np.ndarray, "F 3 3"]
    uv: Float32[np.ndarray, "F 3 2"]
    material: Int32[np.ndarray, " F"]
    colours: Float32[np.ndarray, "M 4"]
    textures: tuple[Any, ...]


def colour_of(name: str) -> tuple[float, float, float]:
    """Guess a colour from a material's name; ``dk`` darkens and ``lt`` or ``light`` lightens it.

    >>> colour_of("dkgrey")[0] < colour_of("flgrey")[0] < colour_of("ltgrey")[0]
    True
    """
    plain = name.lower()
    base = next((colour for word, colour in _COLOURS.items() if word in plain), _UNKNOWN)
    dark = 0.55 ** (plain.count("dk") + plain.count("dark"))
    light = 0.5 if re.search(r"lt|light", plain) else 1.0
    red, green, blue = (1 - (1 - dark * x) * light for x in base)
    return red, green, blue


def read_mesh(content: bytes, near: Mapping[str, bytes] | None = None) -> Mesh:
    """Read a model.

    Args:
        content: of a Wavefront ``.obj`` file.
        near: the files that it may name, materials and pictures; see `jaxsys.ground.sh3f`.

    Returns:
        Triangles that are finite; polygons are cut into fans. A texture that cannot be read is left
        out, its material's colour stays.

    Raises:
        UserError: for a model without faces, with too many, or that cannot be parsed; or without
            trimesh.

    >>> read_mesh(b"v 0 0 0\\n")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: the model has no faces; ...
    """
    try:
        from trimesh.exchange.obj import load_obj
    except ImportError:
        raise UserError(
            "models are read by trimesh, which is missing; run pip install 'jaxsys[ground]'"
        ) from None
    used = [name.decode("utf-8", "replace") for name in dict.fromkeys(_USED.findall(content))]
    if b"mtllib" not in content:
        content = f"mtllib {_LIBRARY}\n".encode() + content
    if re.search(rb"^[ \t]*f[ \t]", content, re.MULTILINE) is None:
        raise _unreadable("the model has no faces")
    try:
        with np.errstate(all="ignore"):
            resolver: Any = _Resolver(near or {}, used)
            loaded = load_obj(io.BytesIO(content), resolver=resolver)
            parts = [_part(one) for one in loaded.get("geometry", {}).values()]
    except MemoryError:
        raise
    except Exception as error:  # a parser of foreign text fails in many ways
        raise _unreadable(f"the model cannot be parsed ({str(error)[:120]})") from None
    parts = [part for part in parts if part is not None]
    if not parts:
        raise _unreadable("the model has no faces")
    material = np.repeat(np.arange(len(parts), dtype=np.int32), [len(p[0]) for p in parts])
    if len(material) > _MOST_FACES:
        raise _unreadable(f"the model has {len(material)} faces, over {_MOST_FACES}")
    triangles, uv, colours, textures = zip(*parts, strict=True)
    return Mesh(
        np.concatenate(triangles),
        np.concatenate(uv),
        material,
        np.array(colours, np.float32),
        tuple(textures),
    )


def _unreadable(why: str) -> UserError:
    return UserError(f"{why}; expected a Wavefront model with faces; mend it or leave it out")


class _Resolver:
    """Hand trimesh the files that a model names, describing the materials that nobody does."""

    def __init__(self, near: Mapping[str, bytes], used: Sequence[str]):
        self.near, self.used = near, [" ".join(name.split()) for name in used]

    def get(self, name: str) -> bytes:
        described = ""
        if not name.lower().endswith(".mtl"):
            return self.near[name]
        if name in self.near:
            described = self.near[name].decode("utf-8", "replace")
        known = {" ".join(found.split()) for found in _NAMED.findall(described)}
        own = [
            f"newmtl {name}\nKd {' '.join(f'{x:.4f}' for x in colour_of(name))}\n"
            for name in self.used
            if name not in known
        ]
        return "\n".join([described, *own]).encode()

    __getitem__ = get


def _part(one: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, Any, Any] | None:
    """Give corners, their places in the texture, the colour and the texture of a part."""
    vertices, faces = np.asarray(one["vertices"], np.float32), np.asarray(one["faces"])
    if faces.ndim != 2 or faces.shape[1] < 3 or vertices.ndim != 2 or vertices.shape[1] < 3:
        return None
    # Polygons are cut into fans around their first corner.
    fan = [[0, i, i + 1] for i in range(1, faces.shape[1] - 1)]
    faces = faces[:, fan].reshape(-1, 3)
    triangles = vertices[faces][:, :, :3]
    visual = one.get("visual")
    uv = getattr(visual, "uv", None)
    places = np.zeros((len(faces), 3, 2), np.float32)
    textured = uv is not None and len(uv) == len(vertices)
    if textured:
        places = np.nan_to_num(np.asarray(uv, np.float32)[:, :2][faces])
    kept = np.isfinite(triangles).all((1, 2)) & (np.abs(triangles) < 1e9).all((1, 2))
    if not kept.any():
        return None
    material = getattr(visual, "material", None)
    told = getattr(material, "kwargs", {})
    diffuse = np.atleast_1d(np.asarray(told.get("kd", _UNKNOWN), np.float32))
    colour = diffuse[:3] if diffuse.size >= 3 else np.repeat(diffuse[:1], 3)
    texture = _texture(getattr(material, "image", None)) if textured else None
    return triangles[kept], places[kept], (*np.clip(colour, 0, 1), _opacity(told)), texture


def _opacity(told: Mapping[str, Any]) -> float:
    try:
        opacity = float(told["d"][-1]) if "d" in told else 1 - float(told["tr"][0])
    except (KeyError, ValueError, IndexError, TypeError):
        return 1.0
    return float(np.clip(opacity, _LEAST_OPACITY, 1)) if np.isfinite(opacity) else 1.0


def _texture(image: Any) -> np.ndarray | None:
    """Decode a picture whose size is bounded."""
    if image is None or image.width * image.height > _MOST_TEXTURE_PIXELS:
        return None
    try:
        plain = image.convert("RGBA")
    except Exception:  # what a picture's decoder raises depends on its format
        return None
    plain.thumbnail((_TEXTURE_SIDE, _TEXTURE_SIDE))
    return np.asarray(plain)
