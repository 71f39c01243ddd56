"""Test-wide settings: CPU only, eight virtual devices, strict ranks."""

import importlib.util
import os
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
# Most of the time of the tests is compiling; machine code that is not optimised saves a third of
# it, and jaxlib 0.10's older way of making that code half of the rest (an unknown flag would end
# the process, so no other version is given it). What is set outside wins: `.ci/run` has a part of
# the newest Python's tests run optimised code, made in the usual way.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + version("jaxlib").startswith("0.10.")
    * " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def load_experiment():
    """Import a script under ``experiments/`` as a module."""

    def load(name: str) -> ModuleType:
        path = Path(__file__).parents[1] / "experiments" / name
        spec = importlib.util.spec_from_file_location(f"{path.stem}_experiment", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
