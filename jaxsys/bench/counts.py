"""Operations of a training step by formula, part by part, beside those of the traced program.

The parts bear the names of the decoder's `jax.named_scope`s. A product of matrices is two
operations per multiplication and addition, and twice that in the backward pass: once for the
input's gradient and once for the weight's, if it is trained. Everything else is a few operations
per number written; those few are counted by hand from the decoder's own arithmetic.
"""

import math
from typing import Any, NamedTuple

from jaxsys.bench.techniques import Method
from jaxsys.core.flops import Scoped, by_scope
from jaxsys.models.lm import LMConfig, shapes
from jaxsys.models.lm.families import layout_of
from jaxsys.models.lm.layout import block_linears
from jaxsys.models.lm.moe import row_counts

PARTS = ("embedding", "norm", "qkv", "rope", "scores", "softmax", "values", "output", "mlp",
         "head", "loss", "optimizer")  # fmt: skip
# Operations per number that is written, forward and backward.
_NORM = {"rms": (5.0, 9.0), "layer": (8.0, 13.0)}
_ACTIVATION = {"silu": (5.0, 6.0), "gelu": (7.0, 8.0), "gelu_new": (11.0, 9.0), "relu": (2.0, 2.0)}
_ROPE, _SOFTMAX, _LOSS, _ADAMW = (3.0, 4.5), (5.0, 6.0), (6.0, 2.0), 18.0


class Cost(NamedTuple):
    """Operations of one part.

    Attributes:
      forward: of the forward pass.
      backward: of the backward pass.

    >>> Cost(1.0, 2.0).total
    3.0
    """

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Both."""
        return self.forward + self.backward


class _Rows(NamedTuple):
    """How many rows pass: in the blocks, and in the head; and what is trained."""

    batch: int
    tokens: int
    predicted: int
    trained: bool
    rank: int  # of adapters beside frozen matrices, 0 without

    @property
    def n(self) -> int:
        return self.batch * self.tokens

    def product(self, n: int | float, inputs: int, outputs: int, *, adapted: bool = True) -> Cost:
        plain = 2.0 * n * inputs * outputs
        thin = 2.0 * n * self.rank * (inputs + outputs) if adapted else 0.0
        return Cost(plain + thin, plain * (2 if self.trained else 1) + 2 * thin)


def step_flops(
    config: LMConfig,
    batch: int,
    tokens: int,
    *,
    method: Method = "pretrain",
    rank: int = 8,
    prompt_tokens: int = 20,
    expert_rows: int | float | None = None,
    products_only: bool = False,
) -> dict[str, Cost]:
    """Give the operations of one training step by formula, without recomputation.

    Args:
      config: the model, of any family.
      batch: B.
      tokens: T that are read in a row.
      method: what is trained.
      rank: of adapters, with method ``lora``.
      prompt_tokens: vectors before a row, with method ``prompt``.
      expert_rows: rows that each expert of a mixture computes; by default its share, so that every
        token is computed by the experts that it visits and no other.
      products_only: leave out all but products of matrices, as model FLOP utilisation has it.

    Returns:
      Part to its cost. Scores and values are counted for all pairs of tokens, also those that the
      causal mask then hides.

    Reference: Narayanan et al. (arXiv 2104.04473), appendix; Chowdhery et al., "PaLM" (arXiv
    2204.02311), appendix B, for what model FLOP utilisation counts.

    >>> config = LMConfig("llama", 97, 32, 2, 4, 4, 8, 48, 64)
    >>> found = step_flops(config, 1, 16, products_only=True)
    >>> found["mlp"]  # 2 blocks of 3 matrices
    Cost(forward=294912.0, backward=589824.0)
    """
    trained = method in ("pretrain", "full")
    length = tokens + (prompt_tokens if method == "prompt" else 0)
    rows = _Rows(batch, length, batch * tokens, trained, rank if method == "lora" else 0)
    parts = {name: Cost(0.0, 0.0) for name in PARTS}
    for i in range(config.layers):
        for name, cost in _block(config, i, rows, expert_rows).items():
            parts[name] = _sum(parts[name], cost)
    narrow = config.embed_width or config.width
    parts["head"] = rows.product(rows.predicted, narrow, config.vocab_size, adapted=False)
    if config.embed_width:
        ends = rows.product(rows.n, narrow, config.width, adapted=False)
        parts["embedding"], parts["head"] = ends, _sum(parts["head"], ends)
    if method == "lora":  # nothing below the first block's adapters wants a gradient
        parts["qkv"] = _sum(parts["qkv"], Cost(0.0, -_first_inputs(config, rows)))
    if not products_only:
        for name, cost in _elementwise(config, rows, method, prompt_tokens).items():
            parts[name] = _sum(parts[name], cost)
    return parts


def _sum(a: Cost, b: Cost) -> Cost:
    return Cost(a.forward + b.forward, a.backward + b.backward)


def _scaled(n: int | float, per: tuple[float, float]) -> Cost:
    return Cost(n * per[0], n * per[1])


def _block(
    config: LMConfig, i: int, rows: _Rows, expert_rows: int | float | None
) -> dict[str, Cost]:
    d, n, q = config.width, rows.n, config.heads * config.head_width
    kv = config.kv_heads * config.head_width
    pairs = 2.0 * n * rows.tokens * q
    qkv = [rows.product(n, d, width) for width in (q, kv, kv)]
    if layout_of(config).qkv:  # one matrix, so one adapter
        qkv = [rows.product(n, d, q + 2 * kv)]
    parts = {"scores": Cost(pairs, 2 * pairs), "values": Cost(pairs, 2 * pairs)}
    parts |= {"qkv": _total(qkv), "output": rows.product(n, q, d)}
    if config.is_sparse(i):
        experts, width = config.experts, config.expert_width
        own = n * config.experts_per_token / experts if expert_rows is None else expert_rows
        router = rows.product(n, d, experts, adapted=False)
        ffn = _ffn(config, rows, experts * own, width)
        return parts | {"mlp": _sum(router, ffn)}
    return parts | {"mlp": _ffn(config, rows, n, config.ffn_width)}


def _ffn(config: LMConfig, rows: _Rows, n: int | float, width: int) -> Cost:
    into = 2 if layout_of(config).gate else 1
    parts = [rows.product(n, config.width, width)] * into
    return _total([*parts, rows.product(n, width, config.width)])


def _total(costs: list[Cost]) -> Cost:
    return Cost(sum(c.forward for c in costs), sum(c.backward for c in costs))


def _first_inputs(config: LMConfig, rows: _Rows) -> float:
    q, kv = config.heads * config.head_width, config.kv_heads * config.head_width
    matrices = 1 if layout_of(config).qkv else 3
    return 2.0 * rows.n * config.width * (q + 2 * kv + matrices * rows.rank)


def _elementwise(config: LMConfig, rows: _Rows, method: Method, prompt: int) -> dict[str, Cost]:
    d, n, layers = config.width, rows.n, config.layers
    heads = (config.heads + config.kv_heads) * config.head_width
    sparse = sum(config.is_sparse(i) for i in range(layers))
    pairs = float(rows.batch * config.heads * layers) * rows.tokens**2
    norms = (2 if layout_of(config).mlp_norm else 1) * layers + config.final_norm
    normed = n * (norms * d + (layers * heads if config.qk_norm else 0))
    turned = (
        n * layers * (config.heads + config.kv_heads) * (config.rope.width if config.rope else 0)
    )
    acted = n * (layers - sparse) * config.ffn_width
    acted += n * sparse * config.experts_per_token * config.expert_width
    gated = bool(layout_of(config).gate)
    forward, backward = _ACTIVATION[config.activation]
    parts = {
        "norm": _scaled(normed, _NORM[config.norm]),
        "rope": _scaled(turned, _ROPE),
        "scores": _scaled(pairs, (1.0, 1.0)),
        "softmax": _scaled(pairs, _SOFTMAX),
        "output": Cost(n * d * layers, 0.0),
        "mlp": _sum(_scaled(acted, (forward, backward)), Cost(n * d * layers, 0.0)),
        "loss": _scaled(rows.predicted * config.vocab_size, _LOSS),
    }
    if not gated and config.ffn_bias:
        parts["mlp"] = _sum(parts["mlp"], _scaled(acted + n * d * layers, (1.0, 1.0)))
    learned = n * d if config.rope is None else 0  # positions
    tied = config.vocab_size * (config.embed_width or d) if config.tied else 0
    scattered = n * (config.embed_width or d) + learned + tied
    parts["embedding"] = Cost(learned, scattered if rows.trained else 0)
    parts["optimizer"] = Cost(_ADAMW * trained_numbers(config, method, rows.rank, prompt), 0.0)
    return parts


def trained_numbers(
    config: LMConfig, method: Method, rank: int = 8, prompt_tokens: int = 20
) -> int:
    """Count the numbers that a method trains.

    >>> config = LMConfig("llama", 97, 32, 2, 4, 4, 8, 48, 64)
    >>> trained_numbers(config, "prompt"), trained_numbers(config, "lora", 2)
    (640, 1984)
    """
    if method == "prompt":
        return prompt_tokens * config.width
    if method == "lora":
        found = (block_linears(layout_of(config), config, i) for i in range(config.layers))
        router = f"{layout_of(config).moe}.gate"  # has no adapter
        return sum(
            rank * (outputs + inputs)
            for linears in found
            for name, (outputs, inputs, _) in linears.items()
            if name != router
        )
    return sum(math.prod(leaf.shape) for leaf in shapes(config).values())


def balanced_rows(config: LMConfig, rows: int) -> int | None:
    """Give the rows that each expert's program computes when all are visited alike.

    `models.lm` rounds an expert's share up to one of a few sizes, so it computes more than
    the share.

    >>> balanced_rows(LMConfig("llama", 97, 32, 2, 4, 4, 8, 48, 64), 512) is None
    True
    """
    return row_counts(rows, config)[0] if config.experts else None


def count_step(jaxpr: Any) -> dict[str, Scoped]:
    """Count a traced step by part, as many times as its loops run.

    Of an expert's sizes of product (see `models.lm.moe`) the first that is not zero is counted:
    what runs when all experts are visited alike.

    Args:
      jaxpr: of the step, such as ``built.step.trace(built.state, built.batch).jaxpr.jaxpr``.

    Returns:
      Part to forward, recomputed and backward operations; "" to those in no part.

    >>> import jax
    >>> sum(c.total for c in count_step(jax.make_jaxpr(lambda x: x + x)(1.0).jaxpr).values())
    1.0
    """
    return by_scope(jaxpr, PARTS, branch=lambda totals: sorted(totals)[min(1, len(totals) - 1)])
