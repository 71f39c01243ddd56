"""Models on disk: Hugging Face folders, GGUF and llama2.c files."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core import report
from jaxsys.core.checkpoint import read_llama2c, read_safetensors, write_safetensors
from jaxsys.core.errors import UserError
from jaxsys.core.tree import flatten, unflatten
from jaxsys.models.lm.config import LMConfig
from jaxsys.models.lm.families import config_from_hf, config_to_hf, layout_of
from jaxsys.models.lm.gguf import HfTensors, gguf_config, gguf_tensors, halves
from jaxsys.models.lm.init import shapes

MOST_CONFIG_BYTES = 1 << 24
# Constants that older versions of transformers wrote beside the parameters.
BUFFERS = (
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    ".rotary_emb.inv_freq",
)


def load(path: str | Path, *, dtype: Any = None) -> tuple[dict[str, Any], LMConfig]:
    """Load a model; on a CPU its tensors stay memory maps where their alignment allows.

    Args:
        path: a Hugging Face folder (``config.json`` beside safetensors), a ``.gguf`` file of the
            Llama form (its quantised tensors become float32), or a llama2.c ``.bin`` file.
        dtype: of the parameters; None keeps the file's.

    Returns:
        Nested dict whose dotted paths are the checkpoint's tensor names in the Hugging Face form,
        and the configuration. Query and key rows of GGUF and llama2.c files are put into the
        order of that form, in which rotary pairs are halves of a head.

    Raises:
        UserError: for files that are absent, damaged, or of a model that is not supported.

    >>> import tempfile
    >>> from jaxsys.models.lm.init import init
    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = save(folder, init(jax.random.key(0), config), config)
    >>> load(folder)[1] == config
    True
    """
    config, tensors = open_tensors(path)
    return unflatten({name: _to_device(tensors[name], dtype) for name in shapes(config)}), config


def open_tensors(path: str | Path) -> tuple[LMConfig, Mapping[str, np.ndarray]]:
    """Open a model in any form that `load` takes and check it, reading no tensor.

    Args:
        path: as for `load`.

    Returns:
        The configuration, and the tensors by Hugging Face name: memory maps, or, from a GGUF file,
        arrays that are made when asked for.

    Raises:
        UserError: as `load`.

    >>> open_tensors("nowhere.onnx")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: nowhere.onnx is no model; ...
    """
    path = Path(path)
    if path.is_dir():
        config = config_from_hf(read_config(path / "config.json"))
        tensors: Mapping[str, Any] = read_safetensors(path)
        config, tensors = settle(config, tensors)
    elif path.suffix == ".gguf":
        config, tensors = gguf_tensors(path)
    elif path.suffix == ".bin":
        config, tensors = _llama2c(path)
    else:
        raise UserError(
            f"{path} is no model; expected a folder with config.json and safetensors, a .gguf "
            "file or a llama2.c .bin file; correct the path"
        )
    found = tensors.shapes if isinstance(tensors, HfTensors) else _shapes(tensors)
    check(config, found, str(path))
    return config, tensors


def load_config(path: str | Path) -> LMConfig:
    """Read only the configuration of a model, in any form that `load` takes.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "config.json").write_text('{"model_type": "rwkv"}')
    >>> load_config(folder)
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: model_type is 'rwkv'; ...
    """
    path = Path(path)
    if path.is_dir():
        return config_from_hf(read_config(path / "config.json"))
    if path.suffix == ".gguf":
        return gguf_config(path)[0]
    return _llama2c(path)[0]


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a ``config.json`` written by anybody.

    >>> read_config("nowhere/config.json")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: nowhere/config.json is no readable JSON object ...
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            text = file.read(MOST_CONFIG_BYTES + 1)
        if len(text) > MOST_CONFIG_BYTES:
            raise ValueError(f"more than {MOST_CONFIG_BYTES} bytes")
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{path} is no readable JSON object ({reason}); expected the config.json of a model; "
            "correct the path or mend the file"
        ) from None
    return fields


def settle(config: LMConfig, tensors: Mapping[str, Any]) -> tuple[LMConfig, dict[str, Any]]:
    """Find the names' prefix, and leave out buffers and copies of a tied output matrix.

    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64, tied=True)
    >>> settle(config, {"embed_tokens.weight": 1, "lm_head.weight": 1})[1]
    {'embed_tokens.weight': 1}
    """
    layout = layout_of(config)
    if f"{layout.embed}.weight" in tensors:
        config = replace(config, prefix="")
    drop = {f"{layout.head}.weight"} if config.tied else set()
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in drop and not name.endswith(BUFFERS)
    }
    return config, kept


def check(config: LMConfig, found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Compare a checkpoint's tensors with those that its configuration asks for.

    Args:
        config: the model.
        found: name to shape.
        where: named in the message.

    Raises:
        UserError: naming tensors that are missing, superfluous or of another shape.

    >>> check(LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64), {}, "here")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: here does not fit its configuration: missing: ...
    """
    wanted = {name: leaf.shape for name, leaf in shapes(config).items()}
    compare(wanted, found, where, f"a {config.model_type} model")


def compare(
    wanted: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    where: str,
    kind: str,
) -> None:
    """Compare the tensors of a file or tree with those that a configuration asks for.

    Args:
        wanted: name to shape.
        found: name to shape.
        where: the file or tree, for the message.
        kind: what it should hold, for the message.

    Raises:
        UserError: naming tensors that are missing, superfluous or of another shape.

    >>> compare({"w": (2,)}, {"w": (3,)}, "here", "a toy")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: here does not fit its configuration: of another shape: w (3,) ...
    """
    wrong = [n for n in wanted if n in found and tuple(found[n]) != wanted[n]]
    problems = {
        "missing": [n for n in wanted if n not in found],
        "superfluous": [n for n in found if n not in wanted],
        "of another shape": [f"{n} {tuple(found[n])} for {wanted[n]}" for n in wrong],
    }
    told = [f"{problem}: {_some(names)}" for problem, names in problems.items() if names]
    if told:
        raise UserError(
            f"{where} does not fit its configuration: {'; '.join(told)}; expected the tensors of "
            f"{kind}; use the config.json that belongs to the weights"
        )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _to_device(array: np.ndarray, dtype: Any) -> jax.Array:
    if dtype is not None and array.dtype != dtype:
        array = np.asarray(array).astype(dtype)
    # On a CPU this keeps pointing into the file where the tensor lies on a 64-byte boundary.
    return jax.device_put(array)


def _llama2c(path: Path) -> tuple[LMConfig, dict[str, Any]]:
    header, tensors = read_llama2c(path)
    config = LMConfig(
        model_type="llama",
        vocab_size=header.vocab_size,
        width=header.dim,
        layers=header.n_layers,
        heads=header.n_heads,
        kv_heads=header.n_kv_heads,
        head_width=header.dim // header.n_heads,
        ffn_width=header.hidden_dim,
        max_positions=header.seq_len,
        norm_eps=1e-5,
        tied="lm_head.weight" not in tensors,
        bos_id=1,
        eos_ids=(2,),
    )
    return config, {name: halves(name, array, config) for name, array in tensors.items()}


def save(
    path: str | Path,
    params: Mapping[str, Any],
    config: LMConfig,
    *,
    dtype: Any = None,
    shard_bytes: int = 5 << 30,
) -> list[Path]:
    """Write a folder that transformers loads: ``config.json`` and aligned safetensors.

    Args:
        path: the folder; it is made where it is absent.
        params: nested dict of tensors.
        config: the model.
        dtype: of the file; None keeps each tensor's.
        shard_bytes: largest file.

    Returns:
        The files written, in order.

    Raises:
        UserError: when the tensors are not those of the configuration.

    >>> import tempfile
    >>> from jaxsys.models.lm.init import init
    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> params = init(jax.random.key(0), config)
    >>> [file.name for file in save(tempfile.mkdtemp(), params, config)]
    ['config.json', 'model.safetensors']
    """
    flat = flatten(params)
    named = {
        name: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype) for name, leaf in flat.items()
    }
    check(config, {name: leaf.shape for name, leaf in flat.items()}, "this tree of parameters")

    def produce(name: str) -> Any:
        return jnp.asarray(flat[name], named[name].dtype)

    return write_folder(path, config, named, produce, shard_bytes)


def write_folder(
    path: str | Path,
    config: LMConfig,
    named: Mapping[str, jax.ShapeDtypeStruct],
    produce: Callable[[str], Any],
    shard_bytes: int = 5 << 30,
) -> list[Path]:
    """Write a model's folder one tensor at a time; see `core.checkpoint.write_safetensors`.

    Args:
        path: the folder; it is made where it is absent.
        config: the model.
        named: shape and dtype of every tensor.
        produce: gives the tensor of a name.
        shard_bytes: largest file.

    Returns:
        ``config.json`` and the safetensors files.

    >>> import tempfile
    >>> config = LMConfig("llama", 9, 4, 1, 1, 1, 4, 4, 8)
    >>> zeros = lambda name: np.zeros(shapes(config)[name].shape, np.float32)
    >>> len(write_folder(tempfile.mkdtemp(), config, shapes(config), zeros))
    2
    """
    files = write_safetensors(path, named, produce, shard_bytes=shard_bytes)
    names = {str(leaf.dtype) for leaf in named.values()}
    hf = config_to_hf(config) | {"dtype": names.pop() if len(names) == 1 else None}
    report.atomic_write(Path(path) / "config.json", json.dumps(hf, indent=2) + "\n")
    return [Path(path) / "config.json", *files]
