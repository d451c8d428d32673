from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from fasc_lightning.compression import Candidate, _allocation, allocate_fisher, allocate_uniform, least_cost
from fasc_lightning.layers import auto_cost, rank_budget, resolve_rank


def pivot(m, n, k):
    return k * (m + n - k)


def factors(m, n, k):
    return k * (m + n)


def curve(spectrum):
    return np.append(np.cumsum(np.sort(spectrum))[::-1], 0.0)


def spent(candidates, ranks, cost):
    return sum(c.m * c.n if k is None else cost(c.m, c.n, k) for c, k in zip(candidates, ranks, strict=True))


def loss(candidates, ranks):
    return sum(0.0 if k is None else c.losses[k] for c, k in zip(candidates, ranks, strict=True))


shapes = st.tuples(st.integers(2, 6), st.integers(2, 6))


@settings(deadline=None, max_examples=60)
@given(
    layers=st.lists(shapes, min_size=1, max_size=3),
    keep=st.floats(0.3, 1.0),
    cost=st.sampled_from([pivot, factors]),
    seed=st.integers(0, 100),
)
def test_fisher_is_within_budget_and_the_best_by_brute_force(layers, keep, cost, seed):
    rng = np.random.default_rng(seed)
    candidates = [
        Candidate(str(i), m, n, curve(rng.exponential(size=min(m, n)) ** 3)) for i, (m, n) in enumerate(layers)
    ]
    budget = int(keep * sum(m * n for m, n in layers))
    choices = [[k for k in range(1, min(c.m, c.n) + 1) if cost(c.m, c.n, k) < c.m * c.n] + [None] for c in candidates]
    feasible = [r for r in itertools.product(*choices) if spent(candidates, r, cost) <= budget]
    if not feasible:
        with pytest.raises(ValueError, match="budget of at least"):
            allocate_fisher(candidates, budget, cost)
        return
    ranks = allocate_fisher(candidates, budget, cost)
    assert spent(candidates, ranks, cost) <= budget
    best = min(loss(candidates, r) for r in feasible)
    assert loss(candidates, ranks) == pytest.approx(best, rel=1.01e-4, abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(keep=st.floats(0.3, 0.9), seed=st.integers(0, 1000))
def test_the_best_choice_of_many_layers_is_that_of_an_integer_program(keep, seed):
    rng = np.random.default_rng(seed)
    sizes = [(int(m), int(n)) for m, n in rng.choice([6, 8, 12], (16, 2))]
    candidates = [
        Candidate(str(i), m, n, curve(rng.exponential(size=min(m, n)) ** 3)) for i, (m, n) in enumerate(sizes)
    ]
    budget = int(keep * sum(m * n for m, n in sizes))
    ways = [(i, k) for i, c in enumerate(candidates) for k in [*range(1, len(c.losses)), None]]
    costs = [spent([candidates[i]], [k], pivot) for i, k in ways]
    losses = [loss([candidates[i]], [k]) for i, k in ways]
    one_each = np.array([[i == layer for i, _ in ways] for layer in range(len(candidates))], dtype=float)
    found = milp(
        losses,
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint([costs], ub=budget)],
        integrality=np.ones(len(ways)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        with pytest.raises(ValueError, match="budget of at least"):
            allocate_fisher(candidates, budget, pivot)
        return
    assert loss(candidates, allocate_fisher(candidates, budget, pivot)) == pytest.approx(found.fun, rel=1.01e-4)


def test_with_too_many_layers_for_an_exact_search_the_lagrangian_is_near_it(monkeypatch):
    rng = np.random.default_rng(0)
    candidates = [Candidate(str(i), 24, 32, curve(rng.exponential(size=24) ** 3)) for i in range(40)]
    budget = int(0.6 * 40 * 24 * 32)
    near = allocate_fisher(candidates, budget, pivot)
    monkeypatch.setattr(_allocation, "_EXACT_LAYERS", 40)
    best = allocate_fisher(candidates, budget, pivot)
    assert spent(candidates, best, pivot) <= budget
    assert loss(candidates, best) <= loss(candidates, near) <= 1.01 * loss(candidates, best)
    monkeypatch.setattr(_allocation, "_MOST_PARTIAL", 4)  # the search gives up
    assert allocate_fisher(candidates, budget, pivot) == near


@settings(deadline=None, max_examples=60)
@given(layers=st.lists(shapes, min_size=1, max_size=3), keep=st.floats(0.3, 1.0), seed=st.integers(0, 100))
def test_losses_that_rise_with_the_rank_are_allocated_by_their_minimum(layers, keep, seed):
    """Of a solver that minimises something else: more rank may cost more loss, over many orders of magnitude."""
    rng = np.random.default_rng(seed)
    candidates = [Candidate(str(i), m, n, 10 ** rng.uniform(-6, 12, min(m, n) + 1)) for i, (m, n) in enumerate(layers)]
    budget = int(keep * sum(m * n for m, n in layers))
    choices = [[k for k in range(1, min(c.m, c.n) + 1) if pivot(c.m, c.n, k) < c.m * c.n] + [None] for c in candidates]
    feasible = [r for r in itertools.product(*choices) if spent(candidates, r, pivot) <= budget]
    if not feasible:
        return
    ranks = allocate_fisher(candidates, budget, pivot)
    assert spent(candidates, ranks, pivot) <= budget
    for i, k in enumerate(ranks):
        cheaper = [j for j in choices[i] if spent([candidates[i]], [j], pivot) <= spent([candidates[i]], [k], pivot)]
        assert loss([candidates[i]], [k]) == min(loss([candidates[i]], [j]) for j in cheaper)
    best = min(loss(candidates, r) for r in feasible)
    assert loss(candidates, ranks) == pytest.approx(best, rel=1.01e-4)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000))
def test_fisher_is_no_worse_than_the_greedy_optimum_of_linear_costs(seed):
    """With linear cost and ordered spectra greedy is optimal; keeping a layer dense can only better it."""
    rng = np.random.default_rng(seed)
    candidates = [Candidate(str(i), 20, 20, curve(rng.exponential(size=20))) for i in range(4)]
    budget = 4 * factors(20, 20, 5)
    ranks = allocate_fisher(candidates, budget, factors)
    gains = sorted((g for c in candidates for g in -np.diff(c.losses)[1:]), reverse=True)
    first = sum(c.losses[1] for c in candidates)
    expected = first - sum(gains[: 4 * 5 - 4])
    assert loss(candidates, ranks) <= expected + 1e-9


@settings(deadline=None, max_examples=80)
@given(
    layers=st.lists(st.tuples(st.integers(2, 10), st.integers(2, 10)), min_size=1, max_size=3),
    keep=st.floats(0.3, 1.0),
    cost=st.sampled_from([pivot, factors, auto_cost]),
    align=st.integers(1, 4),
    seed=st.integers(0, 100),
)
def test_aligned_ranks_are_the_best_multiples_by_brute_force(layers, keep, cost, align, seed):
    rng = np.random.default_rng(seed)
    candidates = [
        Candidate(str(i), m, n, curve(rng.exponential(size=min(m, n)) ** 3)) for i, (m, n) in enumerate(layers)
    ]
    budget = int(keep * sum(m * n for m, n in layers))
    choices = [
        [k for k in range(1, min(c.m, c.n) + 1) if k % align == 0 and cost(c.m, c.n, k) < c.m * c.n] + [None]
        for c in candidates
    ]
    feasible = [r for r in itertools.product(*choices) if spent(candidates, r, cost) <= budget]
    if not feasible:
        with pytest.raises(ValueError, match="budget of at least"):
            allocate_fisher(candidates, budget, cost, align)
        return
    ranks = allocate_fisher(candidates, budget, cost, align)
    assert tuple(ranks) in feasible
    best = min(loss(candidates, r) for r in feasible)
    assert loss(candidates, ranks) == pytest.approx(best, rel=1.01e-4, abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(
    layers=st.lists(st.tuples(st.integers(2, 10), st.integers(2, 10)), min_size=1, max_size=3),
    keep=st.floats(0.2, 1.0),
    cost=st.sampled_from([pivot, factors, auto_cost]),
    align=st.integers(1, 4),
)
def test_uniform_gives_each_layer_the_highest_multiple_its_budget_holds(layers, keep, cost, align):
    candidates = [Candidate(str(i), m, n, curve(np.ones(min(m, n)))) for i, (m, n) in enumerate(layers)]
    budgets = [int(keep * m * n) for m, n in layers]
    expected = []
    for c, budget in zip(candidates, budgets, strict=True):
        saving = [k for k in range(align, min(c.m, c.n) + 1, align) if cost(c.m, c.n, k) < c.m * c.n]
        fitting = [k for k in saving if cost(c.m, c.n, k) <= budget]
        expected.append("dense" if budget >= c.m * c.n else max(fitting, default="none"))
    if "none" in expected:
        with pytest.raises(ValueError, match=f"for layer '{expected.index('none')}'"):
            allocate_uniform(candidates, budgets, cost, align)
    else:
        ranks = allocate_uniform(candidates, budgets, cost, align)
        assert ["dense" if k is None else k for k in ranks] == expected


def test_aligning_spends_the_budget_that_rounding_down_would_leave():
    rng = np.random.default_rng(0)
    candidates = [Candidate(str(i), 64, 64, curve(rng.exponential(size=64) ** 2)) for i in range(8)]
    budget = int(0.6 * 8 * 64 * 64)
    aligned = allocate_fisher(candidates, budget, pivot, 8)
    rounded = [k if k is None else max(8, k // 8 * 8) for k in allocate_fisher(candidates, budget, pivot)]
    assert all(k is None or k % 8 == 0 for k in aligned)
    assert spent(candidates, rounded, pivot) < spent(candidates, aligned, pivot) <= budget
    assert loss(candidates, aligned) < loss(candidates, rounded)


def test_a_layer_without_a_multiple_that_saves_stays_dense():
    small, large = Candidate("small", 4, 6, curve(np.ones(4))), Candidate("large", 16, 16, curve(np.ones(16)))
    assert allocate_fisher([small, large], 24 + pivot(16, 16, 8), pivot, 8) == [None, 8]
    assert least_cost(4, 6, pivot, 8) == 24
    assert least_cost(16, 16, pivot, 8) == 192
    assert least_cost(16, 16, factors, 8) == 256
    with pytest.raises(ValueError, match=r"at least 216 parameters \(rank 8 in each of 2 layers\).*lower `align`"):
        allocate_fisher([small, large], 215, pivot, 8)


def test_a_full_budget_keeps_everything_dense():
    candidates = [Candidate("a", 4, 6, curve(np.ones(4))), Candidate("b", 5, 5, curve(np.ones(5)))]
    assert allocate_fisher(candidates, 24 + 25, pivot) == [None, None]


def test_important_layers_get_more():
    rng = np.random.default_rng(0)
    spectrum = rng.exponential(size=16)
    candidates = [Candidate("important", 16, 16, curve(spectrum * 100)), Candidate("idle", 16, 16, curve(spectrum))]
    important, idle = allocate_fisher(candidates, 300, pivot)
    assert (important or 16) > idle


def test_the_rest_of_the_budget_is_spent():
    candidates = [Candidate(str(i), 32, 32, curve(np.random.default_rng(i).exponential(size=32))) for i in range(5)]
    budget = 3000
    ranks = allocate_fisher(candidates, budget, pivot)
    left = budget - spent(candidates, ranks, pivot)
    increments = [pivot(32, 32, k + 1) - pivot(32, 32, k) for k in ranks if k is not None and k < 31]
    assert left < min(increments)


def test_too_small_a_budget_is_refused():
    with pytest.raises(ValueError, match="at least 9 parameters"):
        allocate_fisher([Candidate("a", 5, 5, curve(np.ones(5)))], 8, pivot)
    with pytest.raises(ValueError, match="layer 'a'"):
        allocate_uniform([Candidate("a", 5, 5, curve(np.ones(5)))], [8], pivot)


def test_uniform_gives_each_layer_the_rank_its_budget_holds():
    candidates = [Candidate("a", 10, 10, curve(np.ones(10))), Candidate("b", 4, 20, curve(np.ones(4)))]
    budgets = [rank_budget(10, 10, 5), rank_budget(4, 20, 2)]
    assert allocate_uniform(candidates, budgets, pivot) == [5, 2]
    # Two factors of the same budget hold fewer.
    assert allocate_uniform(candidates, budgets, factors) == [3, 1]
    assert allocate_uniform(candidates, [100, 80], factors) == [None, None]


def test_resolve_rank():
    assert resolve_rank(10, 20, 0.5) == 5
    assert resolve_rank(10, 20, 1.0) == 10
    assert resolve_rank(10, 20, 7) == 7
    assert resolve_rank(3, 3, 0.01) == 1
