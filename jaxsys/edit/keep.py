"""Keep a half-done sequence of edits on disk: the changed tensors, and any method's state.

Nothing is pickled. A state is written as JSON that says how it is built, with its arrays as tensors
of one safetensors file; the only classes that are made again are tuples and dataclasses of
`jaxsys.edit` itself.
"""

import dataclasses
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.checkpoint import read_header, read_safetensors, write_safetensors
from jaxsys.core.errors import UserError
from jaxsys.core.report import to_json
from jaxsys.core.tree import flatten, unflatten


class Kept(NamedTuple):
    """Hold what was kept.

    Attributes:
      params: the edited parameters.
      state: of the method.
      notes: what else was written down, such as how many edits were done.

    >>> Kept({}, None, {"n": 5}).notes["n"]
    5
    """

    params: Any
    state: Any
    notes: dict[str, Any]


def changed_leaves(params: Any, base: Any) -> dict[str, Any]:
    """List the tensors that an edit replaced, by path.

    Methods leave the others as they are, the same objects; so nothing is compared.

    >>> w = np.ones(2)
    >>> list(changed_leaves({"a": w, "b": w + 1}, {"a": w, "b": w}))
    ['b']
    """
    before = flatten(base)
    return {path: leaf for path, leaf in flatten(params).items() if leaf is not before.get(path)}


def keep(folder: str | Path, params: Any, base: Any, state: Any, notes: Mapping[str, Any]) -> None:
    """Write the changed tensors and the state; what stood in the folder is replaced at once.

    Args:
      folder: made if need be.
      params: edited.
      base: unedited parameters.
      state: of the method: None, numbers, texts, arrays, and tuples, lists, dicts and dataclasses
        of them.
      notes: JSON-ready.

    Raises:
      UserError: for a state that holds something else.

    >>> import tempfile
    >>> folder, w = tempfile.mkdtemp(), {"w": np.zeros(2, np.float32)}
    >>> keep(folder, {"w": np.ones(2, np.float32)}, w, {3: np.eye(2, dtype=np.float32)}, {"n": 1})
    >>> again = restore(folder, w)
    >>> again.params["w"].tolist(), again.state[3].tolist(), again.notes
    ([1.0, 1.0], [[1.0, 0.0], [0.0, 1.0]], {'n': 1})
    """
    arrays = {f"params/{path}": leaf for path, leaf in changed_leaves(params, base).items()}
    plan = _encode(state, arrays, "state")
    arrays.setdefault("empty", np.zeros(1, np.float32))  # a file must hold a tensor
    fields = {"state": to_json(plan), "notes": to_json(notes)}
    write_safetensors(folder, arrays, lambda name: np.asarray(arrays[name]), metadata=fields)


def restore(folder: str | Path, base: Any) -> Kept:
    """Read what `keep` wrote.

    Args:
      folder: as given to `keep`.
      base: the unedited parameters.

    Raises:
      UserError: if the file is damaged or was not written by `keep`.

    >>> restore("no/such/folder", {})
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: ...
    """
    file = Path(folder) / "model.safetensors"
    arrays = read_safetensors(file)
    fields = read_header(file).metadata
    try:
        plan, notes = json.loads(fields["state"]), json.loads(fields["notes"])
        state = _decode(plan, arrays)
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ImportError,
        RecursionError,
    ) as error:
        raise UserError(
            f"{file} holds no kept sequence of edits ({type(error).__name__}); delete it and the "
            "edits are done again"
        ) from None
    flat = flatten(base)
    for name, array in arrays.items():
        if name.startswith("params/"):
            path = name.removeprefix("params/")
            if path not in flat or flat[path].shape != array.shape:
                raise UserError(
                    f"{file} holds a tensor {path[:80]!r} that is not of this model; expected the "
                    "model that was edited; delete the file or name the right model"
                )
            flat[path] = jnp.asarray(array)
    return Kept(unflatten(flat), state, notes)


def _encode(value: Any, arrays: dict[str, Any], name: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        arrays[name] = value
        return {"array": name, "on": "device" if isinstance(value, jax.Array) else "host"}
    if isinstance(value, Mapping):
        items = [[k, _encode(v, arrays, f"{name}/{k}")] for k, v in value.items()]
        return {"dict": items}
    if isinstance(value, tuple | list):
        parts = [_encode(v, arrays, f"{name}/{i}") for i, v in enumerate(value)]
        if hasattr(value, "_fields"):
            return {"class": _class_name(type(value)), "fields": parts}
        return {"tuple" if isinstance(value, tuple) else "list": parts}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value)]
        parts = [_encode(getattr(value, f), arrays, f"{name}/{f}") for f in fields]
        return {"class": _class_name(type(value)), "fields": parts}
    raise UserError(
        f"a state holds a {type(value).__name__} at {name}; expected numbers, texts, arrays, and "
        "tuples, lists, dicts or dataclasses of them; keep the sequence in memory instead"
    )


def _class_name(cls: type) -> str:
    if not cls.__module__.startswith("jaxsys.edit."):
        raise UserError(
            f"a state holds a {cls.__qualname__} of {cls.__module__}; expected classes of "
            "jaxsys.edit; keep the sequence in memory instead"
        )
    return f"{cls.__module__}:{cls.__qualname__}"


def _decode(plan: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    if "value" in plan:
        return plan["value"]
    if "array" in plan:
        array = arrays[plan["array"]]
        return jnp.asarray(array) if plan["on"] == "device" else np.array(array)
    if "dict" in plan:
        return {key: _decode(value, arrays) for key, value in plan["dict"]}
    for kind, make in (("tuple", tuple), ("list", list)):
        if kind in plan:
            return make(_decode(value, arrays) for value in plan[kind])
    return _class(plan["class"])(*(_decode(value, arrays) for value in plan["fields"]))


def _class(name: str) -> type:
    module, _, qualified = name.partition(":")
    if not module.startswith("jaxsys.edit.") or not qualified.isidentifier():
        raise ValueError(name)
    cls = getattr(importlib.import_module(module), qualified)
    is_tuple = isinstance(cls, type) and issubclass(cls, tuple) and hasattr(cls, "_fields")
    if not (is_tuple or (isinstance(cls, type) and dataclasses.is_dataclass(cls))):
        raise ValueError(name)
    return cls
