"""Simplification keeps values where it says so, shortens, and does what its rules say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.search import evolve, programs
from jaxsys.search.evolve import valid
from jaxsys.search.interpret import run_many
from jaxsys.search.operators import SETS
from jaxsys.search.programs import Grammar, from_string, to_string
from jaxsys.search.simplify import simplify

GRAMMAR = Grammar(("W", "G", "X"))
SOUND, PAPER = (
    jax.jit(jax.vmap(lambda p, rules=rules: simplify(GRAMMAR, p, rules)))
    for rules in ("sound", "paper")
)


def simplified(step, texts):
    """Simplify texts together, always as many, so that one compilation serves."""
    filled = [*texts, *["W"] * (40 - len(texts))]
    found = step(jnp.asarray(np.stack([from_string(GRAMMAR, t) for t in filled])))
    return [to_string(GRAMMAR, p) for p in np.asarray(found)[: len(texts)]]


def test_sound_rules():
    cases = {
        "neg(neg(W))": "W",
        "skp(W)": "W",
        "skp(skp(W + skp(G)))": "(W + G)",
        "pow(W)": "sqr(W)",
        "abs(abs(neg(W)))": "abs(W)",
        "abs(sqrt(neg(W)))": "sqrt(W)",
        "sqrt(pow(W))": "abs(W)",
        "sqr(sqrt(W)) + G": "(abs(W) + G)",
        "W*W": "sqr(W)",
        "(W + G)*(W + G) + X": "(sqr((W + G)) + X)",
        "(W + G)*(G + W)": "((W + G) * (G + W))",
        "mms(mms(W))": "mms(W)",
        "log(neg(abs(W)))": "log(W)",
        # What is dropped must not have shaped what stays: W might have one row only.
        "(W + X) - X": "((W + X) - X)",
        "(W*X + X) - X": "(W * X)",
        "(X + W*X) - X": "(W * X)",
        "(W*X - X) + X": "(W * X)",
        "X + (W*X - X)": "(W * X)",
        "X - (W*X - X)": "(X - ((W * X) - X))",
        "W*X - (W*X + X)": "((W * X) - ((W * X) + X))",
        "(W*X + neg(neg(X))) - X": "(W * X)",
        "mms((tanh(W)*G + tanh(W)) - tanh(skp(W)))": "mms((tanh(W) * G))",
        # These do not cancel: log adds 0.001, div divides by a norm.
        "exp(log(W))": "exp(log(W))",
        "log(exp(W))": "log(exp(W))",
        "(W*G)/G": "((W * G) / G)",
        "tanh(tanh(W))": "tanh(tanh(W))",
    }
    assert simplified(SOUND, list(cases)) == list(cases.values())


def test_the_papers_rules():
    cases = {
        "exp(log(W))": "W",
        "log(exp(W)) + G": "(W + G)",
        "sqrt(sqr(W))": "W",
        "sqrt(pow(sqrt(sqr(neg(neg(W))))))": "W",
        "abs(abs(W))": "abs(W)",
        "W*W": "sqr(W)",
        "(W + G) - X": "W",
        "(W*G)/X": "W",
        "(W/G)*X + G": "(W + G)",
        "skp(neg(W))": "skp(neg(W))",
    }
    assert simplified(PAPER, list(cases)) == list(cases.values())


def test_sound_simplification_keeps_values_and_never_lengthens():
    rng = np.random.default_rng(0)
    inputs = {
        "W": np.abs(rng.normal(size=(4, 6))).astype(np.float32),
        "G": np.abs(rng.normal(size=(4, 6))).astype(np.float32),
        "X": rng.uniform(0.5, 2.0, size=(1, 6)).astype(np.float32),
    }
    drawn = programs.random_programs(GRAMMAR, 2000, depth=(2, 4), seed=3)
    # Doubled operands, which random trees seldom have.
    drawn[::4] = [_doubled(p) for p in drawn[::4]]
    short = np.asarray(SOUND(drawn))
    assert valid(GRAMMAR, short).all()
    before, after = (drawn > 0).sum(1), (short > 0).sum(1)
    assert (after <= before).all()
    assert (after < before).mean() > 0.3
    np.testing.assert_array_equal(SOUND(short), short)
    with jax.enable_x64(True):
        wide = {k: jnp.asarray(v, jnp.float64) for k, v in inputs.items()}
        run = jax.jit(lambda p: run_many(GRAMMAR, p, wide, batching="vmap"))
        old, new = np.asarray(run(drawn)), np.asarray(run(short))
    size = np.abs(old).max((1, 2))
    usual = np.isfinite(old).all((1, 2)) & (size < 1e12)
    assert usual.mean() > 0.7
    error = np.abs(old - new).max((1, 2))[usual]
    assert (error <= 1e-6 * np.maximum(size[usual], 1)).all()


def _doubled(program):
    """Write (p + W) - W or p·p, where that fits."""
    text = to_string(GRAMMAR, program)
    for longer in (f"({text} + W) - W + G", f"{text}*{text}"):
        try:
            return from_string(GRAMMAR, longer)
        except UserError:
            pass
    return program


def test_what_the_grammar_lacks_is_left_out():
    grammar = Grammar(("a", "b"), operators=SETS["protected"])
    p = jnp.asarray(from_string(grammar, "max(neg(neg(a)), a) + sqrt(sqr(b))"))
    assert to_string(grammar, simplify(grammar, p, "sound")) == "(a + abs(b))"


def test_the_evolution_simplifies():
    config = evolve.EvolveConfig(population=64, oos="sound")
    first = evolve.first_programs(GRAMMAR, config)
    state = evolve.State(first, jnp.zeros(64), jax.random.key(0), jnp.zeros((), int))
    children = jax.jit(lambda s: evolve.offspring(GRAMMAR, config, s)[1])(state)
    for found in (first, children):
        assert valid(GRAMMAR, found).all()
        assert not np.isin(found, [GRAMMAR.opcode("skp"), GRAMMAR.opcode("pow")]).any()


def test_unknown_rules_are_told():
    with pytest.raises(UserError, match="oos is 'all'"):
        simplify(GRAMMAR, jnp.zeros(31, int), "all")
    with pytest.raises(UserError, match="oos is 'all'"):
        evolve.EvolveConfig(oos="all")
