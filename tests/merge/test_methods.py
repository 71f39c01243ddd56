"""Every method: against a NumPy transcription, hand-worked cases, and the laws of merging."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.core.errors import UserError
from jaxsys.core.tree import path_key
from jaxsys.merge import METHODS, merge_tree
from jaxsys.merge.draws import threefry
from jaxsys.merge.linear import Linear, Passthrough, TaskArithmetic
from jaxsys.merge.sparsify import band, drop, drop_by_rank, trim
from jaxsys.merge.sphere import Karcher, MultiSlerp, NuSlerp, Slerp
from jaxsys.merge.stock import ModelStock, NearSwap, Sce
from jaxsys.merge.ties import Breadcrumbs, Dare, Della, DellaLinear, Ties

_spec = importlib.util.spec_from_file_location(
    "merge_oracles", Path(__file__).with_name("oracles.py")
)
oracles = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(oracles)

SHAPE = (24, 50)
CASES = [
    ("linear", Linear()),
    ("linear", Linear(normalize=False)),
    ("task_arithmetic", TaskArithmetic(lambda_=0.3)),
    ("task_arithmetic", TaskArithmetic(normalize=True)),
    ("passthrough", Passthrough(0.5)),
    ("ties", Ties(density=0.3)),
    ("ties", Ties(density=0.5, normalize=False, rescale="l1", lambda_=0.7)),
    ("breadcrumbs", Breadcrumbs(density=0.6, gamma=0.05)),
    ("breadcrumbs", Breadcrumbs(density=0.98, gamma=0.05)),
    ("breadcrumbs_ties", Breadcrumbs(density=0.6, gamma=0.05, normalize=True)),
    ("slerp", Slerp(0.3)),
    ("nuslerp", NuSlerp()),
    ("nuslerp", NuSlerp(nuslerp_flatten=False)),
    ("nuslerp", NuSlerp(nuslerp_flatten=False, nuslerp_row_wise=True)),
    ("multislerp", MultiSlerp()),
    ("karcher", Karcher()),
    ("model_stock", ModelStock()),
    ("model_stock", ModelStock(filter_wise=True)),
    ("sce", Sce()),
    ("sce", Sce(select_topk=0.4)),
    ("ram", METHODS["ram"].config(epsilon=0.5)),
    ("ramplus_tl", METHODS["ramplus_tl"].config(epsilon=0.5)),
    ("nearswap", NearSwap(0.4)),
    ("arcee_fusion", METHODS["arcee_fusion"].config()),
]
RANDOM = {
    "dare_linear": Dare(density=0.5),
    "dare_ties": Dare(density=0.5),
    "della": Della(density=0.5),
    "della_linear": DellaLinear(density=0.5),
}


def inputs(name, n=None, seed=0, shape=SHAPE, spread=1.0):
    """Draw a base if the method takes one, models around it, and uneven weights."""
    rng = np.random.default_rng(seed)
    least, most = METHODS[name].models
    n = n or max(least, min(3, most or 3))
    base = rng.standard_normal(shape).astype(np.float32)
    stack = base + spread * rng.standard_normal((n, *shape)).astype(np.float32)
    return (None if METHODS[name].base == "unused" else base), stack, rng.uniform(0.5, 2, n)


def test_every_method_is_covered():
    assert {name for name, _ in CASES} | set(RANDOM) == set(METHODS)


BOTH = [(*case, True) for case in CASES] + [
    (name, config, False) for name, config in CASES if METHODS[name].base == "optional"
]


@pytest.mark.parametrize(("name", "config", "with_base"), BOTH)
def test_methods_equal_their_transcription(name, config, with_base):
    base, stack, w = inputs(name)
    base = base if with_base else None
    wide = None if base is None else base.astype(np.float64)
    expected = getattr(oracles, name)(config, wide, stack.astype(np.float64), w)
    models = [{"w": x} for x in stack]
    tree = None if base is None else {"w": base}
    found = merge_tree(name, models, base=tree, weights=w, config=config)["w"]
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
    # The leaf function, whole and traced, is the same method.
    traced = jax.jit(lambda b, s: METHODS[name].leaf(config, b, s, jnp.float32(w), None))
    np.testing.assert_allclose(traced(base, stack), expected, rtol=1e-4, atol=1e-4)


def test_ties_by_hand():
    # Density ½ keeps the two largest of each; signs: +: 4+0-0, −: 0-2+0 ...
    base = np.ones(4, np.float32)
    stack = base + np.array([[4, -1, 2, 0.5], [-3, -2, 0.1, 0.2], [2, 0, -1, 3]], np.float32)
    # Trimmed: [4,·,2,·], [−3,−2,·,·], [2,·,·,3]; sums 3, −2, 2, 3; agreeing: {4,2}, {−2}, {2}, {3}.
    models = [{"w": x} for x in stack]
    mean = merge_tree("ties", models, base={"w": base}, config=Ties(density=0.5))["w"]
    assert mean.tolist() == [1 + 3, 1 - 2, 1 + 2, 1 + 3]
    config = Ties(density=0.5, normalize=False, lambda_=0.5)
    total = merge_tree("ties", models, base={"w": base}, config=config)["w"]
    assert total.tolist() == [1 + 3, 1 - 1, 1 + 1, 1 + 1.5]


def test_model_stock_by_hand():
    # Differences (1, 0) and (1, 1): cos = 1/√2, t = √2 / (1 + 1/√2) = 2√2/(√2 + 1) · ...
    base = np.zeros(2, np.float32)
    models = [{"w": np.float32([1, 0])}, {"w": np.float32([1, 1])}]
    cos = 2**-0.5
    t = 2 * cos / (1 + cos)
    found = merge_tree("model_stock", models, base={"w": base})["w"]
    np.testing.assert_allclose(found, [t, t / 2], rtol=1e-6)


def test_slerp_by_hand_and_at_its_ends():
    a, b = {"w": np.float32([1, 0])}, {"w": np.float32([0, 1])}
    half = merge_tree("slerp", [b], base=a, config=Slerp(0.5))["w"]
    np.testing.assert_allclose(half, [0.5**0.5] * 2, rtol=1e-6)
    for t, end in ((0.0, a), (1.0, b)):
        found = merge_tree("slerp", [b], base=a, config=Slerp(t))["w"]
        np.testing.assert_allclose(found, end["w"], atol=1e-7)


def test_global_ties_ranks_over_all_tensors():
    rng = np.random.default_rng(1)
    base = {"a": rng.standard_normal((9, 7)), "b": rng.standard_normal(40)}
    base = {k: v.astype(np.float32) for k, v in base.items()}
    models = [
        {k: v + s * rng.standard_normal(v.shape).astype(np.float32) for k, v in base.items()}
        for s in (1.0, 0.2)
    ]

    def flat(tree):
        return np.concatenate([tree["a"].ravel(), tree["b"]])

    config = Ties(density=0.25, trim="global", zero_sign="majority", normalize=False, lambda_=0.3)
    merged = merge_tree("ties", models, base=base, config=config)
    whole = Ties(density=0.25, normalize=False, lambda_=0.3)
    stack = np.array([flat(m) for m in models], np.float64)
    expected = oracles.ties(whole, flat(base).astype(np.float64), stack, np.ones(2))
    np.testing.assert_allclose(flat(merged), expected, atol=1e-6)


@pytest.mark.parametrize("name", RANDOM)
def test_random_methods_keep_what_they_promise(name):
    base, stack, _ = inputs(name, shape=(64, 256))
    models, tree = [{"w": x} for x in stack], {"w": base}
    config, key = RANDOM[name], jax.random.key(3)
    one = merge_tree(name, models[:1], base=tree, config=config, key=key)["w"] - base
    tau = stack[0] - base
    assert abs((one != 0).mean() - 0.5) < 0.02
    # L1 rescale: the sum of magnitudes is that of all entries.
    np.testing.assert_allclose(np.abs(one).sum(), np.abs(tau).sum(), rtol=1e-4)
    factors = (one / tau)[np.abs(tau) > 0.5]
    kept = factors[factors != 0]
    assert kept.std() / kept.mean() < 1e-3
    again = merge_tree(name, models[:1], base=tree, config=config, key=key)["w"] - base
    other = merge_tree(name, models[:1], base=tree, config=config, key=jax.random.key(4))["w"]
    assert (one == again).all()
    assert not (one == other - base).all()
    if "della" in name:
        rank = np.argsort(np.argsort(np.abs(tau), axis=1), axis=1)
        low, high = (one != 0)[rank < 64], (one != 0)[rank >= 192]
        assert abs(low.mean() - (0.5 - 0.15 * 0.75)) < 0.03
        assert abs(high.mean() - (0.5 + 0.15 * 0.75)) < 0.03
    # The plain rescale is unbiased: the mean over many entries of one value is that value.
    plain = dataclasses.replace(config, rescale="expected")
    ones = {"w": base + 1}
    mean = merge_tree(name, [ones], base=tree, config=plain, key=key)["w"] - base
    assert abs(float(mean.mean()) - 1) < 0.03


@pytest.mark.parametrize("name", ["dare_ties", "dare_linear"])
def test_dare_equals_its_formula_given_its_mask(name):
    base, stack, w = inputs(name)
    config, key = Dare(density=0.4), jax.random.key(5)
    # Models one by one show their masks; together they are merged from the same masks.
    parts = []
    for i, tau in enumerate(stack - base):
        others = [{"w": base if j != i else base + tau} for j in range(len(stack))]
        alone = merge_tree("dare_linear", others, base={"w": base}, config=config, key=key)["w"]
        kept = np.abs(np.asarray(alone - base)) > 1e-5
        parts.append(oracles.l1(tau, tau * kept))
    parts = np.array(parts, np.float64)
    wide = base.astype(np.float64)
    expected = wide + np.tensordot(w, parts, 1)
    if name == "dare_ties":
        expected = oracles.elect(config, wide, parts, w)
    models = [{"w": x} for x in stack]
    found = merge_tree(name, models, base={"w": base}, weights=w, config=config, key=key)["w"]
    np.testing.assert_allclose(found, expected, atol=3e-4)


@settings(max_examples=15, deadline=None)
@given(name=st.sampled_from(sorted(METHODS)), n=st.integers(1, 4), seed=st.integers(0, 99))
def test_copies_give_the_copy(name, n, seed):
    least, most = METHODS[name].models
    n = max(least, min(n, most or n))
    base, stack, _ = inputs(name, n, seed)
    copy = stack[0]
    config = METHODS[name].config()
    tree = None if base is None else {"w": base}
    models = [{"w": copy}] * n
    # Sums of differences count a copy n times unless the weights add up to one.
    weights = np.full(n, 1 / n)
    found = np.asarray(merge_tree(name, models, base=tree, weights=weights, config=config)["w"])
    if name in ("slerp",):
        models = [{"w": base}]
        found, copy = merge_tree(name, models, base=tree)["w"], base
    if name in ("nearswap", "arcee_fusion"):
        found = np.where(np.isclose(found, base, atol=3e-3), copy, found)
    np.testing.assert_allclose(found, copy, rtol=1e-4, atol=2e-4)


@settings(max_examples=15, deadline=None)
@given(name=st.sampled_from(sorted(METHODS)), seed=st.integers(0, 99), turn=st.integers(1, 2))
def test_order_of_models_does_not_matter(name, seed, turn):
    if name in RANDOM:
        return  # masks go with a model's place
    base, stack, w = inputs(name, None, seed)
    tree = None if base is None else {"w": base}
    order = np.roll(np.arange(len(stack)), turn)
    a = merge_tree(name, [{"w": x} for x in stack], base=tree, weights=w)["w"]
    b = merge_tree(name, [{"w": stack[i]} for i in order], base=tree, weights=w[order])["w"]
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(name=st.sampled_from(sorted(METHODS)), seed=st.integers(0, 99), power=st.integers(-3, 3))
def test_scaling_all_inputs_scales_the_result(name, seed, power):
    if name in ("nearswap", "ram", "ramplus_tl", "arcee_fusion"):
        return  # they have thresholds in the unit of the parameters
    base, stack, w = inputs(name, None, seed)
    c = np.float32(2.0**power)
    tree = None if base is None else {"w": base}
    more = None if base is None else {"w": c * base}
    key = jax.random.key(0)
    a = merge_tree(name, [{"w": x} for x in stack], base=tree, weights=w, key=key)["w"]
    b = merge_tree(name, [{"w": c * x} for x in stack], base=more, weights=w, key=key)["w"]
    np.testing.assert_allclose(b, c * np.asarray(a), rtol=1e-4, atol=1e-4 * c)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_dtypes_stay(name):
    base, stack, w = inputs(name)
    half = [{"w": x.astype(ml_dtypes.bfloat16)} for x in stack]
    tree = None if base is None else {"w": base.astype(ml_dtypes.bfloat16)}
    assert merge_tree(name, half, base=tree, weights=w)["w"].dtype == jnp.bfloat16
    asked = merge_tree(name, half, base=tree, weights=w, dtype=jnp.float32)["w"]
    assert asked.dtype == jnp.float32
    assert np.isfinite(asked).all()


@pytest.mark.parametrize("name", ["linear", "ties", "dare_ties", "della", "karcher", "sce"])
def test_sharded_equals_unsharded(name):
    base, stack, w = inputs(name, shape=(16, 64))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.NamedSharding(mesh, jax.P("x"))
    config = RANDOM.get(name) or (Ties(density=0.3) if name == "ties" else METHODS[name].config())
    options = {"weights": w, "config": config, "key": jax.random.key(1)}
    tree = None if base is None else {"w": base}
    spread = None if base is None else {"w": jax.device_put(base, place)}
    plain = merge_tree(name, [{"w": x} for x in stack], base=tree, **options)["w"]
    models = [{"w": jax.device_put(x, place)} for x in stack]
    found = merge_tree(name, models, base=spread, **options)["w"]
    assert len(found.sharding.device_set) == 8
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-5)


def test_sparsifiers():
    tau = jax.random.normal(jax.random.key(0), (40, 50))
    assert int((trim(tau, 0.2) != 0).sum()) == 400
    inner = band(tau, 0.2, 0.1)
    assert int((inner != 0).sum()) == 400
    assert float(jnp.abs(inner).max()) < float(jnp.sort(jnp.abs(tau).ravel())[-200])
    kept = drop(tau, 0.3, jax.random.key(1))
    assert abs(float((kept != 0).mean()) - 0.3) < 0.04
    np.testing.assert_allclose(kept[kept != 0], (tau / 0.3)[kept != 0], rtol=1e-3)
    ranked = drop_by_rank(tau, 0.5, 0.2, jax.random.key(1))
    np.testing.assert_allclose(jnp.abs(ranked).sum(), jnp.abs(tau).sum(), rtol=1e-5)


def test_threefry_is_that_of_jax():
    words = jax.random.key_data(jax.random.key(9))
    low = np.arange(7, dtype=np.uint32)
    ours = threefry(words[0], words[1], jnp.zeros(7, jnp.uint32), low)
    folded = [jax.random.key_data(jax.random.fold_in(jax.random.key(9), int(i))) for i in low]
    np.testing.assert_array_equal(np.stack(ours, 1), np.stack(folded))


def test_weights_and_options_can_be_traced():
    base, stack, _ = inputs("ties")
    models = [{"w": jnp.asarray(x)} for x in stack]

    @jax.jit
    def merged(w, density, lambda_):
        config = Ties(density=density, lambda_=lambda_)
        return merge_tree("ties", models, base={"w": base}, weights=w, config=config)["w"]

    w = np.float32([0.5, 1, 2])
    config = Ties(density=0.25, lambda_=0.5)
    plain = merge_tree("ties", models, base={"w": base}, weights=w, config=config)["w"]
    np.testing.assert_allclose(merged(w, 0.25, 0.5), plain, rtol=1e-5, atol=1e-5)


def test_mistakes_are_told():
    a, b = {"w": np.zeros((2, 3)), "v": np.zeros(4)}, {"w": np.zeros((2, 4)), "u": np.zeros(1)}
    with pytest.raises(UserError, match=r"3 tensors do not fit: v is .*w is \[2, 3\].* u is"):
        merge_tree("linear", [a, b])
    with pytest.raises(UserError, match="name a base"):
        merge_tree("ties", [a, a])
    with pytest.raises(UserError, match="takes 2"):
        merge_tree("nuslerp", [a, a, a])
    for bad in (0.0, -0.1, 1.01, (0.5, 2.0)):
        with pytest.raises(UserError, match="density"):
            Ties(density=bad)
    with pytest.raises(UserError, match="epsilon"):
        Della(density=0.9)
    models = [{"w": np.ones(8, np.float32)}] * 3
    with pytest.raises(UserError, match="2 values were given for 3"):
        merge_tree("dare_ties", models, base=models[0], config=Dare(density=(0.5, 0.5)))


def test_path_and_key_decide_the_draw():
    base = {"a": np.zeros(4096, np.float32), "b": np.zeros(4096, np.float32)}
    ones = {k: v + 1 for k, v in base.items()}
    merged = merge_tree("dare_linear", [ones], base=base, config=Dare(density=0.5))
    # Without a key all paths draw alike; with one each path has its own.
    assert (merged["a"] == merged["b"]).all()
    key = jax.random.key(0)
    merged = merge_tree("dare_linear", [ones], base=base, config=Dare(density=0.5), key=key)
    assert 0.4 < (np.asarray(merged["a"] != 0) == np.asarray(merged["b"] != 0)).mean() < 0.6
    assert not (path_key(key, "a") == path_key(key, "b")).all()
