"""What a plan would cost elsewhere: other bandwidths, worker counts and periods."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsys.cluster import format_rate
from jaxsys.core.cost import allreduce_s
from jaxsys.core.errors import UserError
from jaxsys.localsgd.codec import codec_bytes
from jaxsys.localsgd.profile import Profile
from jaxsys.localsgd.strategy import choose, make_plan


def sweep(
    profile: Profile,
    *,
    strategies: Sequence[str],
    bandwidths_bits_s: Sequence[float],
    workers: Sequence[int],
    periods: Sequence[int],
    latency_s: float = 0.0,
    algorithm: str = "ring",
) -> list[dict[str, Any]]:
    """Plan every combination, with message times from a named all-reduce model.

    Args:
      profile: a measured profile; its compute times are kept.
      strategies: names of presets.
      bandwidths_bits_s: rates of each worker's link.
      workers: worker counts.
      periods: values of H.
      latency_s: seconds of one message between two workers.
      algorithm: name of the all-reduce model, see `jaxsys.core.cost.allreduce_s`.

    Returns:
      One row per combination, with the modelled seconds per step and the planned hidden share.

    Raises:
      UserError: an unknown strategy or model, or a value out of range.

    >>> from jaxsys.core.cost import LinearCost
    >>> cost = LinearCost(0.0, 1e-9, 1.0, 0.0, 3)
    >>> p = Profile(("w",), (250_000,), (0.1,), (0.2,), 0.0, cost, 4)
    >>> rows = sweep(p, strategies=["local"], bandwidths_bits_s=[1e8], workers=[4], periods=[5])
    >>> round(rows[0]["predicted_s"], 3)
    0.324
    """
    if not (strategies and len(bandwidths_bits_s) and len(workers) and len(periods)):
        raise UserError(
            "a sweep over nothing was asked for; expected at least one strategy, bandwidth, worker "
            "count and period; name some"
        )
    elements = np.array([*profile.elements, sum(profile.elements)], float)
    rows = []
    for period in periods:
        for name, strategy in choose(strategies, period).items():
            share = codec_bytes(2**20, strategy.codec, 2) / codec_bytes(2**20, "f32", 2)
            rate = np.asarray(bandwidths_bits_s, float)[:, None, None]
            crowd = np.asarray(workers, np.int32)[None, :, None]
            times = np.asarray(
                allreduce_s(
                    4.0 * share * elements,
                    crowd,
                    bandwidth_bits_s=rate,
                    latency_s=latency_s,
                    algorithm=algorithm,
                )
            )
            for b, bandwidth in enumerate(bandwidths_bits_s):
                for w, count in enumerate(workers):
                    plan = make_plan(
                        strategy,
                        profile.backward_s,
                        times[b, w, :-1].tolist(),
                        forward_s=sum(profile.forward_s),
                        tail_s=profile.tail_s,
                        merged_s=float(times[b, w, -1]),
                    )
                    rows.append(
                        {
                            "strategy": name,
                            "period": strategy.period,
                            "workers": count,
                            "bandwidth_bits_s": bandwidth,
                            "predicted_s": plan.predicted_s,
                            "hidden_share": plan.hidden_share,
                            "model": algorithm,
                            "plan": plan,
                        }
                    )
    return rows


def sweep_table(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Lay a sweep out with one column per bandwidth.

    >>> sweep_table([{"strategy": "local", "workers": 4, "period": 5, "bandwidth_bits_s": 1e8,
    ...               "predicted_s": 0.5}])
    [{'workers': '4', 'H': '5', 'strategy': 'local', '100mbit': '0.500'}]
    """
    table: dict[tuple[int, int, str], dict[str, str]] = {}
    for r in rows:
        key = (r["workers"], r["period"], r["strategy"])
        start = {"workers": str(key[0]), "H": str(key[1]), "strategy": key[2]}
        line = table.setdefault(key, start)
        line[format_rate(r["bandwidth_bits_s"])] = f"{r['predicted_s']:.3f}"
    return [table[key] for key in sorted(table, key=lambda k: k[:2])]


def schedule_table(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """List what each partial strategy sends in each step, for the first network of a sweep.

    >>> schedule_table([])
    []
    """
    seen: dict[str, dict[str, str]] = {}
    for r in rows:
        if r["strategy"] in seen or r["period"] == 1:
            continue
        phases = " | ".join(_ranges(phase) for phase in r["plan"].phases)
        seen[r["strategy"]] = {
            "strategy": r["strategy"],
            "link": format_rate(r["bandwidth_bits_s"]),
            "layers by step": phases,
            "hidden": f"{r['hidden_share']:.0%}",
        }
    return list(seen.values())


def _ranges(numbers: Sequence[int]) -> str:
    """Write numbers as ranges, 0-2 5."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "-"
