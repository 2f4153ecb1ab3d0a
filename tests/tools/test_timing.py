"""Costs of updates: one clock for all, and the device's where there is one."""

import pytest

from tools.timing import UpdateTime, busy_ms, cost_shares


@pytest.mark.parametrize(
    ("whole", "half", "share"),
    [
        (UpdateTime(10.0, 8.0), UpdateTime(9.0, 2.0), 0.25),  # a host that is late
        (UpdateTime(10.0, None), UpdateTime(5.0, None), 0.5),
        (UpdateTime(10.0, 8.0), UpdateTime(5.0, None), 0.5),  # never a share of two clocks
        (UpdateTime(10.0, 8.0), UpdateTime(5.0, 0.0), 0.0),
    ],
)
def test_costs_are_shares_by_one_clock(whole: UpdateTime, half: UpdateTime, share: float) -> None:
    times = {"whole": whole, "half": half}
    assert cost_shares(times, unit="whole") == {"whole": 1.0, "half": share}


def test_a_cpu_is_not_traced() -> None:
    def update(number: int) -> None:
        raise AssertionError(f"update {number} ran")

    assert busy_ms(update, 3) is None
