"""One description for every family of decoder language models.

Axes used throughout this package: ``B`` batch, ``T`` tokens of a call, ``S`` slots of a cache,
``V`` vocabulary, ``D`` model width, ``F`` feed-forward width, ``H`` query heads, ``K`` key/value
heads, ``C`` head width, ``L`` layers, ``E`` experts, ``N`` rows (B · T).
"""

from dataclasses import dataclass, replace

from jaxsys.core.errors import UserError

MOST_EXPERTS = 4096


@dataclass(frozen=True)
class Rope:
    """Describe rotary positions: which frequencies turn which part of a head.

    Args:
        theta: base θ of the frequencies θ^(-2i/width).
        width: how many of a head's C numbers turn, the rest passing unchanged; 0: all of them.
        interleaved: pairs are (0,1), (2,3), … (GPT-J) rather than (i, i + width/2).
        scaling: ``default``, ``linear`` (all frequencies divided by ``factor``) or ``llama3``.
        factor: the divisor of ``linear`` and ``llama3``.
        low_freq_factor: ``llama3``: wavelengths above ``original_positions`` over this are divided.
        high_freq_factor: ``llama3``: wavelengths below ``original_positions`` over this are kept.
        original_positions: ``llama3``: the positions of the model before it was stretched.

    >>> Rope(theta=500000.0, width=64).scaling
    'default'
    """

    theta: float = 10000.0
    width: int = 0
    interleaved: bool = False
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192


@dataclass(frozen=True)
class LMConfig:
    """Describe a decoder language model of any supported family; hashable, so static under jit.

    Args:
        model_type: the Hugging Face name of the family; it decides the tensors' names.
        vocab_size: V.
        width: D.
        layers: L.
        heads: H.
        kv_heads: K; it divides H, and each serves H / K consecutive query heads.
        head_width: C.
        ffn_width: F of a dense block.
        max_positions: longest sequence in tokens that the model was made for.
        activation: ``silu``, ``gelu`` (exact), ``gelu_new`` (tanh) or ``relu``.
        norm: ``rms`` or ``layer``.
        norm_eps: ε under the root.
        rope: rotary positions, or None for a learned table.
        tied: the output matrix is the embedding.
        qkv_bias: the query, key and value projections have biases.
        out_bias: the attention's output projection has a bias.
        ffn_bias: the feed-forward projections have biases.
        head_bias: the output matrix has a bias.
        qk_norm: queries and keys are normalised per head (Qwen3).
        windows: per layer the sliding window in tokens, 0 for none; empty: none anywhere.
        parallel: attention and feed-forward read the same residual stream.
        pre_norm: blocks normalise what they read (else what they have written: OPT-350m).
        final_norm: a normalisation stands before the output matrix.
        embed_width: width of the embedding where it differs from D (OPT-350m), else 0.
        experts: E, 0 for a dense model.
        experts_per_token: how many experts each token visits.
        expert_width: F of one expert.
        dense_layers: layers of a mixture model that have an ordinary feed-forward block.
        router: ``softmax`` or ``sparsemixer`` (PhiMoE).
        renormalise: the chosen experts' weights are divided by their sum.
        router_jitter: ε of the sparse mixer's mask.
        init_std: standard deviation of fresh weights.
        prefix: first part of the tensors' names; empty in files written from a bare base model.
        bos_id: token that begins a text, or None.
        eos_ids: tokens that end a text.
        pad_id: token that fills, or None.

    Raises:
        UserError: for a size below 1, or heads that do not divide.

    >>> small = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> small.queries_per_kv
    2
    """

    model_type: str
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    ffn_width: int
    max_positions: int
    activation: str = "silu"
    norm: str = "rms"
    norm_eps: float = 1e-5
    rope: Rope | None = Rope()
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int, ...] = ()
    parallel: bool = False
    pre_norm: bool = True
    final_norm: bool = True
    embed_width: int = 0
    experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0
    dense_layers: tuple[int, ...] = ()
    router: str = "softmax"
    renormalise: bool = True
    router_jitter: float = 0.01
    init_std: float = 0.02
    prefix: str = "model"
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self):
        sizes = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_width", "ffn_width")
        for name in (*sizes, "max_positions"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value < 2**31:
                raise UserError(
                    f"{name} of the {self.model_type} model is {value!r}; expected a whole number "
                    "from 1 up; correct the configuration"
                )
        if self.rope and not self.rope.width:
            object.__setattr__(self, "rope", replace(self.rope, width=self.head_width))
        self._check_heads()
        if self.experts and not 1 <= self.experts_per_token <= self.experts <= MOST_EXPERTS:
            raise UserError(
                f"each token visits {self.experts_per_token} of {self.experts} experts; expected "
                f"from 1 to all of them, {MOST_EXPERTS} at most; correct the configuration"
            )

    def _check_heads(self) -> None:
        rope = self.rope
        if rope and (rope.width % 2 or not 0 < rope.width <= self.head_width):
            raise UserError(
                f"rotary positions turn {rope.width} of a head's {self.head_width} numbers; "
                "expected an even number of them; correct the configuration"
            )
        if rope and not (
            rope.theta > 0 < rope.factor and rope.high_freq_factor > rope.low_freq_factor
        ):
            raise UserError(
                f"rotary positions are {rope}; expected a positive base and factor, and a high "
                "frequency factor above the low one; correct the configuration"
            )
        if self.heads % self.kv_heads:
            raise UserError(
                f"{self.heads} query heads and {self.kv_heads} key/value heads; expected the "
                "second to divide the first; correct the configuration"
            )

    @property
    def queries_per_kv(self) -> int:
        """Give how many query heads share one key/value head, H / K.

        >>> LMConfig("llama", 97, 32, 2, 4, 1, 8, 48, 64).queries_per_kv
        4
        """
        return self.heads // self.kv_heads

    def window(self, i: int) -> int:
        """Give layer i's sliding window in tokens, 0 for none.

        >>> LMConfig("mistral", 97, 32, 2, 4, 2, 8, 48, 64, windows=(0, 16)).window(1)
        16
        """
        return self.windows[i] if self.windows else 0

    def is_sparse(self, i: int) -> bool:
        """Say whether layer i's feed-forward block is a mixture of experts.

        >>> LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64).is_sparse(0)
        False
        """
        return self.experts > 0 and i not in self.dense_layers
