"""House rules that hold for every file of the package, read from its syntax trees."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "jaxsys").rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
MOST_LINES = 450
UNSTABLE = ("jax.extend", "jax.experimental", "jax._src")

# Public functions whose example could not run inside one process within seconds.
WITHOUT_EXAMPLE = {
    "jaxsys/bench/memory.py:main": "is the program of a child process",
    "jaxsys/bench/serving/run.py:serve": "serves until a signal comes",
    "jaxsys/localsgd/compare.py:compare": "starts worker processes and trains for minutes",
    "jaxsys/localsgd/compare.py:write_results": "needs the record of such a run",
    "jaxsys/localsgd/figures.py:compare_figure": "needs the record of such a run",
    "jaxsys/localsgd/figures.py:measured_spans": "needs the record of such a run",
    "jaxsys/localsgd/job.py:run": "is the program of a worker process",
    "jaxsys/localsgd/profiling.py:measure_compute": "times a job that is running",
    "jaxsys/localsgd/profiling.py:measure_link": "times a job that is running",
    "jaxsys/localsgd/profiling.py:measure_sharing": "times a job that is running",
    "jaxsys/localsgd/profiling.py:measure_weather": "times a job that is running",
    "jaxsys/localsgd/supervise.py:run_workers": "starts worker processes",
    "jaxsys/localsgd/worker.py:main": "is the program of a worker process",
    "jaxsys/pipeline/worker.py:main": "is the program of a worker process",
}


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return {
        name: ast.parse(path.read_text(encoding="utf-8"))
        for name, path in zip(NAMES, FILES, strict=True)
    }


def _public(module: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in module.body:
        is_definition = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if is_definition and not node.name.startswith("_"):
            yield node


def _is_private(name: str) -> bool:
    return Path(name).name.startswith("_") and Path(name).name != "__init__.py"


def test_every_module_and_public_name_has_a_docstring(trees):
    lacking = [name for name, module in trees.items() if not ast.get_docstring(module)]
    for name, module in trees.items():
        for node in _public(module):
            if not ast.get_docstring(node):
                lacking.append(f"{name}:{node.lineno} {node.name}")
            if isinstance(node, ast.ClassDef):
                lacking += [
                    f"{name}:{method.lineno} {node.name}.{method.name}"
                    for method in node.body
                    if isinstance(method, ast.FunctionDef)
                    and not method.name.startswith("_")
                    and not ast.get_docstring(method)
                ]
    assert not lacking


def test_every_public_function_has_an_example(trees):
    lacking = [
        f"{name}:{node.name}"
        for name, module in trees.items()
        if not name.startswith("jaxsys/cli/") and not _is_private(name)
        for node in _public(module)
        if isinstance(node, ast.FunctionDef) and ">>>" not in (ast.get_docstring(node) or "")
    ]
    assert not sorted(set(lacking) - set(WITHOUT_EXAMPLE))


def test_no_file_is_too_long_to_read():
    lines = {
        name: len(path.read_text(encoding="utf-8").splitlines())
        for name, path in zip(NAMES, FILES, strict=True)
    }
    assert {name: n for name, n in lines.items() if n > MOST_LINES} == {}


def test_unstable_names_of_jax_stay_in_the_lowest_floors(trees):
    found = []
    for name, module in trees.items():
        if name.startswith(("jaxsys/core/", "jaxsys/cluster/")):
            continue
        for node in ast.walk(module):
            if isinstance(node, ast.ImportFrom):
                used = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                used = [alias.name for alias in node.names]
            elif isinstance(node, ast.Attribute):
                used = [ast.unparse(node)]
            else:
                continue
            found += [
                f"{name}:{node.lineno} {u}"
                for u in used
                if f"{u}.".startswith(tuple(f"{prefix}." for prefix in UNSTABLE))
            ]
    assert not found


def test_importing_the_package_loads_next_to_nothing():
    program = (
        "import sys; before = set(sys.modules); import jaxsys; print(jaxsys.__version__);"
        "new = set(sys.modules) - before; assert new == {'jaxsys'}, new"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_the_version_is_the_one_in_the_metadata():
    import tomllib

    import jaxsys

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert declared["project"]["version"] == jaxsys.__version__


def test_tests_mirror_the_package():
    folders = {path.parent.name for path in FILES if path.parent.name != "jaxsys"}
    tested = {path.parent.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert folders <= tested
