"""The host-scheduled layer: its result, and the time predicted for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.core.lane import Lane
from jaxsys.core.mesh import device_pair, replica_mesh
from jaxsys.moe.cases import Chunk
from jaxsys.moe.contract import Dims, Gate, MoESpec, Order
from jaxsys.moe.dispatch import TRANSPORTS
from jaxsys.moe.experts import gpt_ffn
from jaxsys.moe.host import Pace, host_layer, shared_makespan_s
from jaxsys.moe.recurrence import makespan_s


def test_chunks_on_the_lane_give_the_experts_outputs_in_order():
    first = jax.devices()[:1]
    lane = Lane(device_pair()._replace(comm=first[0], comm_mesh=replica_mesh(first)))
    experts = gpt_ffn()
    spec = MoESpec(Gate(None, None, 1), Order(None, None), experts, *TRANSPORTS["flat"])
    params = experts.init(jax.random.key(0), Dims(3, 5, 2))
    buffer = jax.random.normal(jax.random.key(1), (2, 4, 3))
    layer = host_layer(spec, lane)
    y, info = layer.run(params, buffer, 2)
    np.testing.assert_allclose(y, experts.apply(params, buffer), rtol=1e-5, atol=1e-6)
    names = [span.name for span in sorted(info.spans, key=lambda s: (s.stream, s.start_s))]
    assert names == ["dispatch 1", "dispatch 2", "combine 1", "combine 2", "expert 1", "expert 2"]
    with pytest.raises(UserError, match="cannot be cut into 3"):
        layer.run(params, buffer, 3)
    lane.close()


def test_equal_paces_are_the_recurrence_and_busy_ones_never_faster():
    rng = np.random.default_rng(0)
    for a, e, slower_a, slower_e in rng.uniform(0.1, 2.0, (8, 4)):
        for r in (1, 2, 4, 7):
            want = float(makespan_s(Chunk(a, 0.0, 0.0, e), jnp.int32(r), most=8))
            alone = shared_makespan_s(Pace(a, e, a, e), r)
            assert alone == pytest.approx(want, rel=1e-5)
            shared = shared_makespan_s(Pace(a, e, a + slower_a, e + slower_e), r)
            assert shared >= alone - 1e-9
            assert shared <= 2 * r * (a + slower_a) + r * (e + slower_e) + 1e-9
