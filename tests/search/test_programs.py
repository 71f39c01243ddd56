"""Programs against a recursive evaluator in NumPy, and their forms against each other."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.core.errors import UserError
from jaxsys.search import interpret, programs
from jaxsys.search.evolve import valid
from jaxsys.search.operators import SETS
from jaxsys.search.programs import Grammar

GRAMMAR = Grammar(("W", "G", "X"), constants=(2.0,))
RNG = np.random.default_rng(0)
INPUTS = {
    "W": RNG.normal(size=(4, 6)).astype(np.float32),
    "G": RNG.normal(size=(4, 6)).astype(np.float32),
    "X": RNG.uniform(0.5, 2.0, size=(1, 6)).astype(np.float32),
}


def mms(x):
    return (x - x.min()) / (np.ptp(x) or 1.0)


def zsn(x):
    return (x - x.mean()) / ((x.std(ddof=1) if x.size > 1 else 0.0) or 1.0)


# Written from the definitions, on arrays that are never broadcast before they must be.
NUMPY = {
    "sqr": np.square,
    "pow": np.square,
    "neg": np.negative,
    "abs": np.abs,
    "log": lambda x: np.log(np.abs(x) + 0.001),
    "sqrt": lambda x: np.sqrt(np.abs(x)),
    "tanh": np.tanh,
    "skp": lambda x: x,
    "mms": mms,
    "zsn": zsn,
    "exp": lambda x: np.exp(np.minimum(x, 100.0)),
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": lambda x, y: x / (np.sqrt(np.sum(np.square(y))) or 1.0),
}


def evaluate(tree):
    symbol, *children = tree
    if children:
        return NUMPY[symbol](*(evaluate(child) for child in children))
    return np.float64(2.0).reshape(1, 1) if symbol == "2" else INPUTS[symbol].astype(np.float64)


RUN = jax.jit(lambda program: interpret.run(GRAMMAR, program, INPUTS))


@pytest.mark.parametrize("name", [op.name for op in GRAMMAR.operators])
@pytest.mark.parametrize("terminal", ["W", "X"])
def test_each_operator_against_numpy(name, terminal):
    arity = GRAMMAR.arities[GRAMMAR.opcode(name)]
    tree = (name, *[(terminal,), ("G",)][:arity])
    got = RUN(programs.encode(GRAMMAR, tree))
    expected = np.broadcast_to(evaluate(tree), (4, 6))
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


def test_ten_thousand_random_trees_against_the_recursive_evaluator():
    """In double precision, where little leaves its range or is nothing but rounding."""
    parts = [programs.random_programs(GRAMMAR, 2500, depth=(k, k + 2), seed=k) for k in range(4)]
    drawn = np.concatenate(parts)
    with jax.enable_x64(True):
        wide = {k: jnp.asarray(v, jnp.float64) for k, v in INPUTS.items()}
        got = np.asarray(jax.jit(lambda p: interpret.run_many(GRAMMAR, p, wide))(drawn))
    compared = 0
    for program, result in zip(drawn, got, strict=True):
        with np.errstate(all="ignore"):
            expected = np.broadcast_to(evaluate(programs.decode(GRAMMAR, program)), (4, 6))
        size = np.abs(expected).max()
        if np.isfinite(expected).all() and 1e-6 < size < 1e12:
            np.testing.assert_allclose(
                result, expected, rtol=0, atol=1e-5 * size, err_msg=str(program)
            )
            compared += 1
    assert compared > 8500


def test_direct_evaluation_equals_the_interpreter():
    for program in programs.random_programs(GRAMMAR, 20, seed=11):
        direct = interpret.evaluate(GRAMMAR, programs.decode(GRAMMAR, program), INPUTS)
        expected = np.asarray(RUN(program))
        close = np.isclose(np.broadcast_to(direct, (4, 6)), expected, rtol=1e-3, atol=1e-4)
        assert close.all() or not np.isfinite(expected).all()
    with pytest.raises(UserError, match="'G' has no input"):
        interpret.evaluate(GRAMMAR, ("G",), {"W": 1.0})


def test_one_program_serves_every_expression():
    for text in ("W*sqrt(X)", "mms(G) + W", "-abs(W)"):
        RUN(programs.from_string(GRAMMAR, text))
    assert RUN._cache_size() == 1


def test_vmap_equals_map():
    drawn = programs.random_programs(GRAMMAR, 12, seed=9)
    both = [interpret.run_many(GRAMMAR, drawn, INPUTS, batching=b) for b in ("map", "vmap")]
    np.testing.assert_allclose(*both, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batching", ["map", "vmap"])
def test_programs_of_terminals_and_constants_alone_are_run(batching):
    grammar = programs.Grammar(("a", "b"), operators=(), constants=(2.0,), length=3)
    inputs = {"a": jnp.array([1.0]), "b": jnp.array([3.0])}
    drawn = np.array([[1, 0, 0], [2, 0, 0], [3, 0, 0]], np.int32)
    found = interpret.run_many(grammar, drawn, inputs, batching=batching)
    assert found.ravel().tolist() == [1.0, 3.0, 2.0]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_every_form_leads_back(seed):
    for program in programs.random_programs(GRAMMAR, 4, seed=seed):
        tree = programs.decode(GRAMMAR, program)
        assert valid(GRAMMAR, program)
        for again in (
            programs.encode(GRAMMAR, tree),
            programs.from_string(GRAMMAR, programs.to_string(GRAMMAR, program)),
            programs.from_json(GRAMMAR, programs.to_json(GRAMMAR, program)),
        ):
            np.testing.assert_array_equal(again, program)


def test_the_discovered_metric_of_pruner_zero():
    """Its published tree reads as W² · mms(G)."""
    leaf = {"data": "W", "left": None, "right": None}
    square = {"data": "mul", "left": leaf, "right": leaf}
    scaled = {"data": "mms", "left": {"data": "G"}, "right": None}
    text = json.dumps({"data": "mul", "left": square, "right": scaled})
    got = RUN(programs.from_json(GRAMMAR, text))
    np.testing.assert_allclose(got, INPUTS["W"] ** 2 * mms(INPUTS["G"]), rtol=1e-5)


def test_protected_operators_stay_finite():
    grammar = Grammar(("a", "b"), operators=SETS["protected"])
    values = np.array([-30.0, -1.0, -1e-4, 0.0, 1e-4, 1.0, 30.0], np.float32)
    a, b = (jnp.asarray(v.reshape(-1)) for v in np.meshgrid(values, values))
    for op in grammar.operators:
        tree = (op.name, *[("a",), ("b",)][: op.arity])
        assert np.isfinite(interpret.evaluate(grammar, tree, {"a": a, "b": b})).all(), op.name


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: programs.from_string(GRAMMAR, "W*Y"), "'Y' at position 3"),
        (lambda: programs.from_string(GRAMMAR, "W*"), "stops making sense"),
        (lambda: programs.from_string(GRAMMAR, "W**3"), "a power other than 2"),
        (lambda: programs.from_string(GRAMMAR, "sin(W)"), "function 'sin'"),
        (lambda: programs.from_string(GRAMMAR, "W+7"), "constant 7 at position 3"),
        (lambda: programs.from_string(GRAMMAR, "  W +\n  Y"), "'Y' at position 5 of 'W . Y'"),
        (lambda: programs.from_string(GRAMMAR, "W + é"), "'é' at position 5"),
        (lambda: programs.from_string(GRAMMAR, "é(W) + Y"), "'é' at position 1"),
        (lambda: programs.from_string(GRAMMAR, "(" * 5000 + "W"), "(position|no expression)"),
        (lambda: programs.from_string(GRAMMAR, "-" * 5000 + "W"), "(deeply|no expression)"),
        (lambda: programs.from_string(GRAMMAR, "W\0"), "(position|no expression)"),
        (lambda: programs.from_string(GRAMMAR, "abs(W, W)"), "has 2 operands"),
        (lambda: programs.from_string(GRAMMAR, "+".join(["W"] * 17)), "at most 31"),
        (lambda: programs.from_json(GRAMMAR, '{"data": "mul", "left": {"data": "W"}}'), "no tree"),
        (lambda: programs.from_json(GRAMMAR, "{"), "no JSON"),
        (lambda: programs.from_json(GRAMMAR, '{"data":"abs","left":' * 99999), "(deeply|no JSON)"),
        (lambda: programs.decode(GRAMMAR, [1, 1]), "leaves 2 values"),
        (lambda: programs.decode(GRAMMAR, [GRAMMAR.opcode("add")]), "cannot stand there"),
        (lambda: interpret.run(GRAMMAR, jnp.zeros(31, int), {"W": jnp.ones(1)}), "'G' has no"),
        (lambda: Grammar(("W", "W")), "distinct names"),
    ],
)
def test_mistakes_are_told(call, says):
    with pytest.raises(UserError, match=says):
        call()
