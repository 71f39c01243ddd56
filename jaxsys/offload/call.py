"""One pass of tokens through the layers of a placed model.

A layer's tasks are dispatched without waiting, so that CPU, accelerator and link work at once. The
host waits twice: for the router's choice in a mixture layer, and for a transfer buffer to be free.

Order in a layer: its half; the first copies of weights that must move; the CPU's pieces; the
accelerator's resident pieces; the moved ones, each as its copy is there.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsys.offload.choose import Mode
from jaxsys.offload.layers import alike, pick
from jaxsys.offload.load import Layer, Loaded


class _Use(NamedTuple):
    """One run of a feed-forward piece."""

    key: tuple[Any, ...]
    piece: Loaded
    on_accelerator: bool
    moved: bool
    index: np.ndarray | None
    share: np.ndarray | None


class Call:
    """Take tokens through the layers once; made and used by `engine.forward`.

    Args:
        engine: from `engine.make_engine`.
        tokens: [B, T] ids.
        start: filled slots of each row, [B].
        counts: how many of a row's tokens count, [B].
        row: the only row of the cache that is meant, or None.

    Attributes:
        sequences: number of each row's text, [B], for a recorder.

    >>> Call.__init__.__name__  # see `engine.make_engine`
    '__init__'
    """

    def __init__(self, engine: Any, tokens, start, counts, row):
        self.engine, self.placed, self.programs = engine, engine.placed, engine.programs
        self.monitor, self.ring = engine.monitor, engine.ring
        self.tokens, self.start, self.counts, self.row = tokens, start, counts, row
        self.sequences = np.arange(len(tokens)) if row is None else np.array([row])
        # Padding takes part in no expert.
        self.valid = (np.arange(tokens.shape[1])[None] < counts[:, None]).reshape(-1)
        self.coming: list[tuple[Any, Loaded]] = []
        self.named: dict[int, Any] = {}  # by layer: what its router named early, [N, k]
        if self.ring is not None:
            self.ring.begin()
            self.coming = self._coming()

    def _term(self, device: Any) -> str:
        return "accelerator" if device == self.placed.devices.accelerator else "cpu"

    def _run(self, device: Any, n_bytes: int, function: Any, *args: Any) -> Any:
        self.monitor.read(device == self.placed.devices.accelerator, n_bytes)
        return self.monitor.run(self._term(device), function, *args)

    def alone(self, stores: Any) -> Any:
        """Run the whole model as one program on the only device."""
        n_bytes = self._active_bytes()
        args = (self.placed.tree, self.tokens, stores, self.start, self.counts - 1, self.row)
        return self._run(self.placed.devices.cpu, n_bytes, self.programs.model, *args)

    def _active_bytes(self) -> int:
        placed, config = self.placed, self.placed.config
        share = 1.0
        if config.experts:
            share = min(1.0, self.tokens.size * config.experts_per_token / config.experts)
        experts = sum(p.n_bytes for p in placed.plan.parts if p.kind == "expert")
        other = sum(p.n_bytes for p in placed.plan.parts if p.kind not in ("expert", "embed"))
        return round(other + share * experts)

    def run(self, stores: Any) -> Any:
        """Run layer by layer."""
        embed, where = self.placed.embed, self._device_of(self.placed.embed)
        x = self._run(where, 0, self.programs.embed, embed.weights, self.tokens, self.start)
        after = []
        for i, layer in enumerate(self.placed.layers):
            home = self.placed.home(layer)
            if where != home:
                x, where = self._carry(x, home), home
            x, store = self._layer(i, layer, home, x, stores[i])
            after.append(store)
        head = self.placed.head
        target = self.placed.devices.accelerator if head.role == "stream" else None
        target = target or self._device_of(head)
        x = x if where == target else self._carry(x, target)
        tree = self._fetched("head", head)
        logits = self._run(target, head.n_bytes, self.programs.head, tree, x, self.counts - 1)
        self._done("head", head, logits)
        return logits, tuple(after)

    def _device_of(self, part: Loaded) -> Any:
        resident = part.role == "resident"
        return self.placed.devices.accelerator if resident else self.placed.devices.cpu

    def _carry(self, x: Any, device: Any) -> Any:
        # Activations: small, so their way over the link is not booked as weights are.
        return jax.device_put(x, device)

    def _layer(self, i: int, layer: Layer, home: Any, x: Any, store: Any) -> Any:
        twin = alike(self.placed.config, i)
        if layer.whole is not None:
            args = (layer.whole.weights, x, store, self.start, self.row, twin)
            self._count_whole(layer)
            return self._run(home, self._read_bytes(i, layer), self.programs.block, *args)
        half = layer.half
        assert half is not None
        tree = self._fetched(("half", i), half)
        args = (tree, x, store, self.start, self.row, twin)
        x, h, routed, store = self._run(home, half.n_bytes, self.programs.half, *args)
        self._done(("half", i), half, x)
        if self.engine.early:
            self._look_ahead(i, home, x)
        uses = self._dense(i, layer) if routed is None else self._routed(i, layer, routed)
        x = self._feed(i, home, x, h, uses)
        if routed is not None and (self.engine.hot or self.engine.recorder):
            self._learn(i, routed, uses)
        return x, store

    def _read_bytes(self, i: int, layer: Layer) -> int:
        assert layer.whole is not None
        config, n_bytes = self.placed.config, layer.whole.n_bytes
        if not config.is_sparse(i):
            return n_bytes
        parts = [p for p in self.placed.plan.parts if p.kind == "expert" and p.layer == i]
        visited = min(int(self.counts.sum()) * config.experts_per_token, len(parts))
        return n_bytes - sum(p.n_bytes for p in parts) * (len(parts) - visited) // len(parts)

    def _count_whole(self, layer: Layer) -> None:
        if self.placed.config.experts and layer.whole is not None:
            uses = int(self.counts.sum()) * self.placed.config.experts_per_token
            self.monitor.uses += uses
            self.monitor.hits += uses * (layer.whole.role == "resident")

    def _dense(self, i: int, layer: Layer) -> list[_Use]:
        pieces = layer.ffn[-1]
        [mode] = self._modes(i, [-1], [int(self.counts.sum())])
        return [self._use((i, -1, j), piece, mode, None, None) for j, piece in enumerate(pieces)]

    def _routed(self, i: int, layer: Layer, routed: Any) -> list[_Use]:
        """List the pieces of the experts that were chosen, those with most tokens first."""
        # The one wait for the router; all arrays are ready at once.
        weights, chosen = (np.asarray(array) for array in routed[1:])
        chosen = np.where(self.valid[:, None], chosen, -1)
        experts, counts = np.unique(chosen[self.valid], return_counts=True)
        self._judge_named(i, experts.tolist())
        modes = self._modes(i, experts.tolist(), counts.tolist())
        found = []
        for place in np.argsort(-counts, kind="stable").tolist():
            e = int(experts[place])
            count, index, share = pick(chosen, weights, e)
            pieces, hot = layer.ffn[e], self.engine.hot.get(i, e) if self.engine.hot else None
            if hot is not None:
                pieces = (Loaded(hot, "resident", pieces[0].n_bytes),)
            self.monitor.uses += count
            self.monitor.hits += count * all(piece.role == "resident" for piece in pieces)
            for j, piece in enumerate(pieces):
                found.append(self._use((i, e, j), piece, modes[place], index, share))
        return found

    def _look_ahead(self, i: int, home: Any, x: Any) -> None:
        """Run the router of the next layer on this layer's residual stream."""
        following = i + 1
        if (
            self.ring is None
            or following == self.placed.config.layers
            or not self.placed.config.is_sparse(following)
        ):
            return
        layer = self.placed.layers[following]
        if layer.half is None or layer.half.role == "stream" or self.placed.home(layer) != home:
            return
        args = (layer.half.weights, x)
        self.named[following] = self._run(home, 0, self.programs.early, *args)

    def _copy_named(self, i: int) -> None:
        """Start copies of what layer i's router named early, as far as there are free buffers."""
        if i not in self.named or self.ring is None:
            return
        layer = self.placed.layers[i]
        named = np.asarray(self.named[i])[self.valid]
        experts, counts = np.unique(named, return_counts=True)
        self.named[i] = set(experts.tolist())
        for e in experts[np.argsort(-counts, kind="stable")].tolist():
            if self.engine.hot is not None and self.engine.hot.get(i, e) is not None:
                continue
            for j, piece in enumerate(layer.ffn[e]):
                key = (i, e, j)
                if piece.role == "resident" or self.ring.holds(key):
                    continue
                if not self.ring.has_room():
                    return
                self.monitor.early_copies += 1
                self._start(key, piece)

    def _judge_named(self, i: int, experts: Sequence[int]) -> None:
        """Count what was foretold of layer i, and free the buffers of what was not wanted."""
        named = self.named.pop(i, None)
        if isinstance(named, set) and self.ring is not None:
            self.monitor.early += len(named)
            self.monitor.early_right += len(named & set(experts))
            vain = named - set(experts)
            pieces = self.placed.layers[i].ffn
            self.ring.drop({(i, e, j) for e in vain for j in range(len(pieces[e]))})

    def _modes(self, i: int, experts: list[int], counts: list[int]) -> Sequence[Mode]:
        """Decide what to do with the columns of each part that are not resident."""
        alone: list[Mode] = ["cpu"] * len(experts)
        return self.engine.choose(i, experts, counts) if self.ring else alone

    def _use(self, key: Any, piece: Loaded, mode: Mode, index: Any, share: Any) -> _Use:
        resident = piece.role == "resident"
        moves = mode == "moved" or (mode == "planned" and piece.role == "stream")
        moves = moves or (self.ring is not None and self.ring.holds(key))
        moved = moves and not resident and self.ring is not None
        return _Use(key, piece, resident or moved, moved, index, share)

    def _learn(self, i: int, routed: Any, uses: list[_Use]) -> None:
        """Tell recorder and cache what the router chose."""
        logits, chosen = (np.asarray(routed[j])[self.valid] for j in (0, 2))
        odds = np.exp(logits - logits.max(-1, keepdims=True))
        scores = odds / odds.sum(-1, keepdims=True)
        if self.engine.recorder is not None:
            number = sum(self.placed.config.is_sparse(j) for j in range(i))
            named = np.repeat(self.sequences, self.tokens.shape[1])[self.valid]
            self.engine.recorder.add(number, chosen, sequence=named, scores=scores)
        if self.engine.hot is not None and self.ring is not None:
            came = {use.key[1]: self.ring.fetch(use.key, None) for use in uses
                    if use.moved and self.ring.holds(use.key)}  # fmt: skip
            self.engine.hot.took(i, np.unique(chosen).tolist(), scores, came)

    def _feed(self, i: int, home: Any, x: Any, h: Any, uses: list[_Use]) -> Any:
        """Run a layer's pieces on both devices and add them to the residual stream."""
        cpu, accelerator = self.placed.devices
        other = cpu if home == accelerator else accelerator
        sums, inputs = {home: x}, {home: h}
        away = [use for use in uses if use.on_accelerator == (other == accelerator)]
        if away and other is not None:
            inputs[other] = self._carry(h, other)
            sums[other] = jax.device_put(np.zeros(h.shape, h.dtype), other)
        waiting = [use for use in uses if use.moved]
        for use in waiting[: self.ring.depth] if self.ring else ():
            self._start(use.key, use.piece)
        here = [use for use in uses if not use.moved]
        for use in sorted(here, key=lambda use: use.on_accelerator):
            self._add(use, sums, inputs, use.piece.weights)
        for use in waiting:
            assert self.ring is not None
            self._add(use, sums, inputs, self._fetch(use))
            self.ring.used(use.key, sums[accelerator])
        self._copy_named(i + 1)
        self._ahead()
        total = sums[home]
        if other in sums:
            total = total + self._carry(sums[other], home)
        return total

    def _add(self, use: _Use, sums: Any, inputs: Any, tree: Any) -> None:
        cpu, accelerator = self.placed.devices
        device = accelerator if use.on_accelerator else cpu
        args = (sums[device], tree, inputs[device], use.index, use.share)
        sums[device] = self._run(device, use.piece.n_bytes, self.programs.piece, *args)

    def _fetch(self, use: _Use) -> Any:
        return self._fetched(use.key, use.piece, moved=True)

    def _fetched(self, key: Any, part: Loaded, *, moved: bool = False) -> Any:
        """Give a part's weights where they are used, copying them over if they must."""
        if not moved and part.role != "stream":
            return part.weights
        assert self.ring is not None
        self._start(key, part)
        return self.monitor.run("link", self.ring.fetch, key, part.weights)

    def _start(self, key: Any, part: Loaded) -> None:
        assert self.ring is not None
        if not self.ring.holds(key):
            self.monitor.moved_bytes += part.n_bytes
            self.monitor.run("link", self.ring.start, key, part.weights)

    def _done(self, key: Any, part: Loaded, result: Any) -> None:
        if part.role == "stream" and self.ring is not None:
            self.ring.used(key, result)
            self._ahead()

    def _coming(self) -> list[tuple[Any, Loaded]]:
        """List what every pass copies whatever its tokens are, in the order of use."""
        found: list[tuple[Any, Loaded]] = []
        for i, layer in enumerate(self.placed.layers):
            if layer.half is not None:
                found.append((("half", i), layer.half))
            found += [((i, -1, j), piece) for j, piece in enumerate(layer.ffn.get(-1, ()))]
        found.append(("head", self.placed.head))
        return [(key, part) for key, part in found if part.role == "stream"]

    def _ahead(self) -> None:
        """Start copies of later layers while there is a buffer that nobody waits for."""
        if self.ring is None or self.monitor.blocking:
            return
        self.coming = [item for item in self.coming if item[0] not in self.ring.spent]
        for key, part in self.coming:
            if self.ring.holds(key):
                continue
            if not self.ring.has_room():
                return
            self._start(key, part)
