"""Fleets that nobody owns: even ones, the paper's mix of links, a synthetic internet."""

from collections.abc import Sequence

import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.pipeline.devices import Device, Fleet

# Speeds and memory of a mixed park: what dense float32 products reach at about half of the peak
# of an RTX 2080, an RTX 3080, an A4000, an RTX 4090 and an A100 (TF32 left out).
KINDS = (
    ("rtx2080", 5e12, 8 * 2**30),
    ("a4000", 9e12, 16 * 2**30),
    ("a100", 9.7e12, 40 * 2**30),
    ("rtx3080", 15e12, 10 * 2**30),
    ("rtx4090", 40e12, 24 * 2**30),
)


def even_fleet(
    speeds_flops_s: Sequence[float | int],
    *,
    memory_bytes: float | int | Sequence[float | int] = 2.0**40,
    bytes_per_s: float | int = 1e9,
    latency_s: float | int = 0.0,
) -> Fleet:
    """Make a fleet whose links are all alike.

    Args:
        speeds_flops_s: speed of each device, [P].
        memory_bytes: memory of each device, one for all or [P].
        bytes_per_s: rate of every link.
        latency_s: latency of every link.

    Returns:
        The fleet; devices are named ``device 0`` and so on.

    >>> even_fleet([1e9, 2e9], bytes_per_s=4).transfer_s(0, 1, 8)
    2.0
    """
    n = len(speeds_flops_s)
    memory = np.broadcast_to(np.asarray(memory_bytes, np.float64), n)
    devices = tuple(
        Device(f"device {i}", float(speed), float(size))
        for i, (speed, size) in enumerate(zip(speeds_flops_s, memory, strict=True))
    )
    return Fleet(devices, np.full((n, n), latency_s), np.full((n, n), bytes_per_s))


def paper_fleet(seed: int = 0, *, n_devices: int = 48, n_sites: int = 3) -> Fleet:
    """Draw 48 devices in 3 sites with links from 8 Mbit/s to 10 Gbit/s.

    Inside a site the links of a machine's 4 devices run at 10 Gbit/s and those between machines at
    1 Gbit/s; between sites each pair of machines has 8 to 100 Mbit/s, even in the
    logarithm, and 10 to 40 ms. Kinds of devices are drawn per machine.

    Reconstruction: of the paper's testbeds 48 GPUs and the range of rates are known; sites,
    machines, kinds of devices and latencies are ours. Modelled, not measured.

    Args:
        seed: of the draw. Devices stand in a random order, as they would join.
        n_devices: number of devices P.
        n_sites: number of sites.

    Returns:
        The fleet, with symmetric links.

    Reference: arXiv 2410.12707, abstract.

    >>> fleet = paper_fleet(0)
    >>> len(fleet), bool(fleet.bytes_per_s.max() * 8 == 1e10)
    (48, True)
    """
    rng = np.random.default_rng([seed, 1])
    machine = np.arange(n_devices) // 4
    site = machine * n_sites // (machine[-1] + 1)
    kind = rng.integers(len(KINDS), size=machine[-1] + 1)[machine]
    n_machines = int(machine[-1]) + 1
    far = np.exp(rng.uniform(np.log(8e6), np.log(1e8), (n_machines, n_machines)))
    delay = rng.uniform(0.010, 0.040, (n_machines, n_machines))
    far, delay = np.triu(far) + np.triu(far, 1).T, np.triu(delay) + np.triu(delay, 1).T
    same_site, same_machine = _alike(site), _alike(machine)
    rate = np.where(same_machine, 1e10, np.where(same_site, 1e9, far[np.ix_(machine, machine)]))
    wait = np.where(same_machine, 2e-5, np.where(same_site, 2e-4, delay[np.ix_(machine, machine)]))
    names = [f"s{site[i]}m{machine[i]}g{i % 4}-{KINDS[kind[i]][0]}" for i in range(n_devices)]
    return _shuffled(rng, names, kind, wait, rate)


def internet_fleet(n_devices: int, seed: int = 0) -> Fleet:
    """Draw devices of volunteers over the world, each behind a link of its own.

    Regions hold a few per cent to a third of the devices each and lie on a plane of 80 ms. A
    device's line has 20 Mbit/s to 1 Gbit/s, even in the logarithm; a pair gets the smaller of its
    two lines, times a factor of 0.3 to 1 for its pair of regions where they differ. Latency is 2 ms
    plus the distance of the regions. One in five devices stands in a laboratory with neighbours at
    1 Gbit/s.

    Reconstruction: all of it; modelled, not measured.

    Args:
        n_devices: number of devices P.
        seed: of the draw.

    Returns:
        The fleet, with symmetric links, devices in random order.

    Raises:
        UserError: fewer than one device.

    >>> len(internet_fleet(30, seed=1))
    30
    """
    if n_devices < 1:
        raise UserError(f"n_devices is {n_devices}; a fleet needs at least 1; pass 1 or more")
    rng = np.random.default_rng([seed, 2])
    n_regions = 8
    region = rng.choice(n_regions, n_devices, p=rng.dirichlet(np.full(n_regions, 2.0)))
    place = rng.uniform(0, 0.08, (n_regions, 2))
    line = np.exp(rng.uniform(np.log(2e7), np.log(1e9), n_devices))
    factor = rng.uniform(0.3, 1.0, (n_regions, n_regions))
    factor = np.triu(factor, 1) + np.triu(factor, 1).T + np.eye(n_regions)
    pair = np.ix_(region, region)
    rate = np.minimum(line[:, None], line) * factor[pair]
    wait = 0.002 + np.linalg.norm(place[:, None] - place, axis=-1)[pair]
    laboratory = np.where(rng.uniform(size=n_devices) < 0.2, np.arange(n_devices) // 10, -1)
    near = _alike(laboratory) & (laboratory >= 0)[:, None]
    rate, wait = np.where(near, 1e9, rate), np.where(near, 2e-4, wait)
    kind = rng.integers(len(KINDS), size=n_devices)
    names = [f"r{region[i]}d{i}-{KINDS[kind[i]][0]}" for i in range(n_devices)]
    return _shuffled(rng, names, kind, wait, rate)


def _alike(labels):
    return labels[:, None] == labels


def _shuffled(rng, names, kind, wait, rate) -> Fleet:
    order = rng.permutation(len(names))
    devices = tuple(Device(names[i], KINDS[kind[i]][1], float(KINDS[kind[i]][2])) for i in order)
    pair = np.ix_(order, order)
    return Fleet(devices, wait[pair], rate[pair] / 8)
