"""Keys and outputs of layers at the lookup token, for many requests and prefixes at a time."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxsys.edit.contract import Editable, Request
from jaxsys.edit.editable import Stream, advance, begin, down_name, encode


def lookup_rows(
    model: Editable, requests: Sequence[Request], prefixes: Sequence[str]
) -> list[tuple[int, ...]]:
    """Encode each request bare and with every prefix, up to the subject's last token.

    Nothing behind that token can change what stands there. The rows of one request are together,
    the bare one first.

    >>> from jaxsys.data import ByteTokenizer
    >>> request = Request("In Rome is", "Rome", "x")
    >>> [len(row) for row in lookup_rows(Editable(None, ByteTokenizer()), [request], ("So",))]
    [7, 11]
    """
    rows = []
    for request in requests:
        for prefix in ("", *prefixes):
            encoded = encode(model, request, prefix)
            rows.append(encoded.ids[: encoded.lookup + 1])
    return rows


class KeyReader:
    """Follow rows through the layers of a model while these are being edited.

    Each block runs once, with the weights that it has when its layer's turn comes.

    Args:
      model: the model.
      params: before the edit.
      requests: N.
      prefixes: texts before the prompts.
      batch: requests whose activations exist at one time.

    >>> from jaxsys.data import ByteTokenizer
    >>> from jaxsys.models import lm
    >>> model = Editable(lm.LMConfig("llama", 256, 32, 1, 4, 2, 8, 48, 64), ByteTokenizer())
    >>> params = {"model": {"embed_tokens": {"weight": jnp.ones((256, 32))}}}
    >>> KeyReader(model, params, [Request("In Rome is", "Rome", "x")] * 3, (), batch=2).parts
    2
    """

    def __init__(
        self,
        model: Editable,
        params: Any,
        requests: Sequence[Request],
        prefixes: Sequence[str],
        batch: int = 16,
    ):
        self._model, self._rows_each = model, len(prefixes) + 1
        self._streams: list[Stream] = []
        for first in range(0, len(requests), batch):
            part = requests[first : first + batch]
            self._streams.append(begin(model, params, lookup_rows(model, part, prefixes)))

    @property
    def parts(self) -> int:
        """Count the groups of requests that run one after the other."""
        return len(self._streams)

    def read(
        self, params: Any, layer: int
    ) -> tuple[Float[np.ndarray, "N P F"], Float[np.ndarray, "N P D"]]:
        """Give keys and outputs of a layer's edited matrix; layers must be asked for in order.

        Args:
          params: with the edits so far.
          layer: whose keys.

        Returns:
          What the matrix multiplies [N, P, F] and what it writes [N, P, D], bare prompts first.
        """
        down = down_name(self._model.config, layer)
        keys, outputs = [], []
        for i, stream in enumerate(self._streams):
            self._streams[i], _ = advance(self._model, params, stream, layer)
            _, found = advance(
                self._model, params, self._streams[i], layer + 1, (f"{down}:in", f"{down}:out")
            )
            keys.append(self._split(found[f"{down}:in"]))
            outputs.append(self._split(found[f"{down}:out"]))
        return np.concatenate(keys), np.concatenate(outputs)

    def look_ahead(self, params: Any, layer: int, point: str) -> Float[np.ndarray, "N D"]:
        """Give what a later layer says at the bare prompts, leaving the rows where they are.

        Args:
          params: with the edits so far.
          layer: of the point.
          point: relative to its block.
        """
        found = []
        for stream in self._streams:
            bare = Stream(
                stream.x[:: self._rows_each], stream.layer, stream.position[:: self._rows_each]
            )
            found.append(advance(self._model, params, bare, layer + 1, (point,))[1][point])
        return np.asarray(jnp.concatenate(found), np.float32)

    def _split(self, x: Any) -> np.ndarray:
        x = np.asarray(x, np.float32)
        return x.reshape(-1, self._rows_each, x.shape[-1])


def half_bare(keys: Float[np.ndarray, "N P F"]) -> Float[np.ndarray, "N F"]:
    """Average keys as MEMIT does: the bare prompt weighs as much as all prefixes together.

    >>> half_bare(np.array([[[4.0], [1.0], [3.0]]])).tolist()
    [[3.0]]
    """
    if keys.shape[1] == 1:
        return keys[:, 0]
    return (keys[:, 0] + keys[:, 1:].mean(axis=1)) / 2
