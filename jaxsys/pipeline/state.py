"""Checkpoints of a pipeline: every process saves its own part, any other partition can read them.

Layout: ``<directory>/<group>/part-<rank>/<step>``, a part being a `RunStore` (Orbax below it) of
arrays under global names: ``params.`` and ``opt.`` with the paths of the whole model, whoever holds
them, and ``residual.`` for what compression took. The group names the number of processes and the
cut. A step counts once all parts of its group hold it, so no process waits for another one.
"""

import re
import shutil
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core import tree
from jaxsys.core.checkpoint import RunStore
from jaxsys.core.errors import UserError
from jaxsys.pipeline.execute import Worker
from jaxsys.pipeline.plan import Plan
from jaxsys.pipeline.turn import State

_GROUP = re.compile(r"(\d+)-processes-[0-9a-f]{8}")


@dataclass(frozen=True)
class PipelineStore:
    """Keep the last states of a pipeline in a directory that all processes see.

    Attributes:
      directory: made at the first save.
      keep: how many of the newest steps stay, at least 2: a process may be a step ahead of another.

    >>> import tempfile
    >>> PipelineStore(tempfile.mkdtemp()).latest() is None
    True
    """

    directory: str | Path
    keep: int = 2

    def __post_init__(self) -> None:
        if self.keep < 2:
            raise UserError(f"keep is {self.keep}; processes save apart, so at least 2 must stay")

    def latest(self) -> int | None:
        """Find the newest step that all parts of some group hold; None if there is none."""
        return max(self._complete(), default=None)

    def _complete(self) -> dict[int, Path]:
        """Map each step that can be restored to its group's folder."""
        found: dict[int, Path] = {}
        for group in self._groups():
            steps = [set(part.steps()) for part in self._parts(group)]
            found |= dict.fromkeys(set.intersection(*steps), group)
        return found

    def _groups(self) -> list[Path]:
        folder = Path(self.directory)
        entries = folder.iterdir() if folder.is_dir() else ()
        return sorted(entry for entry in entries if _GROUP.fullmatch(entry.name))

    def _parts(self, group: Path) -> list[RunStore]:
        match = _GROUP.fullmatch(group.name)
        assert match is not None
        return [RunStore(group / f"part-{i}", self.keep) for i in range(int(match[1]))]

    def save(self, worker: Worker, state: State, meta: Mapping[str, Any] | None = None) -> None:
        """Save this process's part of a step; every process calls it after the same step.

        Of chains that repeat one another the first one saves parameters, and of workers that share
        a leaf the first one does. Checkpoints of other partitions go once this one is complete.

        Args:
          worker: whose state it is.
          state: after ``state.step`` steps.
          meta: what JSON can hold, besides the plan, which is saved too.
        """
        group = Path(self.directory) / _group(worker.plan)
        arrays = {f"residual.{slot}": x for slot, x in state.residuals.items()}
        if worker.chain == 0:
            owned = {worker.paths[j] for j in worker.owned}
            arrays |= _named(state, set(worker.paths.values()) - owned)
        part = RunStore(group / f"part-{worker.rank}", self.keep)
        part.save(state.step, arrays, dict(meta or {}) | {"plan": worker.plan.to_json()})
        if worker.rank == 0 and state.step in self._complete():
            for other in self._groups():
                if other.name != group.name:
                    shutil.rmtree(other)

    def restore(self, worker: Worker, like: State) -> tuple[State, dict[str, Any]] | None:
        """Restore the newest step, whatever partition saved it.

        Args:
          worker: that goes on.
          like: its state at the start, such as `Worker.init` gives.

        Returns:
          The state and the metadata saved with it; None if there is no checkpoint. What compression
          took from gradients goes on only under the same partition.

        Raises:
          UserError: the checkpoint lacks a leaf, or holds it with another shape or dtype.
        """
        complete = self._complete()
        if not complete:
            return None
        step = max(complete)
        group = complete[step]
        wanted = _named(like)
        found: dict[str, Any] = {}
        meta: dict[str, Any] = {}
        same = group.name == _group(worker.plan)
        own = f"part-{worker.rank}"
        for part in self._parts(group):
            listed, meta = part.contents(step)
            mine = same and Path(part.directory).name == own
            take = {k for k in listed if k in wanted or (mine and k.startswith("residual."))}
            if take - set(found):
                specs = {k: np.empty(s.shape, s.dtype) for k, s in listed.items()}
                read, _ = part.restore(step, specs)
                found |= {k: read[k] for k in take}
        _check(group, step, found, wanted)
        params = {path: jnp.asarray(found[f"params.{path}"]) for path in like.params}
        opt_state = {path: _filled(path, old, found) for path, old in like.opt_state.items()}
        residuals = {
            k.removeprefix("residual."): jnp.asarray(x)
            for k, x in found.items()
            if k.startswith("residual.")
        }
        return State(params, opt_state, residuals, step), meta


def _named(state: State, without: Collection[str] = ()) -> dict[str, Any]:
    """Give the arrays of a state their global names, leaving some parameters out."""
    found: dict[str, Any] = {}
    for path, x in state.params.items():
        if path not in without:
            found[f"params.{path}"] = x
            found |= _opt_arrays(path, state.opt_state[path])
    return found


def _opt_arrays(path: str, opt_state: Any) -> dict[str, Any]:
    pairs = zip(tree.paths(opt_state), jax.tree.leaves(opt_state), strict=True)
    return {f"opt.{path}.{name}": x for name, x in pairs if hasattr(x, "shape")}


def _filled(path: str, like: Any, found: Mapping[str, Any]) -> Any:
    """Put what was found into an optimiser's state for one leaf."""
    leaves, structure = jax.tree.flatten(like)
    names = [f"opt.{path}.{name}" for name in tree.paths(like)]
    filled = [
        jnp.asarray(found[name]) if hasattr(leaf, "shape") else leaf
        for name, leaf in zip(names, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, filled)


def _group(plan: Plan) -> str:
    cut = f"{plan.n_nodes}{plan.boundaries}{plan.devices}{plan.replicas}{plan.codec}"
    return f"{len(plan.chains) * plan.n_workers}-processes-{zlib.crc32(cut.encode()):08x}"


def _check(group: Path, step: int, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, like in wanted.items():
        if name not in found:
            raise UserError(
                f"the checkpoint of step {step} in {group} lacks {name}; it must hold every "
                "parameter and the optimiser's state for it; resume with the same model and "
                "optimiser or choose another directory"
            )
        have = found[name]
        if have.shape != like.shape or have.dtype != like.dtype:
            raise UserError(
                f"the checkpoint of step {step} in {group} holds {name} as "
                f"{have.dtype}{list(have.shape)}; this run needs {like.dtype}{list(like.shape)}; "
                "resume with the same model or choose another directory"
            )
