"""Recorded routing: which experts each token visited, to compare caches and schedules on."""

import lzma
import os
import struct
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Float, Integer

from jaxsys.core.errors import UserError
from jaxsys.core.report import atomic_write

MOST_NUMBERS = 2**28  # of one array in a file
_NAMES = ("experts", "sequence", "scores", "early", "n_experts")
# What the standard library and NumPy raise for archives that are damaged or made up.
_SPOILT = (
    OSError, ValueError, TypeError, EOFError, KeyError, OverflowError, NotImplementedError,
    RuntimeError, BadZipFile, zlib.error, lzma.LZMAError, struct.error,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Trace:
    """Hold the routing of N tokens through L mixture layers.

    Attributes:
        experts: experts of each token in each layer, [N, L, k], below E.
        sequence: number of the sequence that each token belongs to, [N], never falling.
        n_experts: E.
        scores: router's probabilities, [N, L, E]; without them the chosen experts share them.
        early: the router's probabilities when it is given the hidden state of one layer before,
            [N, L, E]; entries of layer 0 mean nothing.

    Raises:
        UserError: shapes that do not fit together, or an expert that is not below E.

    >>> Trace(np.zeros((3, 2, 1), int), np.zeros(3, int), 4).frequency().tolist()
    [[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    """

    experts: Integer[np.ndarray, "N L k"]
    sequence: Integer[np.ndarray, "N"]
    n_experts: int
    scores: Float[np.ndarray, "N L E"] | None = None
    early: Float[np.ndarray, "N L E"] | None = None

    def __post_init__(self):
        """Check shapes and ranges."""
        n, layers = self.experts.shape[:2]
        full = (n, layers, self.n_experts)
        for name in ("scores", "early"):
            array = getattr(self, name)
            if array is not None and array.shape != full:
                raise UserError(
                    f"{name} of the trace has shape {array.shape}; expected {full}, a number for "
                    "each expert of each layer; record the trace again"
                )
        falling = self.sequence.shape != (n,) or bool((np.diff(self.sequence) < 0).any())
        low, high = self.experts.min(initial=0), self.experts.max(initial=0)
        if falling or low < 0 or high >= self.n_experts:
            raise UserError(
                f"the trace names experts {low} to {high} of {self.n_experts} for {n} tokens and "
                f"has {self.sequence.shape} sequence numbers; expected experts that exist and a "
                "number per token that never falls; record the trace again"
            )

    def __len__(self) -> int:
        """Count the tokens."""
        return len(self.experts)

    def frequency(self) -> Float[np.ndarray, "L E"]:
        """Count activations per token of each expert, the profile that residency is planned by.

        Returns:
            [L, E]; each row adds up to k.
        """
        layers = self.experts.shape[1]
        counts = np.zeros((layers, self.n_experts))
        for layer in range(layers):
            own = self.experts[:, layer].reshape(-1)
            counts[layer] = np.bincount(own, minlength=self.n_experts)
        return counts / max(1, len(self))

    def probabilities(self, token: int, layer: int) -> Float[np.ndarray, "E"]:
        """Give the router's probabilities, or equal ones for the chosen experts.

        Args:
            token: which.
            layer: which.

        Returns:
            [E], adding up to 1.

        >>> trace = Trace(np.array([[[0, 2]]]), np.zeros(1, int), 3)
        >>> trace.probabilities(0, 0).tolist()
        [0.5, 0.0, 0.5]
        """
        if self.scores is not None:
            return self.scores[token, layer].astype(np.float64)
        found = np.zeros(self.n_experts)
        found[self.experts[token, layer]] = 1 / self.experts.shape[2]
        return found

    def split(self, share: float | int) -> tuple["Trace", "Trace"]:
        """Cut the trace at the sequence in which a share of the tokens is reached.

        Args:
            share: of the tokens, for the first part (a profile); the rest is to be judged by.

        Returns:
            Both parts; a sequence is never in both.

        >>> trace = Trace(np.zeros((4, 1, 1), int), np.array([0, 0, 1, 1]), 2)
        >>> [len(part) for part in trace.split(0.3)]
        [2, 2]
        """
        wanted = int(np.ceil(share * len(self)))
        last = self.sequence[min(max(wanted - 1, 0), len(self) - 1)]
        first = self.sequence <= last
        return self._keep(first), self._keep(~first)

    def _keep(self, rows: np.ndarray) -> "Trace":
        scores = None if self.scores is None else self.scores[rows]
        early = None if self.early is None else self.early[rows]
        return Trace(self.experts[rows], self.sequence[rows], self.n_experts, scores, early)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace to an ``.npz`` file, replacing it at once; probabilities as float16.

        >>> import tempfile
        >>> path = f"{tempfile.mkdtemp()}/trace.npz"
        >>> Trace(np.zeros((3, 2, 1), int), np.zeros(3, int), 4).save(path)
        >>> len(Trace.load(path))
        3
        """
        arrays = {
            "experts": self.experts.astype(np.int16),
            "sequence": self.sequence.astype(np.int32),
            "n_experts": np.int32(self.n_experts),
        }
        for name in ("scores", "early"):
            if getattr(self, name) is not None:
                arrays[name] = getattr(self, name).astype(np.float16)
        buffer = BytesIO()
        np.savez_compressed(buffer, **arrays)
        atomic_write(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Trace":
        """Read what `save` wrote, checking it as a foreign file.

        Args:
            path: of the file.

        Returns:
            The trace.

        Raises:
            UserError: no such file, other arrays or sizes in it, or contents that do not fit.

        >>> Trace.load("no/such.npz")
        Traceback (most recent call last):
        ...
        jaxsys.core.errors.UserError: the trace no/such.npz cannot be read ...
        """
        try:
            # Opened here, for NumPy leaves the file open if it is no archive.
            with Path(path).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                names = set(file.files)
                if not {"experts", "sequence", "n_experts"} <= names <= set(_NAMES):
                    raise ValueError(f"it holds {sorted(names)}")
                found = {name: _bounded(file, name) for name in names}
            n_experts = int(found.pop("n_experts"))
            for name in found:
                kind = np.floating if name in ("scores", "early") else np.integer
                wanted = {"experts": 3, "sequence": 1}.get(name, 3)
                if found[name].ndim != wanted or not np.issubdtype(found[name].dtype, kind):
                    raise ValueError(f"{name} is {found[name].dtype} of {found[name].ndim} axes")
        except _SPOILT as error:
            raise UserError(
                f"the trace {path} cannot be read ({error}); expected what `Trace.save` wrote; "
                "record it again"
            ) from error
        return cls(n_experts=n_experts, **found)


def _bounded(file, name: str) -> np.ndarray:
    """Read an array after a look at its header, so that no file makes us allocate what it likes."""
    with file.zip.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            version, np.lib.format.read_array_header_2_0
        )
        shape = read(member)[0]
    if np.prod(shape, dtype=np.float64) > MOST_NUMBERS:
        raise ValueError(f"{name} has shape {shape}")
    return file[name]


class Recorder:
    """Collect routing while a model runs, one call per layer of a step.

    Args:
        n_experts: E.

    >>> recorder = Recorder(4)
    >>> for layer in range(2):
    ...     recorder.add(layer, np.array([[0, 1], [2, 3]]), sequence=np.array([0, 1]))
    >>> recorder.trace().experts.shape
    (2, 2, 2)
    """

    def __init__(self, n_experts: int):
        self.n_experts = n_experts
        self._steps: list[dict[str, list[np.ndarray]]] = []

    def add(
        self,
        layer: int,
        experts: Integer[np.ndarray, "N k"],
        *,
        sequence: Integer[np.ndarray, "N"] | None = None,
        scores: Float[np.ndarray, "N E"] | None = None,
        early: Float[np.ndarray, "N E"] | None = None,
    ) -> None:
        """Note one mixture layer's choice; layer 0 begins a step.

        Args:
            layer: index among the mixture layers, counted from 0, in order.
            experts: of each of the step's tokens, [N, k].
            sequence: number of each token's sequence, [N], read in layer 0; all 0 without it.
            scores: router's probabilities, [N, E]; always or never.
            early: of the router run one layer before, [N, E]; always or never.

        Raises:
            UserError: a layer out of turn.

        >>> Recorder(4).add(1, np.zeros((1, 2), int))
        Traceback (most recent call last):
        ...
        jaxsys.core.errors.UserError: layer 1 was recorded after 0 layers of its step; ...
        """
        if layer == 0:
            number = np.zeros(len(experts), np.int32) if sequence is None else sequence
            self._steps.append({"experts": [], "scores": [], "early": [], "sequence": [number]})
        done = len(self._steps[-1]["experts"]) if self._steps else 0
        if done != layer:
            raise UserError(
                f"layer {layer} was recorded after {done} layers of its step; expected every "
                "mixture layer in turn, from 0; call `add` for each"
            )
        step = self._steps[-1]
        step["experts"].append(np.asarray(experts))
        for name, values in (("scores", scores), ("early", early)):
            if values is not None:
                step[name].append(np.asarray(values))

    def trace(self) -> Trace:
        """Join what was recorded; tokens of one sequence stand together, in their order.

        Returns:
            The trace.

        Raises:
            UserError: nothing was recorded, or the steps differ in their layers.
        """
        depths = {len(step["experts"]) for step in self._steps}
        if len(depths) != 1:
            raise UserError(
                f"{len(self._steps)} steps of {sorted(depths)} layers were recorded; expected "
                "every layer of at least one step; record whole steps"
            )
        sequence = np.concatenate([step["sequence"][0] for step in self._steps])
        order = np.argsort(sequence, kind="stable")

        def join(name: str) -> np.ndarray | None:
            rows = [np.stack(step[name], axis=1) for step in self._steps if step[name]]
            return np.concatenate(rows)[order] if rows else None

        experts = join("experts")
        assert experts is not None
        return Trace(experts, sequence[order], self.n_experts, join("scores"), join("early"))


def synthetic_trace(
    n_tokens: int,
    n_layers: int,
    n_experts: int,
    k: int,
    *,
    zipf: float | int = 0.5,
    locality: float | int = 0.3,
    topic: float | int = 1.0,
    early_accuracy: float | int = 0.85,
    sequence_tokens: int = 128,
    seed: int = 0,
) -> Trace:
    """Draw routing with popular experts, topics of sequences and locality between tokens.

    Expert e's logit in a layer is ``−zipf · log(rank)`` in an order of that layer's own, plus
    ``topic · N(0, 1)`` for the sequence, plus Gumbel noise for the token; with probability
    ``locality`` a token keeps the noise of the one before, and so its experts. The k largest are
    chosen. An early look sees the same logits with probability ``early_accuracy``, else those of an
    unrelated token.

    Args:
        n_tokens: N.
        n_layers: L.
        n_experts: E.
        k: experts of a token.
        zipf: exponent of the popularity; 0: all alike.
        locality: probability that a token repeats its predecessor's choice.
        topic: spread of a sequence's preference.
        early_accuracy: probability that an early look is right.
        sequence_tokens: tokens of a sequence.
        seed: of everything.

    Returns:
        The trace, with probabilities and early looks.

    >>> trace = synthetic_trace(64, 2, 8, 2, zipf=1.0)
    >>> trace.experts.shape, bool((np.sort(trace.frequency()[0])[-2:] > 0.3).all())
    ((64, 2, 2), True)
    """
    rng = np.random.default_rng(seed)
    rank = np.stack([rng.permutation(n_experts) for _ in range(n_layers)]) + 1
    sequence = np.arange(n_tokens) // sequence_tokens
    shape = (sequence[-1] + 1 if n_tokens else 1, n_layers, n_experts)
    base = -zipf * np.log(rank)[None] + topic * rng.normal(size=shape)
    noise = rng.gumbel(size=(n_tokens, n_layers, n_experts))
    keep = rng.random((n_tokens, n_layers)) < locality
    for t in range(1, n_tokens):
        if sequence[t] == sequence[t - 1]:
            noise[t, keep[t]] = noise[t - 1, keep[t]]
    logits = base[sequence] + noise
    other = base[sequence] + rng.gumbel(size=noise.shape)
    right = rng.random((n_tokens, n_layers, 1)) < early_accuracy
    experts = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
    scores, early = _softmax(logits), _softmax(np.where(right, logits, other))
    return Trace(experts, sequence, n_experts, scores, early)


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)
