"""Causal tracing: which states bring back the answer about a corrupted subject, and so which layers
to edit.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsys.core.errors import UserError
from jaxsys.edit.contract import Editable, Request, subject_span
from jaxsys.edit.editable import check_length, last_token
from jaxsys.models import lm
from jaxsys.models.lm.families import layout_of

KINDS = ("layer", "mlp", "attention")
ROW_TOKENS = 4096  # tokens that run at one time


class Trace(NamedTuple):
    """Hold what restoring each state does to the probability of the answer.

    Attributes:
      tokens: of the prompt, as text.
      subject: index of the subject's first token and of the one after its last.
      answer: the token whose probability is followed, as text.
      clean: its probability.
      corrupted: its mean probability with noise on the subject.
      restored: kind to its mean probability with noise and one state restored, [L, T]: ``layer``
        the residual stream after a block, ``mlp`` and ``attention`` what these add, in a window of
        blocks around it.

    >>> Trace(("a", "b"), (0, 1), "c", 0.9, 0.1, {}).clean
    0.9
    """

    tokens: tuple[str, ...]
    subject: tuple[int, int]
    answer: str
    clean: float
    corrupted: float
    restored: dict[str, Any]

    def effect(self, kind: str) -> Float[np.ndarray, "L"]:
        """Give the indirect effect at the subject's last token: restored less corrupted."""
        return self.restored[kind][:, self.subject[1] - 1] - self.corrupted


def subject_sigma(model: Editable, params: Any, requests: Sequence[Request]) -> float:
    """Measure the standard deviation of the entries of the subjects' embeddings.

    >>> from jaxsys.data import ByteTokenizer
    >>> model = Editable(lm.LMConfig("llama", 256, 32, 1, 4, 2, 8, 48, 64), ByteTokenizer())
    >>> params = {"model": {"embed_tokens": {"weight": jnp.ones((256, 32))}}}
    >>> subject_sigma(model, params, [Request("Rome is in", "Rome", "x")])
    0.0
    """
    spread = []
    for request in requests:
        ids = np.asarray(model.tokenizer.encode(request.subject.strip()), np.int32)
        spread.append(np.asarray(lm.embed(params, model.config, jnp.asarray(ids)[None])[0]))
    return float(np.concatenate(spread).std())


def trace(
    model: Editable,
    params: Any,
    request: Request,
    *,
    kinds: Sequence[str] = KINDS,
    follow: str | None = None,
    samples: int = 10,
    noise: float | int = 3.0,
    sigma: float | None = None,
    window: int = 10,
    seed: int = 0,
) -> Trace:
    """Restore each state of a run whose subject is corrupted, and see the answer come back.

    Noise of ``noise`` σ is added to the embeddings of the subject's tokens, in ``samples`` runs.
    For every layer and token the state of the clean run is put there and the rest runs on; all
    tokens of a layer run together.

    Args:
      model: the model.
      params: its parameters.
      request: prompt and subject; its target is not used.
      kinds: of `KINDS`.
      follow: the answer, whose first token counts; None: what the clean model says.
      samples: S, draws of noise.
      noise: its standard deviation in σ.
      sigma: σ; None: of this subject's embeddings. The paper takes it over all its subjects, see
        `subject_sigma`.
      window: blocks restored together for ``mlp`` and ``attention``, around the one named.
      seed: of the noise.

    Returns:
      `Trace`.

    Raises:
      UserError: if the prompt does not name the subject, or for an unknown kind.

    Reference:
      arXiv 2202.05262, section 2.1 and appendix B.

    >>> from jaxsys.data import ByteTokenizer
    >>> trace(Editable(None, ByteTokenizer()), {}, Request("So Ur is", "Ur", "x"), kinds=("head",))
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: kinds ['head'], 10 samples and a window of 10 are asked for; ...
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or samples < 1 or window < 1:
        raise UserError(
            f"kinds {list(kinds)}, {samples} samples and a window of {window} are asked for; "
            f"expected kinds of {', '.join(KINDS)} and at least 1 of the others; correct them"
        )
    prompt = request.prompt.rstrip()
    ids = np.asarray(model.tokenizer.encode(prompt), np.int32)
    check_length(model, ids.size)
    start, stop = subject_span(request)
    first = last_token(model, prompt, start + 1)
    last = last_token(model, prompt, stop)
    sigma = subject_sigma(model, params, [request]) if sigma is None else sigma
    x = lm.embed(params, model.config, jnp.asarray(ids)[None])
    draws = jax.random.normal(jax.random.key(seed), (samples, *x.shape[1:])) * (noise * sigma)
    inside = (np.arange(ids.size) >= first) & (np.arange(ids.size) <= last)
    noisy = x + draws.astype(x.dtype) * inside[None, :, None]
    run = _Run(model.config, params, jnp.concatenate([x, noisy]))
    chances = jax.nn.softmax(run.logits.astype(jnp.float32))
    answer = int(jnp.argmax(chances[0]))
    if follow is not None:
        both = model.tokenizer.encode(f"{prompt} {follow.strip()}")
        answer = int(both[min(ids.size, len(both) - 1)])
    restored = {
        kind: np.stack([run.restore(kind, i, answer, window) for i in range(model.config.layers)])
        for kind in kinds
    }
    return Trace(
        tuple(model.tokenizer.decode([i]) for i in ids),
        (first, last + 1),
        model.tokenizer.decode([answer]),
        float(chances[0, answer]),
        float(jnp.mean(chances[1:, answer])),
        restored,
    )


class _Run:
    """Keep the clean and the corrupted states of every layer, and run on from changed ones."""

    def __init__(self, config: Any, params: Any, x: Float[Array, "R T D"]):
        self.config, self.params = config, params
        layout = layout_of(config)
        self.points = {
            "mlp": f"{layout.mlp or layout.down}:out",
            "attention": f"{layout.out}:out",
        }
        self.before, self.clean = [x], {kind: [] for kind in self.points}
        for i in range(config.layers):
            points = dict(self.points)
            if config.is_sparse(i):
                points["mlp"] = f"{layout.moe}:out"
            x, _, found = self._block(i, x, tuple(points.values()))
            self.before.append(x)
            for kind, point in points.items():
                self.clean[kind].append(found[point][0])
        self.logits = lm.head(params, config, x[:, -1:])[:, 0]

    def _block(self, i: int, x: Array, taps: tuple[str, ...] = (), changes: tuple = ()):
        params = lm.layer(self.params, self.config, i)
        return lm.block(params, self.config, i, x, taps=taps, interventions=changes)

    def restore(self, kind: str, layer: int, answer: int, window: int) -> np.ndarray:
        """Give the mean probability with each token's state restored, [T]."""
        tokens = self.before[0].shape[1]
        samples = self.before[0].shape[0] - 1
        step = max(1, min(tokens, ROW_TOKENS // (tokens * samples)))
        parts = []
        for start in range(0, tokens, step):
            # Every part has the same shape, so one program serves all: the last may overlap.
            chosen = np.minimum(np.arange(start, start + step), tokens - 1)
            found = self._restore(kind, layer, answer, window, chosen)
            parts.append(found[: min(step, tokens - start)])
        return np.concatenate(parts)

    def _restore(self, kind: str, layer: int, answer: int, window: int, chosen: np.ndarray):
        last = self.config.layers
        low = layer + 1 if kind == "layer" else max(0, layer - window // 2)
        high = min(last, layer - window // 2 + window)
        corrupted = self.before[low][1:]
        n, s = len(chosen), corrupted.shape[0]
        x = jnp.tile(corrupted, (n, 1, 1))  # row n · S + s: token n restored, draw s
        where = jnp.repeat(jnp.asarray(chosen), s)
        rows = jnp.arange(n * s)
        if kind == "layer":
            x = x.at[rows, where].set(self.before[low][0][where])
        for i in range(low, last):
            changes = ()
            if kind != "layer" and i < high:
                point = self.points[kind]
                if kind == "mlp" and self.config.is_sparse(i):
                    point = f"{layout_of(self.config).moe}:out"
                _, _, found = self._block(i, x, (point,))
                lacking = self.clean[kind][i][where] - found[point][rows, where]
                changes = (lm.Intervention(point, where, lacking),)
            x, _, _ = self._block(i, x, (), changes)
        logits = lm.head(self.params, self.config, x[:, -1:])[:, 0]
        chance = jax.nn.softmax(logits.astype(jnp.float32))[:, answer]
        return np.asarray(chance).reshape(n, s).mean(axis=1)


def choose_layers(traces: Sequence[Trace], count: int = 5) -> tuple[int, ...]:
    """Choose consecutive layers to edit, from the effect of feed-forward parts at the last token of
    the subject.

    The last of them is where the mean effect over the traces is greatest (ROME's layer); MEMIT
    takes the ``count`` layers up to it. Reconstruction: the papers read their ranges off such
    curves by eye.

    Args:
      traces: with the kind ``mlp``, of facts that the model knows; a few tens give a steady curve.
      count: layers wanted at most.

    Returns:
      Layers, ascending.

    Raises:
      UserError: without a trace.

    >>> one = Trace(("a",), (0, 1), "b", 1.0, 0.0, {"mlp": np.array([[0.1], [0.5], [0.2]])})
    >>> choose_layers([one], 2)
    (0, 1)
    """
    if not traces:
        raise UserError("there is no trace; expected at least one of a known fact; trace some")
    peak = int(np.mean([trace.effect("mlp") for trace in traces], axis=0).argmax())
    return tuple(range(max(0, peak - count + 1), peak + 1))
