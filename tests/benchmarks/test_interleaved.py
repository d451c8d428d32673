from __future__ import annotations

import pytest
from interleaved import LEAST_ROUNDS, Spread, interleave, speed_ups


def test_every_round_runs_every_action_once_in_changing_order():
    calls = []
    actions = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = interleave(actions, seconds=0)
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys("abc", LEAST_ROUNDS)
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == LEAST_ROUNDS + 1  # the first does not count
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) > 1
    again = list(calls)
    calls.clear()
    interleave(actions, seconds=0)
    assert calls == again


def test_rounds_go_on_while_there_is_time():
    assert len(interleave({"a": lambda: None}, seconds=0.05)["a"]) > LEAST_ROUNDS


def test_ratios_are_taken_within_rounds():
    found = speed_ups({"dense": [2.0, 8.0, 3.0], "other": [1.0, 2.0, 3.0]}, "dense")
    assert found["dense"] == Spread(1, 1, 1, 1, 1)
    assert found["other"] == Spread(median=2, low=1.5, high=3, least=1, most=4)
    assert Spread.of([5.0]).to_dict() == dict.fromkeys(["median", "low", "high", "least", "most"], 5.0)
    with pytest.raises(ValueError, match="longer"):
        speed_ups({"dense": [1.0], "other": [1.0, 2.0]}, "dense")
