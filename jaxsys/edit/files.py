"""From a checkpoint to an edited checkpoint, and back."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.core.tree import unflatten
from jaxsys.data.tokenizer import load_tokenizer, save_tokenizer
from jaxsys.edit import factors
from jaxsys.edit.contract import Editable, Info, Method, Request, check_requests
from jaxsys.edit.evaluation import write
from jaxsys.edit.protocol import answering_of
from jaxsys.edit.stats import Statistics, check_model
from jaxsys.edit.turns import edit_all, settle
from jaxsys.evaluate.open import open_model
from jaxsys.models import lm

EDIT = "edit"  # subfolder for what undoes an edit


class Written(NamedTuple):
    """Hold what an edit of a checkpoint gave.

    Attributes:
      files: that were written.
      info: factors of all edits together.
      answers: what the edited model writes after the first prompts.

    >>> Written((), Info({}, {}), ()).files
    ()
    """

    files: tuple[Path, ...]
    info: Info
    answers: tuple[str, ...]


def open_for_editing(name: str | Path) -> tuple[Editable, Any]:
    """Load a model and its tokenizer in float32.

    Args:
      name: as `jaxsys.evaluate.open.open_model` takes it.

    Raises:
      UserError: if there is no such model.

    >>> open_for_editing("no/such/model")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: ...
    """
    opened = open_model(name, dtype=jnp.float32)
    return Editable(opened.config, opened.tokenizer), opened.model.params


def edit_checkpoint(
    source: str | Path,
    out: str | Path,
    name: str,
    method: Method,
    config: Any,
    requests: Sequence[Request],
    *,
    batch: int = 0,
    stats: Statistics | None = None,
    shown: int = 20,
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Edit a model and write it under the checkpoint's own names, with what undoes the edit.

    Args:
      source: as `open_for_editing` takes it.
      out: folder for the checkpoint; its subfolder `edit` gets the factors and the old matrices.
      name: of the method.
      method: see `Method`.
      config: of the method.
      requests: to edit.
      batch: requests of one edit, one batch after the other; 0 for all at once.
      stats: second moments, for methods that need them.
      shown: prompts that the edited model is asked to answer afterwards.
      progress: called with (requests done, requests in all).

    Raises:
      UserError: before anything is written, for bad requests, a method that changes no weights, or
        statistics that are missing or another model's.

    >>> edit_checkpoint("tiny", "out", "rome", Method(None, dict), {}, [])
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: there is no request; ...
    """
    if batch < 0:
        raise UserError(f"batch is {batch}; expected 0 (all at once) or more; correct it")
    check_requests(requests[: batch or None])
    if method.answering is not None:
        raise UserError(
            f"{name} keeps its edits beside the weights, so there is no edited checkpoint; "
            "expected a method that changes weights; see jaxsys edit evaluate for the others"
        )
    path = lm.find_model(source)
    model, params = open_for_editing(path)
    if stats is not None:
        check_model(stats, params)
    config = settle(method, model, config, params)
    edited, state, infos = params, None, []
    size = 1 if method.single else batch or len(requests)
    for start in range(0, len(requests), size):
        part = requests[start : start + size]
        edited, state, info = edit_all(method, model, config, edited, part, stats, state)
        infos.append(info)
        if progress is not None:
            progress(min(start + size, len(requests)), len(requests))
    info = factors.compose(infos)
    if not info.factors:
        raise UserError(
            f"{name} gave no change that can be written into files; expected one; use another "
            "method or other settings"
        )
    files = factors.into_files(path, info, out)
    files += save_tokenizer(out, load_tokenizer(path))
    _, tensors = lm.open_tensors(path)
    before = {matrix: tensors[matrix] for matrix in info.factors}
    about = {"method": name, "requests": [list(r) for r in requests], "settings": repr(config)}
    files += factors.save(Path(out) / EDIT, info, before=before, about=about)
    told = answering_of(model, method, config, edited, state)
    answers = write(told, model.tokenizer, [r.prompt for r in requests[:shown]], 8)
    return Written(tuple(files), info, tuple(answers))


def undo_checkpoint(source: str | Path, edit: str | Path, out: str | Path) -> tuple[Path, ...]:
    """Take an edit out of a checkpoint: its matrices are again those of the model before it.

    Args:
      source: the edited checkpoint.
      edit: the folder `edit` that `edit_checkpoint` wrote.
      out: folder to write.

    Raises:
      UserError: if the checkpoint's matrices are not what that edit left.

    >>> undo_checkpoint("no/such/model", "nor/edit", "out")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: ...
    """
    path = lm.find_model(source)
    config, tensors = lm.open_tensors(path)
    info, before, _ = factors.load(edit)
    model, named = Editable(config, None), lm.shapes(config)
    for matrix in info.factors:
        if matrix not in named or matrix not in before:
            raise UserError(
                f"the edit in {edit} changes {matrix}, which {source if matrix in before else edit}"
                " does not hold; expected the checkpoint that it was written with; correct a path"
            )
        # Checked before anything is written; one matrix at a time is in memory.
        one = Info({matrix: info.factors[matrix]}, {})
        now = {matrix: jnp.asarray(tensors[matrix])}
        factors.undo(model, unflatten(now), one, {matrix: jnp.asarray(before[matrix])})

    def produce(name: str) -> np.ndarray:
        return before[name] if name in before else tensors[name]

    stored = {
        name: jax.ShapeDtypeStruct(leaf.shape, np.asarray(produce(name)).dtype)
        for name, leaf in named.items()
    }
    files = lm.write_folder(out, config, stored, produce)
    return (*files, *save_tokenizer(out, load_tokenizer(path)))
