"""Worker program of test_host.py: run every strategy with the host-scheduled step."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsys.cluster import join
from jaxsys.core.errors import UserError
from jaxsys.core.mesh import device_pair
from jaxsys.localsgd import host
from jaxsys.localsgd.job import check_equal
from jaxsys.localsgd.layers import find_layers
from jaxsys.localsgd.step import due
from jaxsys.localsgd.wire import Wire

sys.path.insert(0, __file__.rpartition("/")[0])
import host_cases


def main(out: str) -> None:
    member = join()
    pair = device_pair()
    wire = Wire(pair)
    params, batches = host_cases.start(member.num_processes)
    params = jax.device_put(params, pair.compute)
    mine = batches[:, member.process_id]
    layers = find_layers(host_cases.loss_fn, params, mine[0])
    staged = host.cut_loss(host_cases.loss_fn, params, mine[0], layers)
    saved = {}
    for name, strategy in host_cases.STRATEGIES.items():
        phases = host_cases.phases(strategy, len(layers))
        run = host.overlapped_local_sgd(
            host_cases.loss_fn, optax.adam(1e-2), layers, strategy, staged, wire
        )
        state = run.init(params, jax.random.key(0))
        losses = []
        for i in range(host_cases.STEPS):
            state, info = run.step(state, jnp.asarray(mine[i]), due(phases, strategy, i))
            losses.append(float(info.loss))
            assert np.isfinite(np.asarray(info.update_norm)).all()
        state = run.settle(state)
        leaves = {f"{name}/{j}": np.asarray(x) for j, x in enumerate(jax.tree.leaves(state))}
        saved |= leaves | {f"{name}/losses": np.array(losses)}
    try:
        check_equal("parameters", {"same": "x", "w": str(member.process_id)}, wire)
    except UserError as error:
        saved["mismatch"] = np.array(str(error))
    np.savez(f"{out}/{member.process_id}.npz", **saved)
    wire.close()


if __name__ == "__main__":
    main(sys.argv[1])
