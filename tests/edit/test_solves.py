"""Closed forms against NumPy in float64, and the identities between the methods."""

import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.edit.alphaedit import project
from jaxsys.edit.solves import rank_one, ridge, solve
from jaxsys.edit.stats import null_space

F, D = 24, 10


def spd(seed: int, condition: float = 1e3, size: int = F) -> np.ndarray:
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    return (basis * np.geomspace(1.0, 1.0 / condition, size)) @ basis.T


def near(found, wanted, relative: float) -> None:
    error = np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted)
    assert error < relative


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("condition", [1e2, 1e9])
def test_solve_is_accurate_where_float32_is_not(rng, condition):
    a, wanted = spd(1, condition), rng.normal(size=(F, 1))
    b = a @ wanted
    near(a @ solve(a, b), b, 1e-10)
    near(solve(a, b), wanted, 1e-10 * condition)


def test_solve_finds_small_columns_beside_large_ones(rng):
    a, wanted = spd(1, 1e6), rng.normal(size=(F, 7)) * np.geomspace(1e12, 1e-12, 7)
    found = solve(a, a @ wanted)
    for i in range(7):
        near(found[:, i], wanted[:, i], 1e-5)


@pytest.mark.parametrize("n", [7, 40])
@pytest.mark.parametrize("weight", [1.0, 0.1])
def test_ridge_is_the_published_update(rng, n, weight):
    m, k, r = 50 * spd(2, 1e6), rng.normal(size=(F, n)), rng.normal(size=(D, n))
    a, b = ridge(m, k, r, weight)
    near(a @ b.T, r @ k.T @ np.linalg.inv(weight * m + k @ k.T), 1e-4)


def test_memit_interpolates_as_its_weight_goes_to_nought(rng):
    k, r = rng.normal(size=(F, 7)), rng.normal(size=(D, 7))
    errors = []
    for weight in (1e2, 1.0, 1e-2, 1e-6):
        a, b = ridge(weight * spd(3), k, r)
        errors.append(np.abs(a @ b.T @ k - r).max())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4


def test_rome_maps_its_key_to_its_value(rng):
    w, c, v = rng.normal(size=(D, F)), spd(4), rng.normal(size=D)
    mean, bare = rng.normal(size=F) + 1, rng.normal(size=F) + 1
    for moment, key in ((c, bare), (None, bare), (c, mean)):
        a, b = rank_one(moment, mean, key, v - w @ key)
        near((w + a @ b.T) @ key, v, 1e-5)
        u = np.linalg.solve(np.eye(F) if moment is None else moment, mean)
        near(a @ b.T, np.outer(v - w @ key, u) / (key @ u), 1e-5)


def test_emmet_with_one_fact_and_no_slack_is_rome(rng):
    c, k, r = spd(5), rng.normal(size=(F, 1)), rng.normal(size=(D, 1))
    rome = rank_one(c, k[:, 0], k[:, 0], r[:, 0])
    for weight in (1.0, 20000.0):
        emmet = ridge(weight * c, k, r, 0.0)
        near(emmet[0] @ emmet[1].T, rome[0] @ rome[1].T, 1e-5)


def test_emmet_meets_all_facts_without_slack(rng):
    k, r = rng.normal(size=(F, 7)), rng.normal(size=(D, 7))
    a, b = ridge(spd(6), k, r, 0.0)
    near(a @ b.T @ k, r, 1e-5)


@pytest.mark.parametrize("earlier", [False, True])
def test_alphaedit_is_the_published_solution_and_stays_in_its_directions(rng, earlier):
    c, k, r = spd(7), rng.normal(size=(F, 7)), rng.normal(size=(D, 7))
    u = null_space(c.astype(np.float32), 0.02).astype(np.float64)
    assert 0 < u.shape[1] < F
    p, eta = u @ u.T, 0.5
    kept = rng.normal(size=(F, 9))
    s = kept @ kept.T if earlier else np.zeros((F, F))
    a, b = project(u, k, r, s if earlier else None, eta)
    x = np.linalg.solve(p @ (k @ k.T + s) + eta * np.eye(F), p @ k @ r.T)
    near(a @ b.T, x.T, 1e-5)
    near(p @ b @ a.T, b @ a.T, 1e-5)


def test_alphaedit_with_every_direction_free_is_ridge_regression(rng):
    k, r = rng.normal(size=(F, 7)), rng.normal(size=(D, 7))
    a, b = project(np.eye(F), k, r, None, 2.0)
    near(a @ b.T, r @ k.T @ np.linalg.inv(k @ k.T + 2.0 * np.eye(F)), 1e-5)


def test_null_space_thresholds(rng):
    c = spd(8) * 100
    values = np.linalg.eigvalsh(c)
    assert null_space(c, 5.0).shape[1] == (values < 5.0).sum()
    assert null_space(c, 0.3, relative=True).shape[1] == (values < 0.3 * values.mean()).sum()
    with pytest.raises(UserError, match="raise the threshold"):
        null_space(c, 1e-6)


def test_singular_systems_are_refused(rng):
    k = rng.normal(size=(F, 1))
    lower = k @ k.T
    with pytest.raises(UserError, match="singular to working precision"):
        solve(lower, rng.normal(size=(F, 1)))
    with pytest.raises(UserError, match="orthogonal"):
        rank_one(None, np.eye(F)[0], np.eye(F)[1], np.ones(D))


def test_one_key_with_two_values_is_refused_without_slack(rng):
    k, r = rng.normal(size=(F, 7)), rng.normal(size=(D, 7))
    k[:, 4] = k[:, 1]
    with pytest.raises(UserError, match="requests 1 and 4 have the same key"):
        ridge(spd(9), k, r, 0.0)
    a, b = ridge(1e-4 * spd(9), k, r, 1.0)
    near(a @ b.T @ k[:, 1], (r[:, 1] + r[:, 4]) / 2, 1e-2)
