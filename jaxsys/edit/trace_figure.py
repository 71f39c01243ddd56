"""Heat maps of causal traces, for one fact and for many."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.core.report import COLOURS, figure
from jaxsys.edit.trace import Trace

TITLES = {
    "layer": "state after the block",
    "mlp": "feed-forward outputs",
    "attention": "attention outputs",
}


def heat_map(found: Trace) -> Any:
    """Draw the probability of the answer with each state restored, tokens by layers.

    Args:
      found: of `jaxsys.edit.trace.trace`.

    Returns:
      A matplotlib figure, a panel for each kind; the subject's tokens are marked by a star.

    >>> trace = Trace(("a", "b"), (0, 1), "c", 0.9, 0.1, {"mlp": np.full((3, 2), 0.5)})
    >>> len(heat_map(trace).axes)
    2
    """
    kinds = list(found.restored)
    height = max(2.2, 0.2 * len(found.tokens) + 1.2)
    fig, axes = figure(1, len(kinds), width=4.2, height=height)
    first, last = found.subject
    names = [f"{t}*" if first <= i < last else t for i, t in enumerate(found.tokens)]
    for axis, kind in zip(axes[0], kinds, strict=True):
        values = np.asarray(found.restored[kind])
        top = max(found.clean, float(values.max()))
        image = axis.imshow(
            values.T, aspect="auto", cmap="Purples", vmin=min(found.corrupted, top), vmax=top
        )
        axis.grid(visible=False)
        axis.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in names])
        axis.set_xlabel("layer")
        axis.set_title(TITLES[kind])
        fig.colorbar(image, ax=axis, label=f"p({found.answer.strip()!r})".replace("$", r"\$"))
    return fig


def mean_effects(traces: Sequence[Trace]) -> Any:
    """Draw the mean indirect effect at the subject's last token by layer, over many facts.

    Args:
      traces: of facts that the model knows.

    Returns:
      A matplotlib figure; bands are standard errors over facts.

    Raises:
      UserError: without a trace.

    >>> trace = Trace(("a",), (0, 1), "c", 0.9, 0.1, {"mlp": np.full((3, 1), 0.5)})
    >>> len(mean_effects([trace, trace]).axes)
    1
    """
    if not traces:
        raise UserError("there is no trace; expected at least one; trace some facts")
    fig, axes = figure(1, 1, width=5.0)
    axis = axes[0, 0]
    for kind, colour in zip(traces[0].restored, COLOURS, strict=False):
        effects = np.array([trace.effect(kind) for trace in traces])
        mean = effects.mean(axis=0)
        error = effects.std(axis=0) / np.sqrt(len(effects))
        axis.plot(mean, color=colour, label=TITLES[kind])
        axis.fill_between(range(len(mean)), mean - error, mean + error, color=colour, alpha=0.2)
    axis.set_xlabel("layer")
    axis.set_ylabel("indirect effect at the subject's last token")
    axis.set_title(f"{len(traces)} facts")
    axis.legend(fontsize=7)
    return fig
