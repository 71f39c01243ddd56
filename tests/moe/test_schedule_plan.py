"""Plans of whole steps: gradient partitions, systems, JSON, the online mode, the profiler."""

import itertools

import jax
import numpy as np
import pytest

from jaxsys.core.cost import LinearCost, PoorFitError
from jaxsys.core.errors import UserError
from jaxsys.core.measure import timing
from jaxsys.moe import online, planner, profile
from jaxsys.moe.compare import uniform
from jaxsys.moe.contract import Axes, LayerPlan, MoEPlan
from jaxsys.moe.costs import TESTBED_B, Costs
from jaxsys.moe.figures import step_timeline
from jaxsys.moe.partition import Backward, best_partition, fill, solve
from jaxsys.moe.systems import SYSTEMS, find_system
from jaxsys.moe.two_step import step_one, two_step
from jaxsys.moe.volumes import Shape, Volumes, volumes

LAYERS, CHOICES = 4, 3


def problem(seed, layers=LAYERS):
    rng = np.random.default_rng(seed)
    busy = np.sort(rng.uniform(1.0, 3.0, (layers, CHOICES)), axis=1)
    least = busy + rng.uniform(0.0, 3.0, (layers, CHOICES))
    ready = rng.uniform(0.0, 4.0, layers) * (rng.random(layers) < 0.8)
    return Backward(least, busy, rng.uniform(0, 1, layers), ready, 0.1, rng.uniform(0.3, 2.0))


def brute_force_s(given):
    """Least seconds over all degrees, gaps filled in plain Python as early as possible."""
    least, busy, dense, ready, alpha, beta = given
    best = np.inf
    for choice in itertools.product(range(least.shape[1]), repeat=len(ready)):
        seconds = pending = 0.0
        for i, r in enumerate(choice):
            pending += ready[i]
            seconds += least[i, r]
            for gap in (least[i, r] - busy[i, r], dense[i]):
                pending -= min(pending, max(0.0, gap - alpha) / beta)
        best = min(best, seconds + beta * pending)
    return best


@pytest.mark.parametrize("seed", range(12))
def test_partition_is_the_best_there_is(seed):
    given = problem(seed)
    found = solve(given)
    assert found.exact
    assert float(found.seconds) == pytest.approx(brute_force_s(given), rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_partition_is_never_worse_than_differential_evolution(seed):
    given = problem(100 + seed)
    evolved = two_step(given, seed=seed, most_generations=200)
    assert float(solve(given).seconds) <= float(evolved.seconds) * (1 + 1e-9)
    # What the evolution found is a valid partition of the same problem.
    y = np.where(evolved.moe > 0, given.alpha_s + given.beta_s * evolved.moe, 0.0)
    rows = np.arange(LAYERS)
    chosen = np.maximum(given.least_s[rows, evolved.choice], given.busy_s[rows, evolved.choice] + y)
    total = chosen.sum() + given.beta_s * evolved.pending
    assert float(evolved.seconds) == pytest.approx(total, rel=1e-9)
    sent = np.cumsum(evolved.moe + evolved.dense)
    assert (sent <= np.cumsum(given.ready) * (1 + 1e-9) + 1e-9).all()


def test_partition_keeps_its_promises():
    for seed in range(20):
        given = problem(200 + seed)
        found = solve(given)
        ready = np.cumsum(given.ready)
        assert (np.cumsum(found.moe + found.dense) <= ready * (1 + 1e-12) + 1e-12).all()
        sent = found.moe.sum() + found.dense.sum() + found.pending
        assert sent == pytest.approx(ready[-1])
        rows = np.arange(LAYERS)
        slack = (given.least_s - given.busy_s)[rows, found.choice]
        assert (given.beta_s * found.moe <= np.maximum(slack - given.alpha_s, 0) + 1e-9).all()


def test_partition_of_many_problems_in_one_call():
    many = [problem(seed) for seed in range(8)]
    stacked = Backward(
        *(np.stack([np.asarray(getattr(p, f)) for p in many]) for f in many[0]._fields)
    )
    with jax.enable_x64(True):
        found = jax.vmap(lambda p: best_partition(p, width=64))(stacked)
    assert found.exact.all()
    expected = [float(solve(p).seconds) for p in many]
    np.testing.assert_allclose(found.seconds, expected, rtol=1e-12)


def test_partition_says_when_labels_were_cut_off():
    given = [problem(seed) for seed in range(12)]
    with jax.enable_x64(True):
        narrow = [best_partition(g, width=1) for g in given]
    for found, g in zip(narrow, given, strict=True):
        best_s = float(solve(g).seconds)
        assert float(found.seconds) >= best_s * (1 - 1e-12)
        assert not found.exact or float(found.seconds) == pytest.approx(best_s)
    assert not all(found.exact for found in narrow)


def test_bad_partition():
    with pytest.raises(UserError, match="ready has a value"):
        solve(problem(0)._replace(ready=-np.ones(LAYERS)))
    with pytest.raises(UserError, match="least_s has a value"):
        solve(problem(0)._replace(least_s=np.full((LAYERS, CHOICES), np.nan)))


def test_step_one_fills_from_the_top_of_the_stack():
    """By hand: gaps hold 2, 0, 3 elements; 1 + 4 are ready; the newest go first."""
    least, busy = np.array([[3.0], [1.0], [4.0]]), np.ones((3, 1))
    given = Backward(least, busy, np.zeros(3), np.array([1.0, 4.0, 0.0]), 0.0, 1.0)
    first = step_one(given)
    assert first.moe.tolist() == [1.0, 0.0, 3.0]
    assert first.left.tolist() == [0.0, 1.0, 0.0]


def test_lina_sends_whole_messages():
    least, busy = np.full((3, 1), 5.0), np.ones((3, 1))
    given = Backward(least, busy, np.zeros(3), np.array([2.5, 2.5, 2.5]), 0.5, 1.0)
    found = fill(Backward(*map(jax.numpy.asarray, given)), jax.numpy.zeros(3, int), chunk=2.0)
    assert found.moe.tolist() == [2.0, 2.0, 2.0]  # one message of 2.5 s fits into 4 s
    assert float(found.pending) == pytest.approx(1.5)


SHAPE = Shape(4, 1024, 1024, 4096, expert_ranks=4, dense_ranks=4)
THREE = uniform(TESTBED_B, SHAPE, 3)


@pytest.mark.parametrize("system", SYSTEMS)
def test_plan_predicts_what_its_streams_take(system):
    found = planner.as_plan(planner.find_schedule(TESTBED_B, THREE, (1, 2, 4), system=system))
    line = step_timeline(TESTBED_B, THREE, found, system=system)
    # Slices are whole elements in a plan, so the two differ by less than a microsecond.
    assert line.makespan_s == pytest.approx(found.predicted_s, abs=1e-6)
    assert MoEPlan.from_json(found.to_json()) == found
    assert hash(MoEPlan.from_json(found.to_json())) == hash(found)


def test_more_overlap_is_never_slower():
    names = ("serial", "tutel", "tutel-improved", "no-iio", "fsmoe-exact", "jaxsys")
    times = [
        float(planner.find_schedule(TESTBED_B, THREE, (1, 2, 4), system=name).seconds)
        for name in names
    ]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(times)), times
    published = planner.find_schedule(TESTBED_B, THREE, (1, 2, 4), system="fsmoe").seconds
    assert times[4] <= float(published) * (1 + 1e-12)


def test_plan_of_unequal_layers():
    small, large = volumes(SHAPE), volumes(Shape(4, 1024, 2048, 8192, expert_ranks=4))
    found = planner.plan(
        TESTBED_B, [small, large, small], [1e6, 4e6, 1e6], dense_backward_s=[1e-3] * 3,
        degrees=(1, 2, 4),
    )  # fmt: skip
    assert len(found.layers) == 3
    assert found.layers[1].predicted_s > found.layers[0].predicted_s
    # The last layer's backward pass comes first: no gradient is ready for it.
    assert found.layers[2].gradient_bytes == 0
    assert found.predicted_s > sum(layer.predicted_s for layer in found.layers)


def test_bad_plans():
    layer, poor = volumes(SHAPE), Costs(*[LinearCost(1.0, 1.0, 0.5, 0.1, 9)] * 5)
    with pytest.raises(PoorFitError, match="has r² 0"):
        planner.plan(poor, [layer], [1.0])
    with pytest.raises(UserError, match="gradients has shape"):
        planner.plan(TESTBED_B, [layer], [1.0, 2.0])
    with pytest.raises(UserError, match="dense_forward_s has a value"):
        planner.plan(TESTBED_B, [layer], [1.0], dense_forward_s=-1.0)
    with pytest.raises(UserError, match="the degrees are"):
        planner.plan(TESTBED_B, [layer], [1.0], degrees=(0, 2))
    with pytest.raises(UserError, match="the system is 'megatron'"):
        find_system("megatron")


def test_rivals_are_the_best_pairs():
    layer = volumes(SHAPE)
    found = planner.rivals(TESTBED_B, [layer] * 2, [1e6] * 2, n=20, degrees=(1, 2))
    times = [p.predicted_s for p in found]
    assert times == sorted(times)
    assert found[0] == planner.plan(TESTBED_B, [layer] * 2, [1e6] * 2, degrees=(1, 2))
    pairs = {tuple((p.forward, p.backward) for p in plan.layers) for plan in found}
    assert {((f, b), (f, b)) for f in (1, 2) for b in (1, 2)} <= pairs


THREE_PLANS = tuple(MoEPlan((LayerPlan(r, r),), float(r)) for r in (1, 2, 4))


def test_online_keeps_the_measured_winner_and_sees_drift():
    state = online.start(THREE_PLANS, trials=3, window=4, tolerance=0.2)
    true_s, order = (1.0, 0.8, 0.9), []
    while state.winner is None:
        index = online.current_index(state)
        order.append(index)
        first = len(state.seconds[index]) == 0
        state = online.observe(state, 9.0 if first else true_s[index])  # the first one compiles
    assert order == [0, 1, 2] * 4  # in turns
    assert online.current(state) == THREE_PLANS[1]
    assert state.baseline_s == 0.8
    for seconds in (0.8, 5.0, 0.8, 0.82):  # a single slow step is no drift
        state = online.observe(state, seconds)
    assert not online.drifted(state)
    for _ in range(4):
        state = online.observe(state, 1.0)
    assert online.drifted(state)


def test_bad_online():
    with pytest.raises(UserError, match="2 plans, 1 of them different"):
        online.start([MoEPlan(), MoEPlan()])
    with pytest.raises(UserError, match="trials is 0"):
        online.start(THREE_PLANS, trials=0)
    with pytest.raises(UserError, match="tolerance"):
        online.start(THREE_PLANS, tolerance=0.0)
    with pytest.raises(UserError, match="took nan s"):
        online.observe(online.start(THREE_PLANS), float("nan"))


TRUE = {"all_to_all": 3e-9, "all_gather": 2e-9, "reduce_scatter": 2.5e-9, "all_reduce": 4e-9}


def test_profiler_fits_what_the_clock_says(monkeypatch):
    """Real collectives on eight devices, and a clock that knows the truth."""
    mesh = profile.expert_mesh(jax.devices(), 4, 2)
    axes, sizes = Axes(expert="expert", tensor="tensor"), (64, 256, 1000)
    operations = profile.operations(mesh, axes, width=8)
    current = []

    def clock(functions, *, runs):
        size = [operations[current[-1]](n)[0] for n in sizes]
        for run in functions.values():
            assert np.isfinite(np.asarray(run())).all()
        slope = TRUE.get(current[-1], 1e-12)
        return {
            k: timing(k, [1e-3 + slope * n] * runs) for k, n in zip(functions, size, strict=True)
        }

    monkeypatch.setattr(profile, "interleaved", clock)
    found = profile.profile(
        mesh, axes, elements=sizes, width=8, repeats=2, on_operation=current.append
    )
    for name, slope in TRUE.items():
        line = getattr(found.costs, name)
        assert line.beta_s_per_unit == pytest.approx(slope, rel=0.05)
        assert line.alpha_s == pytest.approx(1e-3, rel=1e-2)
    assert [size for size, _ in found.points["all_to_all"]] == [64, 256, 1000]
    assert found.costs.expert.r2 > 0.9


def test_operations_do_what_they_are_named():
    mesh = profile.expert_mesh(jax.devices(), 4, 2)
    operations = profile.operations(mesh, Axes(expert="expert", tensor="tensor"), width=8)
    shapes = {name: make(64)[1]().shape for name, make in operations.items()}
    assert shapes == {
        "all_to_all": (8, 64),
        "all_gather": (8, 64),
        "reduce_scatter": (8, 32),
        "all_reduce": (8, 64),
        "expert": (8, 8, 8),
    }
    assert float(operations["all_reduce"](64)[1]()[0, 0]) == 4.0
    assert float(operations["reduce_scatter"](64)[1]()[0, 0]) == 2.0
    alone = profile.expert_mesh(jax.devices()[:1])
    free = profile.operations(alone, Axes(expert="expert", tensor="tensor"))
    assert [name for name, make in free.items() if make is None] == list(TRUE)


def test_bad_profiles(monkeypatch):
    mesh = profile.expert_mesh(jax.devices()[:1])
    with pytest.raises(UserError, match="axis 'data' is not in the mesh"):
        profile.profile(mesh, Axes(data="data"))
    with pytest.raises(UserError, match="three or more"):
        profile.profile(mesh, Axes(), elements=(1, 2))
    with pytest.raises(UserError, match="repeats is 0"):
        profile.profile(mesh, Axes(), repeats=0)
    with pytest.raises(UserError, match="3 tensor ranks"):
        profile.expert_mesh(jax.devices(), tensor=3)
    with pytest.raises(UserError, match="need 16 devices"):
        profile.expert_mesh(jax.devices(), 8, 2)
    noise = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(
        profile, "interleaved", lambda fs, *, runs: {k: timing(k, [next(noise)]) for k in fs}
    )
    with pytest.raises(PoorFitError, match="expert: "):
        profile.profile(mesh, Axes(), elements=(8, 16, 32), width=8)


def test_a_layers_own_volumes_include_its_padding():
    from jaxsys.moe.contract import Capacity, Dims, Experts, Gate, MoESpec, Order
    from jaxsys.moe.volumes import layer_volumes

    spec = MoESpec(
        Gate(None, None, 2), Order(None, None), Experts(None, None, None, {}, 2),
        capacity=Capacity(1.0),
    )  # fmt: skip
    found = layer_volumes(spec, Dims(8, 16, 4), rows=10, tensor_ranks=2, multiple=4)
    assert found == Volumes(4 * 8 * 8, 2 * 4 * 8 * 8, 2 * 4 * 8 * 8, 4 * 8 * 8 * 16 * 2)
    with pytest.raises(UserError, match="tensor_ranks is 0"):
        layer_volumes(spec, Dims(8, 16, 4), rows=10, tensor_ranks=0)


SCHEDULED = """
HloModule jit_step, is_scheduled=true

%fused (p: bf16[8]) -> bf16[8] {
  %p = bf16[8] parameter(0)
  ROOT %c = bf16[8] convolution(%p, %p)
}

%inner (p.1: bf16[8]) -> bf16[8] {
  %p.1 = bf16[8] parameter(0)
  ROOT %a = bf16[8] all-to-all(%p.1), dimensions={0}
}

ENTRY %main (x: bf16[8]) -> bf16[8] {
  %x = bf16[8] parameter(0)
  %plain = bf16[8] all-to-all(%x), dimensions={0}
  %first-start = (bf16[8], bf16[8]) async-start(%x), calls=%inner
  %gather-start = (bf16[8], bf16[16]) all-gather-start(%x), dimensions={0}
  %copy = bf16[8] copy(%x)
  %first-done = bf16[8] async-done(%first-start)
  %product = bf16[8] fusion(%copy), kind=kOutput, calls=%fused
  %gather-done = bf16[16] all-gather-done(%gather-start)
  ROOT %y = bf16[8] copy(%product)
}
"""


def test_reading_a_compiled_schedule(load_experiment):
    """Of two all-to-alls one is asynchronous with nothing behind it; the gather hides a product."""
    seen = load_experiment("moe/tpu_schedule.py").read(SCHEDULED)
    assert seen["all-to-all"] == (2, 1, 0)
    assert seen["all-gather"] == (1, 1, 1)
    assert seen["reduce-scatter"] == (0, 0, 0)
