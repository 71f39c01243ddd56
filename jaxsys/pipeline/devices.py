"""A fleet: devices of different speed and memory, and the links between them."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxsys.core.errors import UserError
from jaxsys.core.fields import check_fields, read_object, reading
from jaxsys.core.report import atomic_write


@dataclass(frozen=True)
class Device:
    """Describe one device.

    Attributes:
        name: unique in its fleet.
        speed_flops_s: FLOPs per second that it reaches, the paper's ``λ·S``.
        memory_bytes: bytes that a stage may use.

    >>> Device("left", 1e12, 8 * 2**30).speed_flops_s
    1000000000000.0
    """

    name: str
    speed_flops_s: float | int
    memory_bytes: float | int


@dataclass(frozen=True, eq=False)
class Fleet:
    """Hold devices and what every pair's link takes: ``t_pq(M) = α_pq + M / bytes_per_s_pq``.

    The diagonals are not used: what stays on a device takes no time.

    Attributes:
        devices: the devices, P of them.
        latency_s: α, seconds before a message's first byte arrives, [P, P], from row to column.
        bytes_per_s: rate of a link, [P, P], from row to column.
        sites: the site of each device, [P], where all messages from one site to another pass one
            link and queue there; without it every pair has a link of its own.

    Raises:
        UserError: no device, two of one name, a speed, memory or rate that is not above 0, a
            negative latency, matrices of another shape.

    Reference: arXiv 2410.12707, workload estimator.

    >>> fleet = Fleet((Device("a", 1e9, 1e9), Device("b", 2e9, 1e9)), [[0, 0.1]] * 2, [[1, 8]] * 2)
    >>> fleet.transfer_s(0, 1, 16), len(fleet)
    (2.1, 2)
    """

    devices: tuple[Device, ...]
    latency_s: Float[np.ndarray, "P P"] | Any
    bytes_per_s: Float[np.ndarray, "P P"] | Any
    sites: tuple[int, ...] = ()

    def __post_init__(self):
        """Turn the matrices into read-only float64 arrays and check everything."""
        object.__setattr__(self, "devices", tuple(self.devices))
        object.__setattr__(self, "sites", tuple(int(site) for site in self.sites))
        for name in ("latency_s", "bytes_per_s"):
            try:
                matrix = np.array(getattr(self, name), np.float64)
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"{name} is no matrix of numbers ({error}); it must have one row and one "
                    "column per device; mend it"
                ) from error
            matrix.setflags(write=False)
            object.__setattr__(self, name, matrix)
        _check_fleet(self)

    def __len__(self) -> int:
        """Count the devices."""
        return len(self.devices)

    def __eq__(self, other: object) -> bool:
        """Compare devices and links."""
        return (
            isinstance(other, Fleet)
            and self.devices == other.devices
            and self.sites == other.sites
            and np.array_equal(self.latency_s, other.latency_s)
            and np.array_equal(self.bytes_per_s, other.bytes_per_s)
        )

    def __hash__(self) -> int:
        """Hash the devices; fleets that differ in links only share a hash."""
        return hash(self.devices)

    @property
    def speed_flops_s(self) -> Float[np.ndarray, "P"]:
        """Speeds of the devices, FLOPs per second."""
        return np.array([device.speed_flops_s for device in self.devices], np.float64)

    @property
    def memory_bytes(self) -> Float[np.ndarray, "P"]:
        """Memory of the devices, bytes."""
        return np.array([device.memory_bytes for device in self.devices], np.float64)

    def transfer_s(self, source: int, target: int, n_bytes: float | int) -> float:
        """Predict the seconds of one message.

        Args:
            source: index of the sender.
            target: index of the receiver.
            n_bytes: size of the message.

        Returns:
            ``α + M / rate``; 0 from a device to itself.

        >>> two = (Device("a", 1, 1), Device("b", 1, 1))
        >>> Fleet(two, np.zeros((2, 2)), np.full((2, 2), 4.0)).transfer_s(1, 0, 8)
        2.0
        """
        if source == target:
            return 0.0
        return float(self.latency_s[source, target] + n_bytes / self.bytes_per_s[source, target])

    def keep(self, indices) -> "Fleet":
        """Restrict the fleet to some devices, for example those that are still alive.

        Args:
            indices: which, in the order wanted.

        Returns:
            The smaller fleet.

        >>> fleet = Fleet((Device("a", 1, 1), Device("b", 2, 1)), np.zeros((2, 2)), np.ones((2, 2)))
        >>> fleet.keep([1]).devices[0].name
        'b'
        """
        index = np.asarray(indices, int)
        some = np.ix_(index, index)
        devices = tuple(self.devices[i] for i in index)
        sites = tuple(self.sites[i] for i in index) if self.sites else ()
        return Fleet(devices, self.latency_s[some], self.bytes_per_s[some], sites)

    def to_json(self) -> str:
        """Write the fleet as one JSON object.

        Returns:
            JSON text that `from_json` reads back.

        >>> fleet = Fleet((Device("a", 1e9, 1e9),), [[0]], [[1]])
        >>> Fleet.from_json(fleet.to_json()) == fleet
        True
        """
        return json.dumps(
            {
                "devices": [vars(device) for device in self.devices],
                "latency_s": self.latency_s.tolist(),
                "bytes_per_s": self.bytes_per_s.tolist(),
                "sites": list(self.sites),
            }
        )

    @classmethod
    def from_json(cls, text: str, *, symmetric: bool = False) -> "Fleet":
        """Read a fleet, checking it as a foreign file.

        Args:
            text: what `to_json` wrote, or the like from measurements.
            symmetric: whether both directions of a link must be equal, as communities need it.

        Returns:
            The fleet.

        Raises:
            UserError: no such JSON, a field missing or unknown, numbers that cannot be, or links
                that are not symmetric where they must be.

        >>> Fleet.from_json('{"devices": []}')
        Traceback (most recent call last):
        ...
        jaxsys.core.errors.UserError: the fleet lacks latency_s, bytes_per_s; expected ...
        """
        found = check_fields(read_object(text, "fleet"), cls, "fleet")
        with reading("fleet"):
            devices = tuple(
                Device(**check_fields(entry, Device, f"device {i} of the fleet"))
                for i, entry in enumerate(found["devices"])
            )
            sites = tuple(int(site) for site in found.get("sites", ()))
        fleet = cls(devices, found["latency_s"], found["bytes_per_s"], sites)
        if symmetric:
            check_symmetric(fleet)
        return fleet

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fleet to a file, replacing it at once.

        >>> import tempfile
        >>> path = f"{tempfile.mkdtemp()}/fleet.json"
        >>> Fleet((Device("a", 1e9, 1e9),), [[0]], [[1]]).save(path)
        >>> Fleet.load(path).devices[0].name
        'a'
        """
        atomic_write(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, symmetric: bool = False) -> "Fleet":
        """Read a fleet from a file; see `from_json`.

        Raises:
            UserError: the file cannot be read, or as `from_json`.

        >>> Fleet.load("no/such.json")
        Traceback (most recent call last):
        ...
        jaxsys.core.errors.UserError: the fleet file no/such.json cannot be read ...
        """
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"the fleet file {path} cannot be read ({error}); it must be a JSON file; mend the "
                "path"
            ) from error
        return cls.from_json(text, symmetric=symmetric)


def check_symmetric(fleet: Fleet, tolerance: float = 1e-9) -> None:
    """Refuse a fleet of which some link differs between its two directions.

    Args:
        fleet: the fleet.
        tolerance: relative difference that passes.

    Raises:
        UserError: the pair that differs most, with both figures.

    >>> two = (Device("a", 1, 1), Device("b", 1, 1))
    >>> check_symmetric(Fleet(two, np.zeros((2, 2)), [[1, 2], [3, 1]]))
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: bytes_per_s is 2.0 from 'a' to 'b' and 3.0 back; ...
    """
    for name in ("bytes_per_s", "latency_s"):
        matrix = getattr(fleet, name)
        scale = np.maximum(np.abs(matrix), np.abs(matrix.T))
        off = np.abs(matrix - matrix.T) / np.where(scale > 0, scale, 1)
        np.fill_diagonal(off, 0)
        p, q = (int(i) for i in np.unravel_index(np.argmax(off), off.shape))
        if off[p, q] > tolerance:
            a, b = fleet.devices[p].name, fleet.devices[q].name
            raise UserError(
                f"{name} is {matrix[p, q]} from {a!r} to {b!r} and {matrix[q, p]} back; links must "
                "be symmetric here; measure both directions and give the slower one for both"
            )


def _check_fleet(fleet: Fleet) -> None:
    n = len(fleet.devices)
    names = [device.name for device in fleet.devices]
    if n == 0 or len(set(names)) < n:
        raise UserError(
            f"a fleet has {n} devices of {len(set(names))} different names; it needs at least one, "
            "and a name for each; mend the list"
        )
    for device in fleet.devices:
        for what in ("speed_flops_s", "memory_bytes"):
            value = getattr(device, what)
            if not isinstance(value, int | float) or not np.isfinite(value) or value <= 0:
                raise UserError(
                    f"{what} of device {device.name!r} is {value!r}; it must be a finite number "
                    "above 0; mend the device"
                )
    if fleet.sites and len(fleet.sites) != n:
        raise UserError(
            f"sites has {len(fleet.sites)} entries for {n} devices; give one for each, or none"
        )
    off = ~np.eye(n, dtype=bool)
    for name, low in (("latency_s", "at least 0"), ("bytes_per_s", "above 0")):
        matrix = getattr(fleet, name)
        if matrix.shape != (n, n):
            raise UserError(
                f"{name} has shape {matrix.shape}; it must be ({n}, {n}), a row and a column for "
                "each device; mend the matrix"
            )
        good = matrix >= 0 if name == "latency_s" else matrix > 0
        bad = np.argwhere(off & ~(good & np.isfinite(matrix)))
        if len(bad):
            p, q = bad[0]
            raise UserError(
                f"{name} from {names[p]!r} to {names[q]!r} is {matrix[p, q]}; it must be finite "
                f"and {low}; mend the matrix"
            )
