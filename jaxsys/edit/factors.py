"""Edits as low-rank factors: undone to the bit, composed, kept in a file, written into files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.checkpoint import read_safetensors, write_safetensors
from jaxsys.core.checkpoint.safetensors import read_header
from jaxsys.core.errors import UserError
from jaxsys.core.tree import flatten
from jaxsys.edit.contract import Editable, Info
from jaxsys.edit.editable import add_delta, get_matrix, with_leaf
from jaxsys.models import lm
from jaxsys.models.lm.layout import subtree


def apply(model: Editable, params: Mapping[str, Any], info: Info) -> dict[str, Any]:
    """Add an edit's ΔW = A Bᵀ to the matrices.

    Raises:
      UserError: for a matrix that the model lacks or of another shape, or numbers not finite.

    >>> config = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> info = Info({"w": (np.ones((2, 1), np.float32), np.ones((3, 1), np.float32))}, {})
    >>> apply(Editable(config, None), {"w": jnp.zeros((2, 3))}, info)["w"].sum()
    Array(6., dtype=float32)
    """
    known = flatten(params)
    edited = dict(params)
    for path, (a, b) in info.factors.items():
        if path not in known:
            raise UserError(
                f"the edit changes {path}, which this model lacks; expected one of the same "
                "family and size; apply it to the model that it was made for"
            )
        shape = get_matrix(model.config, params, path).shape
        if (len(a), len(b)) != tuple(shape):
            raise UserError(
                f"the edit of {path} is [{len(a)}, {len(b)}] and the matrix {list(shape)}; apply "
                "it to the model that it was made for"
            )
        check_finite(path, a, b)
        edited = add_delta(model.config, edited, path, a, b)
    return edited


def check_finite(path: str, a: Any, b: Any) -> None:
    """Refuse a change that is not made of finite numbers.

    Raises:
      UserError: naming the matrix.

    >>> check_finite("w", np.ones((1, 1)), np.ones((1, 1)))
    """
    with np.errstate(over="ignore", invalid="ignore"):
        size = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    if not np.isfinite(size):
        raise UserError(
            f"the change of {path} is not finite; expected numbers; the requests may contradict "
            "one another or the regularisation be too small: raise it or edit fewer at a time"
        )


def keep(params: Mapping[str, Any], info: Info) -> dict[str, Any]:
    """Give the matrices that an edit is about to change, for `undo`; nothing is copied.

    >>> keep({"w": 1, "v": 2}, Info({"w": (0, 0)}, {}))
    {'w': 1}
    """
    return {path: subtree(params, path) for path in info.factors}


def undo(
    model: Editable, params: Mapping[str, Any], info: Info, before: Mapping[str, Any]
) -> dict[str, Any]:
    """Take an edit back, to the bit.

    Subtracting A Bᵀ would round a second time, so the matrices from before (`keep`) are put back;
    the factors serve to make sure that they are the right ones.

    Args:
      model: its configuration is used.
      params: edited parameters; of several edits the last must be undone first.
      info: the edit, or a composition of the last edits.
      before: path to the matrix before it.

    Raises:
      UserError: if the present matrix is not the old one with this edit.

    >>> config = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> model, old = Editable(config, None), {"w": jnp.full((2, 3), 0.1)}
    >>> info = Info({"w": (np.ones((2, 1), np.float32), np.ones((3, 1), np.float32))}, {})
    >>> undo(model, apply(model, old, info), info, keep(old, info))["w"] is old["w"]
    True
    """
    restored = dict(params)
    for path in info.factors:
        if path not in before:
            raise UserError(
                f"the matrix {path} from before the edit is not at hand; expected it to be kept "
                "(factors.keep) or saved with the edit; load the unedited model instead"
            )
    expected = apply(model, _put(params, before), info)
    for path, (a, b) in info.factors.items():
        now = np.asarray(get_matrix(model.config, params, path), np.float64)
        then = np.asarray(get_matrix(model.config, expected, path), np.float64)
        # A composition was added piece by piece, each of them rounded to the matrix' dtype.
        precision = float(jnp.finfo(subtree(params, path).dtype).eps)
        slack = 16 * precision * (np.abs(then).max() + np.linalg.norm(a) * np.linalg.norm(b))
        if np.abs(now - then).max() > slack:
            raise UserError(
                f"{path} is not what this edit left; another edit came after it or it was never "
                "applied; undo the last edit first"
            )
        restored = with_leaf(restored, path, before[path])
    return restored


def _put(params: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree = dict(params)
    for path, leaf in leaves.items():
        tree = with_leaf(tree, path, leaf)
    return tree


def compose(infos: Sequence[Info]) -> Info:
    """Join edits into one that does what they do one after another, up to rounding.

    >>> one = Info({"w": (np.ones((2, 1)), np.ones((3, 1)))}, {})
    >>> compose([one, one]).factors["w"][0].shape
    (2, 2)
    """
    joined: dict[str, tuple[Any, Any]] = {}
    for info in infos:
        for path, (a, b) in info.factors.items():
            if path in joined:
                before = joined[path]
                a, b = (np.concatenate(pair, axis=1) for pair in zip(before, (a, b), strict=True))
            joined[path] = (np.asarray(a), np.asarray(b))
    return Info(joined, {"edits": len(infos)})


def save(
    path: str | Path,
    info: Info,
    *,
    before: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write an edit as safetensors in a folder.

    Args:
      path: the folder.
      info: its factors are written as ``A.PATH`` and ``B.PATH``.
      before: matrices from before, so that the file can undo itself to the bit.
      about: what is to be known beside them (requests, method); anything that JSON takes.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> info = Info({"w": (np.ones((2, 1), np.float32), np.ones((3, 1), np.float32))}, {})
    >>> _ = save(folder, info, about={"method": "rome"})
    >>> load(folder)[2]
    {'method': 'rome'}
    """
    arrays = {}
    for name, (a, b) in info.factors.items():
        arrays |= {f"A.{name}": np.asarray(a), f"B.{name}": np.asarray(b)}
    arrays |= {f"before.{name}": np.asarray(w) for name, w in (before or {}).items()}
    metadata = {"about": json.dumps(dict(about or {}), ensure_ascii=False)}
    return write_safetensors(path, arrays, arrays.__getitem__, metadata=metadata)


def load(path: str | Path) -> tuple[Info, dict[str, Any], dict[str, Any]]:
    """Read an edit that `save` wrote.

    Returns:
      The edit, the matrices from before (empty where they were not saved), and what was noted.

    Raises:
      UserError: for what holds no edit.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> _ = save(folder, Info({"w": (np.ones((2, 1)), np.ones((3, 1)))}, {}))
    >>> load(folder)[0].factors["w"][1].shape
    (3, 1)
    """
    tensors = read_safetensors(path)
    names = {name[2:] for name in tensors if name.startswith("A.")}
    for name in names:
        a, b = tensors[f"A.{name}"], tensors.get(f"B.{name}")
        if b is None or a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
            names = set()
            break
    if not names:
        raise UserError(
            f"{path} holds no edit; expected factors A and B of each matrix, as jaxsys edit apply "
            "writes them; correct the path"
        )
    file = Path(path) / "model.safetensors" if Path(path).is_dir() else path
    try:
        about = json.loads(read_header(file).metadata.get("about", "{}"))
    except ValueError:
        about = {}
    factors = {name: (tensors[f"A.{name}"], tensors[f"B.{name}"]) for name in sorted(names)}
    before = {n.removeprefix("before."): t for n, t in tensors.items() if n.startswith("before.")}
    return Info(factors, {}), before, about if isinstance(about, dict) else {}


def into_files(source: str | Path, info: Info, out: str | Path) -> list[Path]:
    """Write a checkpoint's folder anew with an edit in it, one tensor at a time.

    Args:
      source: what `models.lm.open_tensors` opens.
      info: the edit.
      out: folder of the edited model; tokenizer files are not copied.

    Returns:
      The files written.

    Raises:
      UserError: if the edit does not belong to the model.

    >>> import tempfile
    >>> config = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> source, out = tempfile.mkdtemp(), tempfile.mkdtemp()
    >>> _ = lm.save(source, lm.init(jax.random.key(0), config), config)
    >>> [file.name for file in into_files(source, Info({}, {}), out)]
    ['config.json', 'model.safetensors']
    """
    config, tensors = lm.open_tensors(source)
    model = Editable(config, None)
    named = lm.shapes(config)
    missing = [path for path in info.factors if path not in named]
    if missing:
        raise UserError(
            f"the edit changes {missing[0]}, which {source} lacks; apply it to the model that it "
            "was made for"
        )

    def produce(name: str) -> Any:
        if name not in info.factors:
            return tensors[name]
        one = Info({"w": info.factors[name]}, {})
        return apply(model, {"w": jnp.asarray(tensors[name])}, one)["w"]

    return lm.write_folder(out, config, _as_stored(named, tensors), produce)


def _as_stored(named: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    dtypes = getattr(tensors, "dtypes", None)
    return {
        name: jax.ShapeDtypeStruct(
            leaf.shape, dtypes[name] if dtypes else np.asarray(tensors[name]).dtype
        )
        for name, leaf in named.items()
    }
