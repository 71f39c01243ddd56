"""Read Sweet Home 3D's furniture libraries: named household models whose licences are free.

A library (``.sh3f``) is a zip archive of Wavefront models beside a Java properties file that says
what each is called; the program's own jar carries a hundred more in the same form. Both are in
Debian's packages, which are ``ar`` archives, so a downloaded ``.deb`` is read as it is.

What comes from such a file is not trusted: every size is bounded before it is read, and a path
that leaves the archive is not followed.
"""

import io
import lzma
import math
import posixpath
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from jaxsys.core.errors import UserError
from jaxsys.ground.catalogue import Object, key_of

# People, what is part of a building and no object of its own.
DROPPED = ("Characters", "Doors and windows", "Staircases")
DEBIAN = "apt-get download sweethome3d-furniture sweethome3d"

_MOST_LIBRARY_BYTES = 1 << 29
_MOST_CATALOGUE_BYTES = 1 << 24
_MOST_MODEL_BYTES = 1 << 26
_MOST_MODELS = 1 << 16
_CATALOGUE = re.compile(r"(.*/)?(Plugin|Default)FurnitureCatalog\.properties")
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_PLAIN = {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}


class Model(NamedTuple):
    """Describe where an object's mesh lies.

    Attributes:
        thing: the object.
        path: of its Wavefront file in the archive.
        rotation: row-major 3 × 3, which turns the mesh upright.

    >>> Model(Object("k", "n", (), "c", "l", "c", "CC0", (1, 2, 3)), "a/b.obj").rotation[0]
    1.0
    """

    thing: Object
    path: str
    rotation: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


class Library(NamedTuple):
    """Hold an open library.

    Attributes:
        name: its file's name without the ending; ``default`` for the program's own.
        archive: what `read_member` reads from.
        models: that its catalogue names, in its order.
        unusable: entries of the catalogue without a name, a model or a size: (key, reason).

    >>> Library("Scopia", zipfile.ZipFile(io.BytesIO(), "w"), (), ()).name
    'Scopia'
    """

    name: str
    archive: zipfile.ZipFile
    models: tuple[Model, ...]
    unusable: tuple[tuple[str, str], ...]


def parse_properties(content: bytes) -> dict[str, str]:
    """Parse a Java properties file in ISO 8859-1 with its escapes.

    Reference: java.util.Properties.load of the Java platform.

    >>> parse_properties(b"# no\\nname#1 = Bill 10\\\\u20ac\\ntags = a,\\\\\\n  b")
    {'name#1': 'Bill 10€', 'tags': 'a,b'}
    """
    found: dict[str, str] = {}
    lines = iter(re.split(r"\r\n|\n|\r", content.decode("latin-1")))
    for line in lines:
        line = line.lstrip(" \t\f")
        if not line or line[0] in "#!":
            continue
        while (len(line) - len(line.rstrip("\\"))) % 2:  # an odd number continues the line
            line = line[:-1] + next(lines, "").lstrip(" \t\f")
        at = 0
        while at < len(line) and line[at] not in "=: \t\f":
            at += 2 if line[at] == "\\" else 1
        rest = line[at:].lstrip(" \t\f")
        rest = rest[1:].lstrip(" \t\f") if rest[:1] in ("=", ":") else rest
        found[_unescape(line[:at])] = _unescape(rest)
    return found


def _unescape(text: str) -> str:
    def one(match: re.Match[str]) -> str:
        code = match[1]
        return chr(int(code[1:], 16)) if len(code) == 5 else _PLAIN.get(code, code)

    plain = _ESCAPE.sub(one, text)
    # Characters beyond the first plane are written as two halves.
    return plain.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def open_libraries(paths: Sequence[str | Path]) -> list[Library]:
    """Open every library that some files and folders hold.

    Args:
        paths: ``.sh3f`` or ``.jar`` files, ``.deb`` packages that hold some, or folders with any of
            these at any depth.

    Returns:
        The libraries, sorted by name; of two with one name the first is kept.

    Raises:
        UserError: for a path that is not there, a damaged archive, or paths without a library.

    >>> open_libraries([])
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: no furniture library is given; ... run `apt-get download ...
    """
    found: dict[str, Library] = {}
    for path in map(Path, paths):
        for name, source in _sources(path):
            library = _open(name, source, path)
            if library is not None:
                found.setdefault(library.name, library)
    if not found:
        given = f"{', '.join(map(str, paths))} hold no" if paths else "no"
        raise UserError(
            f"{given} furniture library{'' if paths else ' is given'}; expected .sh3f files, "
            f"Debian packages or folders that hold them; run `{DEBIAN}` and name the two files"
        )
    return [found[name] for name in sorted(found)]


def _sources(path: Path) -> Iterator[tuple[str, Path | io.BytesIO]]:
    if path.is_dir():
        endings = (".sh3f", ".jar", ".deb")
        for file in sorted(p for p in path.rglob("*") if p.suffix in endings and p.is_file()):
            yield from _sources(file)
    elif not path.is_file():
        raise UserError(
            f"{path} is not there; expected a .sh3f, .jar or .deb file or a folder of them; "
            f"correct the path, or run `{DEBIAN}`"
        )
    elif path.suffix == ".deb":
        yield from _in_package(path)
    else:
        yield path.stem, path


def _in_package(path: Path) -> Iterator[tuple[str, io.BytesIO]]:
    """Find libraries in the data part of a Debian package."""
    try:
        with path.open("rb") as file, tarfile.open(fileobj=_data_of(path, file), mode="r|*") as tar:
            for member in tar:
                name = posixpath.basename(member.name)
                if not member.isfile() or not name.endswith((".sh3f", ".jar")):
                    continue
                if member.size > _MOST_LIBRARY_BYTES:
                    raise UserError(
                        f"{member.name} in {path} has {member.size} bytes; expected at most "
                        f"{_MOST_LIBRARY_BYTES}; unpack it and leave models out"
                    )
                opened = tar.extractfile(member)
                assert opened is not None
                yield posixpath.splitext(name)[0], io.BytesIO(opened.read())
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} cannot be read as a Debian package ({error}); expected one whose data is "
            f"packed by xz or gzip; run `{DEBIAN}` again, or unpack it and name the folder"
        ) from None


class _Part(io.RawIOBase):
    """Read a stretch of a file as a file."""

    def __init__(self, file: IO[bytes], size: int):
        self.file, self.left = file, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        piece = self.file.read(min(len(buffer), self.left))
        self.left -= len(piece)
        buffer[: len(piece)] = piece
        return len(piece)


def _data_of(path: Path, file: IO[bytes]) -> io.BufferedReader:
    """Go to the member ``data.tar.*`` of an ar archive, whose headers are 60 bytes long."""
    if file.read(8) != b"!<arch>\n":
        raise ValueError("it is no ar archive")
    while len(header := file.read(60)) == 60 and header[58:] == b"`\n":
        size = int(header[48:58])
        if size < 0:
            break
        if header.startswith(b"data.tar"):
            return io.BufferedReader(_Part(file, size), 1 << 18)
        file.seek(size + size % 2, 1)
    raise ValueError("it has no data")


def _open(name: str, source: Path | io.BytesIO, path: Path) -> Library | None:
    """Open an archive; None if it is no library, as most jars are not."""
    try:
        archive = zipfile.ZipFile(source)
        listed = [item for item in archive.namelist() if _CATALOGUE.fullmatch(item)]
        if not listed:
            return None
        found = parse_properties(read_member(archive, listed[0], _MOST_CATALOGUE_BYTES))
    except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
        raise UserError(
            f"the library {name} in {path} cannot be read ({error}); expected a zip archive with "
            "a furniture catalogue; fetch it again or leave it out"
        ) from None
    if "DefaultFurnitureCatalog" in listed[0]:
        name = "default"
    models, unusable = _models(name, found)
    return Library(name, archive, models, unusable)


def _models(
    library: str, found: Mapping[str, str]
) -> tuple[tuple[Model, ...], tuple[tuple[str, str], ...]]:
    numbers = sorted(int(k[5:]) for k in found if re.fullmatch(r"name#\d{1,8}", k))
    models: dict[str, Model] = {}
    unusable: list[tuple[str, str]] = []
    for number in numbers[:_MOST_MODELS]:
        about = lambda name, n=number: found.get(f"{name}#{n}", "").strip()  # noqa: E731
        # Its own name for itself is like "Scopia#little_lamp".
        own = about("id").split("#")[-1] or str(number)
        key = key_of(library, own)
        while key in models:
            key = key_of(library, own, str(number))
            number += 1
        try:
            size = tuple(float(about(axis)) for axis in ("width", "depth", "height"))
            turn = (
                tuple(float(x) for x in about("modelRotation").split())
                or Model._field_defaults["rotation"]
            )
            sound = len(turn) == 9 and all(0 < x < 1e6 for x in size) and about("name")
            if not sound or not all(map(math.isfinite, turn)) or not about("model"):
                raise ValueError
        except ValueError:
            unusable.append((key, "its entry lacks a name, a model, a size or a rotation of nine"))
            continue
        thing = Object(
            key,
            about("name"),
            tuple(tag.strip() for tag in about("tags").split(",") if tag.strip()),
            about("category") or "Miscellaneous",
            library,
            about("creator"),
            " ".join((about("license") or found.get("license", "")).split()),
            (size[0], size[1], size[2]),
        )
        models[key] = Model(thing, _inside("", about("model")), turn)
    return tuple(models.values()), tuple(unusable)


def _inside(folder: str, name: str) -> str:
    """Join a path within an archive; empty if it leaves the archive."""
    plain = name.strip().replace("\\", "/")
    joined = posixpath.normpath(posixpath.join("/", folder, plain.lstrip("/")))
    climbs = posixpath.normpath(posixpath.join(folder, plain.lstrip("/"))).startswith("..")
    return "" if climbs else joined.lstrip("/")


def read_member(archive: zipfile.ZipFile, name: str, most_bytes: int = _MOST_MODEL_BYTES) -> bytes:
    """Read a file of an archive whose size is bounded.

    Raises:
        ValueError: if it is not there, encrypted, damaged, or larger.

    >>> archive = zipfile.ZipFile(io.BytesIO(), "w")
    >>> archive.writestr("a", b"text")
    >>> read_member(archive, "a")
    b'text'
    """
    try:
        with archive.open(name) as file:
            content = file.read(most_bytes + 1)
    except KeyError:
        raise ValueError(f"{name or 'a path outside of it'} is not in the archive") from None
    except (RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{name} is damaged or locked ({error})") from None
    if len(content) > most_bytes:
        raise ValueError(f"{name} has more than {most_bytes} bytes")
    return content


class Neighbours(Mapping[str, bytes]):
    """Give the files beside a model, such as its materials and textures, by the names it uses.

    >>> archive = zipfile.ZipFile(io.BytesIO(), "w")
    >>> archive.writestr("a/wood.png", b"...")
    >>> near = Neighbours(archive, "a/chair.obj")
    >>> near["wood.png"], "../../wood.png" in near
    (b'...', False)
    """

    def __init__(self, archive: zipfile.ZipFile, model: str):
        self.archive, self.folder = archive, posixpath.dirname(model)

    def __getitem__(self, name: str) -> bytes:
        """Read a file; KeyError if there is none such that may be read."""
        try:
            return read_member(self.archive, _inside(self.folder, name))
        except ValueError as error:
            raise KeyError(str(error)) from None

    def __contains__(self, name: object) -> bool:
        """Tell whether a file is there, reading nothing."""
        return isinstance(name, str) and _inside(self.folder, name) in self.archive.NameToInfo

    def __iter__(self) -> Iterator[str]:
        """Name the files of the model's own folder."""
        start = f"{self.folder}/" if self.folder else ""
        return (n[len(start) :] for n in self.archive.namelist() if n.startswith(start))

    def __len__(self) -> int:
        """Count them."""
        return sum(1 for _ in self)
