"""Join whatever job this process belongs to and add up the workers' numbers.

    python experiments/cluster/join_demo.py                          alone
    jaxsys launch -n 4 -- python experiments/cluster/join_demo.py    four local processes
    sbatch experiments/cluster/job.sbatch                            four Slurm tasks
    kubectl apply -f experiments/cluster/jobset.yaml                 four pods

Seconds. With n processes every one prints psum = 1 + … + n; 4 give 10.
"""

import argparse

import jaxsys.cluster


def main() -> None:
    parser = argparse.ArgumentParser(description="Join a job and add up the workers' numbers.")
    parser.add_argument("--coordinator", help="HOST:PORT of process 0")
    parser.add_argument("--process-id", type=int)
    parser.add_argument("-n", "--num-processes", type=int)
    parser.add_argument("--smoke", action="store_true", help="the same; it is small already")
    given = parser.parse_args()
    me = jaxsys.cluster.join(given.coordinator, given.process_id, given.num_processes)

    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    first = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([first[i] for i in range(me.num_processes)]), ("workers",))
    mine = np.full((1,), me.process_id + 1.0, np.float32)
    numbers = jax.make_array_from_callback(
        (me.num_processes,), NamedSharding(mesh, PartitionSpec("workers")), lambda _: mine
    )
    add = jax.shard_map(
        lambda x: jax.lax.psum(x, "workers"),
        mesh=mesh,
        in_specs=PartitionSpec("workers"),
        out_specs=PartitionSpec(),
    )
    total = float(np.asarray(jax.jit(add)(numbers).addressable_data(0))[0])
    expected = me.num_processes * (me.num_processes + 1) / 2
    print(
        f"process {me.process_id} of {me.num_processes} (joined by {me.how}, "
        f"jax {jax.__version__}, {jax.local_device_count()} local devices): psum = {total:g}",
        flush=True,
    )
    assert total == expected, f"psum is {total}, expected {expected}"


if __name__ == "__main__":
    main()
