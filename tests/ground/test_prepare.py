"""From a furniture library to prepared features, on libraries made here."""

import importlib.util
import io
import json
import lzma
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxsys.cli import main
from jaxsys.core.errors import UserError
from jaxsys.ground import prepared
from jaxsys.ground.catalogue import read_catalogue
from jaxsys.ground.features import mean_colour
from jaxsys.ground.game import TextVectors
from jaxsys.ground.mesh import Mesh, read_mesh
from jaxsys.ground.prepared import (
    PrepareConfig,
    prepare_features,
    prepare_views,
    read_prepared,
    read_views,
)
from jaxsys.ground.render import RenderConfig, fit, render
from jaxsys.ground.sh3f import Neighbours, open_libraries, parse_properties, read_member

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("trimesh", "embreex"))),
    reason="needs trimesh and embreex: pip install 'jaxsys[ground]'",
)

# A cube of side 2 whose faces are quadrilaterals; its front (z = 1) shows the whole texture.
CUBE = """mtllib cube.mtl
v -1 -1 1\nv 1 -1 1\nv 1 1 1\nv -1 1 1\nv -1 -1 -1\nv 1 -1 -1\nv 1 1 -1\nv -1 1 -1
vt 0 0\nvt 1 0\nvt 1 1\nvt 0 1
usemtl front paint
f 1/1 2/2 3/3 4/4
usemtl plain
f 2 6 7 3\nf 6 5 8 7\nf 5 1 4 8\nf 4 3 7 8\nf 5 6 2 1
"""
CUBE_MTL = "newmtl front paint\nKd 1 1 1\nmap_Kd halves.png\nnewmtl plain\nKd 0.2 0.4 0.6\n"
CHAIR = (
    "v 0 0 0\nv 1 0 0\nv 1 0 1\nv 0 0 1\nv 0 1 0\nv 1 1 0\nusemtl dkgrey\nf 1 2 3 4\nf 1 2 6 5\n"
)
FLAT = RenderConfig(views=2, size=32, elevation_deg=0, light=(0.0, 0.0, 1.0), ambient=0.25)
SMALL = PrepareConfig(RenderConfig(views=2, size=16, samples=1))


def _halves() -> bytes:
    """A picture, left half red, right half blue."""
    picture = np.zeros((4, 8, 3), np.uint8)
    picture[:, :4, 0] = picture[:, 4:, 2] = 255
    packed = io.BytesIO()
    Image.fromarray(picture).save(packed, "PNG")
    return packed.getvalue()


def _entry(number: int, name: str, model: str, **more: str) -> str:
    told = {"id": f"Own#{name.lower()}", "name": name, "model": f"/{model}", "width": "100"}
    told |= {"depth": "100", "height": "100", "category": "Room", "creator": "Ann"} | more
    return "".join(f"{key}#{number}={value}\n" for key, value in told.items())


def _library(file: Path, entries: list[str], extra: dict[str, bytes] | None = None) -> Path:
    parts: dict[str, bytes | str] = {
        "PluginFurnitureCatalog.properties": "license=CC0\n" + "".join(entries),
        "a/cube.obj": CUBE,
        "a/cube.mtl": CUBE_MTL,
        "a/halves.png": _halves(),
        "b/chair.obj": CHAIR,
        "b/empty.obj": "v 0 0 0\n",
        "b/odd.obj": "v 0 0 0\nf 1 2 99\n",
    }
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in (parts | (extra or {})).items():
            archive.writestr(name, content)
    return file


@pytest.fixture
def library(tmp_path):
    entries = [
        _entry(1, "Red cube", "a/cube.obj", tags="Toy, Box"),
        _entry(2, "Chair", "b/chair.obj"),
        _entry(3, "Light source", "b/empty.obj"),
        _entry(4, "Odd", "b/odd.obj"),
        _entry(5, "Climber", "../../outside.obj"),
        _entry(6, "Nothing", "a/cube.obj", width="-3"),
        _entry(7, "Woman", "a/cube.obj", category="Characters"),
    ]
    return _library(tmp_path / "own.sh3f", entries)


def _cube() -> Mesh:
    near = {"cube.mtl": CUBE_MTL.encode(), "halves.png": _halves()}
    return read_mesh(CUBE.encode(), near)


def test_properties_follow_javas_rules():
    content = (
        b"! no\r\n# no\na=1\\\n   2\nb : x\\:y \nc d\ne\\=f=g\n"
        b"h=caf\xe9 \\u20AC \\uD83D\\uDE00 \\t.\\q\nempty=\n  i =\\\\\nj=k"
    )
    found = parse_properties(content)
    assert found == {
        "a": "12",
        "b": "x:y ",
        "c": "d",
        "e=f": "g",
        "h": "café € 😀 \t.q",
        "empty": "",
        "i": "\\",
        "j": "k",
    }


def test_a_library_lists_its_models_with_credits(library):
    [opened] = open_libraries([library])
    cube = opened.models[0].thing
    assert cube == ("own-red-cube", "Red cube", ("Toy", "Box"), "Room", "own", "Ann", "CC0",
                    (100.0, 100.0, 100.0))  # fmt: skip
    assert [model.thing.name for model in opened.models][-1] == "Woman"
    assert [key for key, _ in opened.unusable] == ["own-nothing"]


def test_paths_never_leave_the_archive(library):
    [opened] = open_libraries([library])
    climber = next(m for m in opened.models if m.thing.name == "Climber")
    with pytest.raises(ValueError, match="outside of it is not in the archive"):
        read_member(opened.archive, climber.path)
    near = Neighbours(opened.archive, "a/cube.obj")
    assert near["../b/chair.obj"] == CHAIR.encode()
    assert "../../etc/passwd" not in near
    assert sorted(near) == ["cube.mtl", "cube.obj", "halves.png"]
    with pytest.raises(ValueError, match="has more than 10 bytes"):
        read_member(opened.archive, "a/cube.obj", 10)


def test_a_debian_package_is_read_as_it_is(library, tmp_path):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name in ("own.sh3f", "other.txt"):
            info = tarfile.TarInfo(f"./usr/share/{name}")
            info.size = library.stat().st_size
            tar.addfile(info, io.BytesIO(library.read_bytes()))
    deb = b"!<arch>\n"
    for name, content in (
        ("debian-binary", b"2.0"),
        ("data.tar.xz", lzma.compress(packed.getvalue())),
    ):
        deb += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        deb += content + b"\n" * (len(content) % 2)
    file = tmp_path / "own.deb"
    file.write_bytes(deb)
    [direct], [unpacked] = open_libraries([library]), open_libraries([file])
    assert unpacked.models == direct.models
    file.write_bytes(deb[:300])
    with pytest.raises(UserError, match=r"cannot be read as a Debian package .*apt-get download"):
        open_libraries([file])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.sh3f", b"no zip", r"the library x in .* cannot be read"),
        ("x.txt", None, r"is not there; .*apt-get download sweethome3d-furniture"),
        ("x.deb", b"!<arch>\n", "it has no data"),
    ],
)
def test_libraries_that_cannot_be_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_libraries([tmp_path / name])


def test_a_jar_without_furniture_is_passed_over(library, tmp_path):
    with zipfile.ZipFile(tmp_path / "tools.jar", "w") as archive:
        archive.writestr("Main.class", b"")
    assert [one.name for one in open_libraries([tmp_path])] == ["own"]


def test_a_mesh_agrees_with_trimesh():
    trimesh = pytest.importorskip("trimesh")
    own, theirs = _cube(), trimesh.creation.box((2, 2, 2))
    corners = own.triangles.astype(float)
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    assert np.linalg.norm(normals, axis=1).sum() / 2 == pytest.approx(theirs.area)
    # Outward everywhere, by the divergence theorem.
    assert np.einsum("fa,fa->", normals, corners.mean(1)) / 6 == pytest.approx(theirs.volume)
    assert [None if x is None else x.shape for x in own.textures].count((4, 8, 4)) == 1
    assert {tuple(x.round(1)) for x in own.colours} == {
        (1.0, 1.0, 1.0, 1.0),
        tuple(np.float32([0.2, 0.4, 0.6, 1.0]).round(1)),
    }


def test_a_material_that_nobody_describes_gets_the_colour_of_its_name():
    assert read_mesh(CHAIR.encode()).colours[0, :3] == pytest.approx([0.275] * 3)


def test_views_show_texture_shade_and_sides():
    front, back = render(_cube(), FLAT)
    inside = front[8:24, 8:24].astype(int)
    # The light comes from the camera, so the front is fully lit: the texture as it is, upright.
    assert (inside[:, :6] == [255, 0, 0]).all()
    assert (inside[:, -6:] == [0, 0, 255]).all()
    assert np.abs(back[16, 16].astype(int) - [51, 102, 153]).max() <= 1
    for corner in (front[0, 0], front[-1, -1]):
        assert corner.tolist() == [255] * 3
    # A light from behind leaves the ambient share.
    dark = render(_cube(), RenderConfig(2, 32, 0, light=(0.0, 0.0, -1.0), ambient=0.25))[1]
    assert np.abs(dark[16, 16].astype(int) - [13, 26, 38]).max() <= 1


def test_what_is_behind_glass_is_mixed_in():
    pane = "v -1 -1 0\nv 1 -1 0\nv 1 1 0\nv -1 1 0\nv -1 -1 -1\nv 1 -1 -1\nv 1 1 -1\nv -1 1 -1\n"
    pane += "mtllib m.mtl\nusemtl glass\nf 1 2 3 4\nusemtl wall\nf 5 6 7 8\n"
    near = {"m.mtl": b"newmtl glass\nKd 0 0 0\nd 0.5\nnewmtl wall\nKd 1 0 0\n"}
    seen = render(read_mesh(pane.encode(), near), FLAT)[0][16, 16].astype(int)
    assert np.abs(seen - [128, 0, 0]).max() <= 2


def test_every_view_holds_the_whole_object_and_fills_the_picture():
    pictures = render(_cube(), RenderConfig(views=8, size=48), size_cm=(200, 30, 80))
    drawn = (pictures < 250).any(-1)
    assert not drawn[:, [0, -1]].any()
    assert not drawn[:, :, [0, -1]].any()
    reach = max(np.ptp(np.argwhere(one)[:, axis]) for one in drawn for axis in (0, 1))
    assert reach > 0.85 * 48
    # Half a turn apart, a box shows the same outline.
    assert (drawn[0] == drawn[4]).mean() > 0.98


def test_fit_turns_before_it_stretches():
    turned = fit(_cube(), (100, 200, 400), (1, 0, 0, 0, 0, -1, 0, 1, 0))
    extent = np.ptp(turned.reshape(-1, 3), axis=0)
    assert extent / extent[0] == pytest.approx([1, 4, 2])
    with pytest.raises(UserError, match="no finite size"):
        fit(_cube()._replace(triangles=np.zeros((12, 3, 3), np.float32)))


def test_unreadable_meshes_are_listed_skipped_and_counted(library, tmp_path):
    out = tmp_path / "out"
    done = prepare_views([library], out, SMALL)
    assert [one.key for one in done.catalogue.objects] == ["own-red-cube", "own-chair"]
    why = {one.key: one.why for one in done.refused}
    assert set(why) == {"own-nothing", "own-light-source", "own-odd", "own-climber"}
    assert why["own-light-source"] == "the model has no faces"
    lines = (out / "refused.jsonl").read_text().splitlines()
    assert {json.loads(line)["key"] for line in lines} == set(why)
    told = json.loads((out / "prepared.json").read_text())
    assert (told["objects"], told["refused"]) == (2, 4)


def test_a_run_goes_on_where_it_was_stopped(library, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    prepare_views([library], whole, SMALL)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_views([library], part, SMALL, progress=stop)
    assert prepare_views([library], part, SMALL).drawn == 1
    assert prepare_views([library], part, SMALL).drawn == 0
    for name in (
        "views/own-red-cube.png",
        "views/own-chair.png",
        "catalogue.jsonl",
        "prepared.json",
    ):
        assert (part / name).read_bytes() == (whole / name).read_bytes()
    with pytest.raises(UserError, match="was prepared with another setting of render"):
        prepare_views([library], part, PrepareConfig(RenderConfig(views=3, size=16)))


def test_features_are_those_of_the_views(library, tmp_path):
    prepare_views([library], tmp_path, SMALL)
    encoder = mean_colour()
    assert prepare_features(tmp_path, encoder) == 2
    assert prepare_features(tmp_path, encoder) == 0
    assert prepare_features(tmp_path, encoder, activations=True) == 2
    found = read_prepared(tmp_path, "mean-colour", activations=True, views=[1])
    assert found.features.shape == found.pixels.shape == (2, 1, 3)
    for i, thing in enumerate(read_catalogue(tmp_path / "catalogue.jsonl").objects):
        mean = read_views(tmp_path, thing.key)[1].mean((0, 1)) / 255
        assert found.features[i, 0] == pytest.approx(mean, abs=1e-5)
    assert found.mask.all()


def test_features_that_do_not_fit_are_told_of(library, tmp_path):
    prepare_views([library], tmp_path, SMALL)
    prepare_features(tmp_path, mean_colour())
    with pytest.raises(UserError, match="zero views are chosen"):
        read_prepared(tmp_path, "mean-colour", views=[])
    with pytest.raises(UserError, match=r"lacks the features and activations .* --activations"):
        read_prepared(tmp_path, "mean-colour", activations=True)
    file = tmp_path / "features_mean-colour" / "own-chair.npz"
    np.savez(file, features=np.zeros((2, 7), np.float32))
    with pytest.raises(UserError, match=r"have the shapes \[\(2, 3\), \(2, 7\)\]"):
        read_prepared(tmp_path, "mean-colour")
    file.unlink()
    with pytest.raises(UserError, match="lacks the features of own-chair"):
        read_prepared(tmp_path, "mean-colour")
    (tmp_path / "views" / "own-chair.png").write_bytes(b"?")
    with pytest.raises(UserError, match=r"cannot be read .* square views"):
        read_views(tmp_path, "own-chair")


def test_the_command_prepares_and_says_what_it_left_out(library, tmp_path, capsys):
    out = str(tmp_path / "out")
    options = ["--views", "1", "--size", "8", "--encoder", "mean-colour", "--json"]
    assert main(["ground", "prepare", "--libraries", str(library), "--out", out, *options]) == 0
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert (told["objects"], told["drawn"], told["encoded"]) == (2, 2, 2)
    assert len(told["refused"]) == printed.err.count("left out: ") == 4
    assert main(["ground", "prepare", "--out", out, "--encoder", "none"]) == 2
    error = capsys.readouterr().err
    assert "apt-get download sweethome3d-furniture sweethome3d" in error
    assert len(error.strip().splitlines()) == 1


def test_vectors_of_texts_are_computed_once(tmp_path, monkeypatch):
    made = []

    def encode(texts, encoder):
        made.append(tuple(texts))
        return TextVectors(np.ones((len(texts), 2), np.float32), word_mask=np.ones((1, 3), bool))

    monkeypatch.setattr(prepared, "text_vectors", encode)
    for texts in (["a", "b"], ["a", "b"], ["a"]):
        found = prepared.cached_text_vectors(tmp_path, texts)
        assert found.vectors.shape == (len(texts), 2)
        assert found.words is None
    assert made == [("a", "b"), ("a",)]
    file = next(f for f in (tmp_path / "texts").iterdir() if f.stat().st_size)
    file.write_bytes(b"?")
    for texts in (["a", "b"], ["a"]):
        prepared.cached_text_vectors(tmp_path, texts)
    assert len(made) == 3
