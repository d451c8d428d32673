from __future__ import annotations

from functools import partial

import pytest

from fasc_lightning._utils import Registry


def made():
    return Registry("method", "solver", ("W", "moments"))


def solve(W, moments):
    return W, moments


def test_functions_are_found_by_name_in_order():
    registry = made()
    registry.add("b", solve, 1)
    registry.add("a", partial(lambda alpha, W, moments: W, 0.5), 2)
    assert registry.names == ["b", "a"]
    assert registry.function("b") is solve
    assert registry.declared("a") == 2
    with pytest.raises(ValueError, match="Expected `method` to be one of b, a but got 'c'"):
        registry.function("c")


def again(offset):
    def solve(W, moments):
        return W + offset, moments

    return solve


def test_a_function_that_is_defined_again_replaces_itself():
    registry = made()
    registry.add("mine", again(1), 1)
    registry.add("mine", second := again(2), 2)
    assert registry.function("mine") is second
    assert registry.declared("mine") == 2


@pytest.mark.parametrize("other", [solve, lambda W, moments: W])
def test_a_name_that_is_taken_is_refused(other):
    registry = made()
    first = again(1) if other is solve else (lambda W, moments: W)
    registry.add("mine", first, None)
    with pytest.raises(
        ValueError, match=r"a new name of a solver but 'mine' is registered already, for .*test_registry"
    ):
        registry.add("mine", other, None)
    assert registry.function("mine") is first


@pytest.mark.parametrize("function", [lambda W: W, lambda W, moments, rank: W, lambda *, W, moments: W, "svd", None])
def test_functions_of_other_arguments_are_refused(function):
    registry = made()
    with pytest.raises(TypeError, match=r"the solver 'mine' to be a function of \(W, moments\) but"):
        registry.add("mine", function, None)
    assert registry.names == []


@pytest.mark.parametrize("function", [lambda W, moments, alpha=0.5: W, lambda *args: args, max, Registry])
def test_functions_with_more_options_are_taken(function):
    registry = made()
    if function is Registry:
        with pytest.raises(TypeError, match="takes"):
            registry.add("mine", function, None)
    else:
        registry.add("mine", function, None)


@pytest.mark.parametrize("name", [solve, "", 3, None])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(TypeError, match=r"name of the solver but got .* HINT: @register_solver\('mine'\)"):
        made().check_name(name)
