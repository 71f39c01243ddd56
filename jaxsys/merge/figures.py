"""Figures of conflict and of routed merges."""

from typing import Any

import numpy as np

from jaxsys.core.report import figure
from jaxsys.merge.conflict import DEFINITIONS, Conflicts, Definition, in_order, layer_name


def grid(found: Conflicts, definition: Definition) -> tuple[list[str], list[str], np.ndarray]:
    """Lay tensors out by kind and layer.

    Returns:
      Kinds of tensors, layers, and d [kinds, layers] with nan where a layer lacks a kind.

    >>> found = Conflicts({"h.0.w": {"magnitude": 0.5}}, {"h.0": {"magnitude": 0.5}}, {})
    >>> grid(found, "magnitude")[:2]
    (['w'], ['h.0'])
    """
    layers = in_order(list(found.layers))
    place: dict[tuple[str, str], float] = {}
    for path, d in found.tensors.items():
        layer = layer_name(path)
        kind = path.removeprefix(layer).strip(".").removesuffix(".weight")
        place[kind, layer] = d[definition]
    kinds = sorted({kind for kind, _ in place})
    values = np.array([[place.get((k, layer), np.nan) for layer in layers] for k in kinds])
    return kinds, layers, values


def heat_map(found: Conflicts) -> Any:
    """Draw conflict by kind of tensor and by layer, a panel for each definition.

    Args:
      found: of `conflict.conflicts`.

    Returns:
      A matplotlib figure; the last row of each panel is the layer as a whole.

    >>> d = {"pairwise_sign": 0.5, "any_sign": 0.5, "magnitude": 0.5}
    >>> len(heat_map(Conflicts({"h.0.w": d}, {"h.0": d}, {})).axes)
    6
    """
    layers = in_order(list(found.layers))
    width = max(3.6, 1.8 + 0.3 * len(layers))
    fig, axes = figure(1, len(DEFINITIONS), width=width, height=3.4)
    for axis, definition in zip(axes[0], DEFINITIONS, strict=True):
        kinds, _, values = grid(found, definition)
        whole = [found.layers[layer][definition] for layer in layers]
        shown = np.ma.masked_invalid(np.vstack([values, whole]))
        image = axis.imshow(shown, aspect="auto", vmin=0.0, vmax=max(float(shown.max()), 1e-6))
        axis.grid(visible=False)
        axis.set_title(definition, fontsize=9)
        axis.set_yticks(range(len(kinds) + 1), [*(k or "(itself)" for k in kinds), "whole layer"])
        axis.set_xticks(range(len(layers)), [_short(layer) for layer in layers], rotation=90)
        axis.tick_params(labelsize=6)
        fig.colorbar(image, ax=axis, shrink=0.8).ax.tick_params(labelsize=6)
    return fig


def _short(layer: str) -> str:
    return layer.rsplit(".", 1)[-1]
