"""The engine gives models.lm's tokens and logits under every partition, and keeps its promises."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.evaluate import Sampling, from_lm
from jaxsys.evaluate import generate as whole_generate
from jaxsys.models import lm
from jaxsys.models.quantise import quantise
from jaxsys.offload.cache import lru
from jaxsys.offload.choose import Mode
from jaxsys.offload.engine import forward, init_state, make_engine
from jaxsys.offload.generate import DeviceLost, generate
from jaxsys.offload.hosted import host_weights, hosted
from jaxsys.offload.load import place_model
from jaxsys.offload.monitor import Monitor, device_bytes, terms
from jaxsys.offload.parts import cache_bytes, parts_of
from jaxsys.offload.place import Devices, cpu_plan, find_devices
from jaxsys.offload.traces import Recorder
from jaxsys.offload.types import Plan

PROMPTS = [[5, 6, 7], [1], [9, 8, 7, 6, 5, 4, 3, 2, 1] * 2, [40, 2]]
NEW = 4
SHAPES: dict[str, Any] = {"batch": 3, "chunk": 8}  # the same everywhere: few programs
COMMON = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
HF = {
    "llama": {"intermediate_size": 16, "num_key_value_heads": 2},
    "mixtral": {"intermediate_size": 16, "num_key_value_heads": 2, "num_local_experts": 4},
    "qwen3_moe": {
        "intermediate_size": 16, "moe_intermediate_size": 16, "num_experts": 4, "head_dim": 8,
        "num_experts_per_tok": 2, "num_key_value_heads": 2, "mlp_only_layers": [1],
    },
    "phimoe": {
        "intermediate_size": 16, "num_key_value_heads": 2, "num_local_experts": 4,
        "attention_bias": True, "lm_head_bias": True,
    },
    "gpt2": {},
}  # fmt: skip


def _config(form: str) -> lm.LMConfig:
    if form == "gpt2":
        sizes = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "n_inner": 16}
        return lm.config_from_hf({"model_type": "gpt2", "vocab_size": 97} | sizes)
    more = {"model_type": form, "max_position_embeddings": 64}
    return lm.config_from_hf(COMMON | HF[form] | more)


class Form:
    """A model, its parts, and models.lm's own greedy choice after given tokens."""

    def __init__(self, form: str):
        self.config = _config(form)
        fresh = lm.init(jax.random.key(1), self.config)
        # Larger weights than usual: fresh ones give nearly the same logits for every token.
        self.params = jax.tree.map(lambda x: x * 6 if x.ndim == 2 else x + 0.01, fresh)
        self.parts = parts_of(self.config)
        self._apply = jax.jit(lambda tokens: lm.apply(self.params, self.config, tokens).logits)

    def logits(self, rows: list[list[int]]) -> list[np.ndarray]:
        padded = np.zeros((len(PROMPTS), 24), np.int32)
        for row, ids in enumerate(rows):
            padded[row, : len(ids)] = ids
        found = np.asarray(self._apply(padded))
        return [found[row, : len(ids)] for row, ids in enumerate(rows)]

    def plan(self, resident: float, stream: float, cache: tuple[str, ...] = ()) -> Plan:
        """Keep and copy shares of every feed-forward part; attention where the cache is."""
        cache = cache or ("accelerator",) * self.config.layers
        here, over = [], []
        for part in self.parts:
            n = max(part.columns, 1)
            local = cache[part.layer] == "accelerator" if part.layer >= 0 else resident > 0
            here.append(round(resident * n) if part.columns else int(local))
            over.append(round(stream * n) if part.columns else 0)
        return Plan(self.parts, tuple(here), tuple(over), cache)  # type: ignore[arg-type]

    def engine(self, plan: Plan, kind: str = "virtual", **options):
        placed = place_model(self.params, plan, find_devices(kind), config=self.config)  # type: ignore[arg-type]
        return make_engine(placed, **options)

    def check(self, engine, prompts=PROMPTS, **options) -> None:
        """The tokens are the most likely ones by models.lm, given those before."""
        found = generate(engine, prompts, max_tokens=NEW, **(SHAPES | options))
        texts = [list(p) + new for p, new in zip(prompts, found.tokens, strict=True)]
        for prompt, new, logits in zip(prompts, found.tokens, self.logits(texts), strict=True):
            assert new == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
            assert len(new) == NEW


@pytest.fixture(scope="module")
def forms():
    made: dict[str, Form] = {}

    def get(name: str) -> Form:
        if name not in made:
            made[name] = Form(name)
        return made[name]

    return get


def test_a_cut_mixture_says_what_the_whole_says(forms):
    form = forms("mixtral")
    engine = form.engine(form.plan(0.5, 0.25, ("accelerator", "cpu")))
    form.check(engine)
    assert engine.placed.resident_bytes == engine.placed.plan.resident_bytes
    # Every expert is cut, so none is found whole; each use moves a quarter of it.
    monitor = engine.monitor
    assert monitor.hit_rate == 0
    expert = next(part for part in form.parts if part.kind == "expert")
    assert monitor.moved_bytes % (expert.n_bytes // 4) == 0
    assert 0 < monitor.moved_bytes <= monitor.uses * expert.n_bytes // 4


def test_logits_of_chunks_and_steps_are_the_models(forms):
    form = forms("mixtral")
    engine = form.engine(form.plan(0.5, 0.25, ("accelerator", "cpu")))
    state, ids = init_state(engine.placed, 3, 24), PROMPTS[2]
    expected = form.logits([ids])[0]
    first = np.zeros((1, 8), np.int32)
    first[0, :6] = ids[:6]
    logits, state = forward(engine, state, first, counts=np.array([6]), row=1)
    np.testing.assert_allclose(np.asarray(logits)[0], expected[5], 2e-4, 2e-4)
    for t in range(6, 9):
        step = np.full((3, 1), ids[t], np.int32)
        counts = np.array([0, 1, 0])
        logits, state = forward(engine, state, step, counts=counts)
        np.testing.assert_allclose(np.asarray(logits)[1], expected[t], 2e-4, 2e-4)
    assert state.lengths.tolist() == [0, 9, 0]


def test_a_dense_model_cut_and_alone(forms):
    form = forms("llama")
    engine = form.engine(form.plan(0.25, 0.5))
    form.check(engine)
    # Two buffers, as the plan leaves it open.
    half = next(part for part in form.parts if part.kind == "mlp").n_bytes // 2
    assert engine.ring.peak_bytes == 2 * half
    form.check(form.engine(cpu_plan(form.parts), "none"))


@pytest.mark.slow
@pytest.mark.parametrize("name", HF)
@pytest.mark.parametrize(
    ("resident", "stream", "cache"),
    [
        (0.125, 0.0, ()),
        (0.5, 0.0, ()),
        (1.0, 0.0, ()),
        (0.0, 1.0, ()),
        (0.5, 0.25, ("cpu", "accelerator")),
        (0.0, 0.0, ("cpu", "cpu")),
    ],
)
def test_every_form_under_every_partition(forms, name, resident, stream, cache):
    form = forms(name)
    form.check(form.engine(form.plan(resident, stream, cache)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_eight_bits_are_cut_exactly(forms, name):
    form = forms(name)
    in_out = name == "gpt2"
    coded = quantise(form.params, in_out=in_out)
    apply = jax.jit(lambda tokens: lm.apply(coded, form.config, tokens, last=True).logits)
    plan = form.plan(0.5, 0.25)
    placed = place_model(form.params, plan, find_devices("virtual"), config=form.config, int8=True)
    engine = make_engine(placed)
    tokens = np.array([PROMPTS[2]], np.int32)
    logits, _ = forward(engine, init_state(placed, 1, 24), tokens)
    expected = np.asarray(apply(tokens))[0, 0]
    np.testing.assert_allclose(np.asarray(logits)[0], expected, rtol=2e-4, atol=2e-4)


def test_streamed_attention_and_head_pass_through_the_ring(forms):
    form = forms("llama")
    n = [max(part.columns, 1) for part in form.parts]
    embed = [int(part.kind == "embed") for part in form.parts]
    stream = tuple(0 if e else c for c, e in zip(n, embed, strict=True))
    plan = Plan(form.parts, (0,) * len(n), stream, ("accelerator",) * 2)
    engine = form.engine(plan, pinned=True)
    form.check(engine)
    monitor, ring = engine.monitor, engine.ring
    assert engine.placed.resident_bytes == 0
    # Two buffers at once at most, of the largest parts: the head's beside a layer's.
    largest = sorted(part.n_bytes for part in form.parts if part.kind != "embed")[-2:]
    assert 0 < ring.peak_bytes <= sum(largest) + 1024
    assert monitor.moved_bytes > 3 * sum(part.n_bytes for part in form.parts[1:])


def _all_moved(layer, experts, counts) -> list[Mode]:
    return ["moved"] * len(experts)


def test_modes_are_chosen_while_it_runs_and_experts_come_and_go(forms):
    form = forms("mixtral")

    def choose(layer, experts, counts) -> list[Mode]:
        return ["moved" if n > 2 else "cpu" for n in counts]

    engine = form.engine(form.plan(0.0, 0.0), choose=choose)
    form.check(engine)
    monitor = engine.monitor
    assert monitor.moved_bytes > 0  # many tokens of an expert in the prompt
    assert monitor.cpu_bytes > 0  # one while decoding

    half = form.plan(0.0, 0.0)
    kept = tuple(
        n if part.kind != "expert" else part.columns * (part.expert % 2)
        for part, n in zip(form.parts, half.resident, strict=True)
    )
    plan = Plan(form.parts, kept, half.stream, half.cache_on)
    placed = place_model(
        form.params, plan, find_devices("virtual"), config=form.config, fixed=False
    )
    recorder = Recorder(4)
    cached = make_engine(placed, choose=_all_moved, policy=lru(), recorder=recorder)
    form.check(cached)
    assert cached.hot is not None
    assert cached.hot.state.resident.sum(1).tolist() == [2, 2]
    assert cached.monitor.hits > 0
    # What was recorded is what was used.
    trace = recorder.trace()
    assert len(trace) == cached.monitor.tokens
    assert cached.monitor.uses == trace.experts.size
    with pytest.raises(UserError, match="fixed=False"):
        form.engine(form.plan(1.0, 0.0), policy=lru())


def test_the_next_router_run_early_copies_what_it_names(forms):
    """Prefetched or named in vain, the tokens stay; hits are those of the routers themselves."""
    form = forms("mixtral")
    engine = form.engine(form.plan(0.0, 0.0), early=True)
    form.check(engine)
    monitor = engine.monitor
    assert 0 < monitor.early_right <= monitor.early
    assert 0 < monitor.early_rate <= 1
    assert monitor.early_copies > 0
    # Nothing else was to be copied, so all that moved was moved ahead.
    expert = next(part for part in form.parts if part.kind == "expert")
    assert monitor.moved_bytes == monitor.early_copies * expert.n_bytes
    assert engine.ring.peak_bytes <= engine.ring.depth * expert.n_bytes
    # By hand: the second layer's norm and router on what the first layer's half leaves.
    x = jax.random.normal(jax.random.key(0), (3, form.config.width))
    own = form.params["model"]["layers"]["1"]
    named = engine.programs.early(own, x)
    gain = own["post_attention_layernorm"]["weight"]
    h = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + form.config.norm_eps) * gain[None]
    logits = h @ own["block_sparse_moe"]["gate"]["weight"].T
    np.testing.assert_array_equal(named, jax.lax.top_k(logits, 2)[1])


@pytest.mark.parametrize("name", ["mixtral", pytest.param("llama", marks=pytest.mark.slow)])
def test_one_program_with_weights_in_host_memory_gives_the_same(forms, name):
    form, device = forms(name), jax.devices("cpu")[0]
    if "pinned_host" not in [memory.kind for memory in device.addressable_memories()]:
        pytest.skip("no page-locked host memory")
    own = host_weights(form.params, form.config, device)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(own)}
    assert kinds == {"pinned_host", device.default_memory().kind}
    tokens = np.zeros((4, 24), np.int32)
    tokens[0, :18] = PROMPTS[2]
    found = np.asarray(hosted(form.config)(own, tokens))[0, :18]
    np.testing.assert_allclose(found, form.logits([PROMPTS[2]])[0], 2e-4, 2e-4)


@pytest.mark.slow
def test_sampling_depends_on_the_seed_and_the_prompt_only(forms):
    form = forms("llama")
    laws = Sampling(temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.2)
    options = {"max_tokens": NEW, "sampling": laws, "key": jax.random.key(4)}
    model = from_lm(form.params, form.config)
    expected = whole_generate(model, PROMPTS, **options).tokens
    engine = form.engine(cpu_plan(form.parts), "none")
    assert generate(engine, PROMPTS, batch=3, chunk=8, **options).tokens == expected


def test_memory_is_what_the_plan_says(forms):
    form = forms("llama")
    device = Devices(jax.devices("cpu")[7], jax.devices("cpu")[6])
    plan = form.plan(0.5, 0.25)
    batch, slots = 2, 24
    kept = cache_bytes(form.config, slots, batch=batch)
    plan = Plan(plan.parts, plan.resident, plan.stream, plan.cache_on, cache_bytes=kept)
    assert device_bytes(device.accelerator) == 0
    placed = place_model(form.params, plan, device, config=form.config)
    state = init_state(placed, batch, slots)
    found = device_bytes(device.accelerator)
    assert found == plan.accelerator_bytes
    del state
    with pytest.raises(UserError, match="plan for this batch and length"):
        init_state(placed, batch + 1, slots)


def test_blocking_runs_time_every_resource(forms):
    form = forms("llama")
    engine = form.engine(form.plan(0.25, 0.5), monitor=Monitor(blocking=True))
    generate(engine, PROMPTS, max_tokens=2, **SHAPES)
    found = terms(engine.monitor)
    assert min(found.cpu_s, found.link_s, found.accelerator_s) > 0


def test_a_lost_device_keeps_the_text(forms, monkeypatch):
    form = forms("llama")
    engine = form.engine(cpu_plan(form.parts), "none")
    calls = []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) > 7:
            raise jax.errors.JaxRuntimeError("INTERNAL: the device is gone")
        return forward(*args, **kwargs)

    monkeypatch.setattr("jaxsys.offload.generate.forward", failing)
    with pytest.raises(DeviceLost, match=r"the device is gone.* new tokens of 4 prompts") as told:
        generate(engine, PROMPTS, max_tokens=NEW, **SHAPES)
    monkeypatch.undo()
    whole = generate(form.engine(cpu_plan(form.parts), "none"), PROMPTS, max_tokens=NEW, **SHAPES)
    kept = told.value.generated.tokens
    assert 0 < len(kept[0]) < NEW
    assert all(ids[: len(k)] == k for k, ids in zip(kept, whole.tokens, strict=True))


def test_a_file_that_is_cut_is_refused(forms, tmp_path):
    form = forms("llama")
    lm.save(tmp_path, form.params, form.config)
    placed = place_model(tmp_path, cpu_plan(form.parts), find_devices("none"))
    # Written with aligned tensors, so that nothing is copied but what a page cannot hold.
    assert placed.mapped_bytes > 0.9 * (placed.mapped_bytes + placed.copied_bytes)
    engine = make_engine(placed)
    form.check(engine)
    file = tmp_path / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.truncate(size - 64)
    with pytest.raises(UserError, match=f"has {size - 64} bytes and had {size}"):
        generate(engine, [[1]], max_tokens=2)
    with pytest.raises(UserError, match="truncated"):
        place_model(tmp_path, cpu_plan(form.parts), find_devices("none"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompts": [[1] * 70]}, "longer than the cache can be, 64 tokens"),
        ({"prompts": []}, "holds no token"),
        ({"prompts": [[97]]}, "token id 97 is outside"),
        ({"batch": 0}, "batch is 0"),
        ({"stop": ["x"]}, "without a tokenizer"),
    ],
)
def test_mistakes_of_a_request(forms, options, words):
    form = forms("llama")
    engine = form.engine(cpu_plan(form.parts), "none")
    prompts = options.pop("prompts", [[1]])
    with pytest.raises(UserError, match=words):
        generate(engine, prompts, max_tokens=3, **options)


def test_mistakes_of_a_plan(forms):
    form = forms("llama")
    plan, two = form.plan(0.5, 0.25), find_devices("virtual")
    with pytest.raises(UserError, match="this run has none"):
        place_model(form.params, plan, find_devices("none"), config=form.config)
    with pytest.raises(UserError, match="for other parts"):
        place_model(form.params, plan, two, config=_config("mixtral"))
    split = Plan(plan.parts, plan.resident, plan.stream, ("accelerator", "cpu"))
    with pytest.raises(UserError, match="run where its cache is"):
        place_model(form.params, split, two, config=form.config)
    with pytest.raises(UserError, match="without its config"):
        place_model(form.params, plan, two)
    small = Plan(plan.parts, plan.resident, plan.stream, plan.cache_on, buffer_bytes=8)
    with pytest.raises(UserError, match="largest copy has"):
        form.engine(small)
    engine = form.engine(cpu_plan(form.parts), "none")
    state = init_state(engine.placed, 1, 8)
    with pytest.raises(UserError, match="the cache holds 8"):
        forward(engine, state, np.ones((1, 9), np.int32))
    assert jnp.asarray(state.lengths).tolist() == [0]
