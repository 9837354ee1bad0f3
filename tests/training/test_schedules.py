"""AlphaSchedule and BlendSchedule: values worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from logitcache.errors import UsageError
from logitcache.training import AlphaSchedule, BlendSchedule


def values(steps: int, **fields: Any) -> list[float]:
    schedule = AlphaSchedule(**fields)
    return [schedule.at(step, steps) for step in range(steps)]


def test_constant() -> None:
    assert values(3, peak=0.7) == [0.7, 0.7, 0.7]


def test_linear_falls_from_the_peak_to_the_end() -> None:
    assert values(5, kind="linear", peak=0.8) == pytest.approx([0.8, 0.6, 0.4, 0.2, 0])
    assert values(3, kind="linear", peak=0.8, final=0.2) == pytest.approx([0.8, 0.5, 0.2])


def test_wsd_rises_holds_and_falls() -> None:
    assert values(11, kind="wsd", peak=0.9, warmup=0.2, decay=0.3) == pytest.approx(
        [0, 0.45, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.6, 0.3, 0]
    )
    assert values(11, kind="wsd", peak=1, warmup=0, decay=0.5, final=0.5) == pytest.approx(
        [1, 1, 1, 1, 1, 1, 0.9, 0.8, 0.7, 0.6, 0.5]
    )


def test_wsd_without_decay_holds_to_the_end() -> None:
    assert values(5, kind="wsd", peak=0.5, warmup=0.5, decay=0) == pytest.approx([0, 0.25, 0.5, 0.5, 0.5])


@pytest.mark.parametrize("kind", ["constant", "linear", "wsd"])
def test_runs_of_one_step_and_steps_past_the_end(kind: str) -> None:
    schedule = AlphaSchedule(kind, peak=0.9)
    assert 0 <= schedule.at(0, 1) <= 0.9
    assert schedule.at(30, 11) == (0.9 if kind == "constant" else 0)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"kind": "cosine"}, "'cosine' is unknown"),
        ({"peak": 1.1}, "peak is 1.1"),
        ({"peak": float("nan")}, "peak is nan"),
        ({"final": -0.1}, "final is -0.1"),
        ({"warmup": 0.6, "decay": 0.5}, "warmup and decay"),
    ],
)
def test_errors(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        AlphaSchedule(**fields)


def test_a_blend_moves_in_a_straight_line() -> None:
    def values(*ends: Any, steps: int = 5) -> list[float]:
        schedule = BlendSchedule(*ends)
        return [schedule.at(step, steps) for step in range(steps)]

    assert values() == [0.5] * 5
    assert values(0.3) == pytest.approx([0.3] * 5)
    assert values(0.0, 1.0) == [0, 0.25, 0.5, 0.75, 1]
    assert values(1.0, 0.2) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert values(0.2, 1.0, steps=1) == [0.2]
    assert BlendSchedule(0.0, 1.0).at(30, 11) == 1


@pytest.mark.parametrize(("ends", "named"), [((1.1,), "start is 1.1"), ((0.5, -0.1), "end is -0.1")])
def test_blends_out_of_range(ends: tuple[float, ...], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        BlendSchedule(*ends)
