"""Worker program of test_parallel_layer.py: layers over four processes against a dense one."""

import math
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from jaxsys.cluster import join

sys.path.insert(0, __file__.rpartition("/")[0])
CASES = (("gshard", "sparse", "2dh", (2, 4), "2x2"),)


def main() -> None:
    join(local_devices=1)
    import parallel_cases as cases

    for gate, order, transport, pair, name in CASES:
        mesh, axes = cases.make_mesh(name)
        spec = cases.make_spec(gate, order, transport)
        given = cases.make_case(spec)
        function = cases.sharded(spec, pair, mesh, axes)
        parts, tokens = cases.partitions(spec, axes)

        def place(x, part, mesh=mesh):
            x = np.asarray(x)
            return jax.make_array_from_callback(
                x.shape, NamedSharding(mesh, part), lambda index: x[index]
            )

        params = jax.tree.map(place, given[0], parts)
        got = function(params, *(place(x, tokens) for x in given[1:]))
        got = multihost_utils.process_allgather(got, tiled=True)
        if jax.process_index() == 0:
            want = cases.reference(spec, 4, math.lcm(*pair))(*given)
            cases.check(got, want, f"{gate} {order} {transport} {pair}")
            print(f"{transport} is equal", flush=True)


if __name__ == "__main__":
    main()
