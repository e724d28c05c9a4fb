"""The learning rate schedule and the ledger's arithmetic: both pure."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagein.train.ledger import Ledger, LedgerTotals, attribute
from stagein.train.schedule import Schedule


def test_warm_up_is_linear_and_ends_at_the_full_rate() -> None:
    schedule = Schedule(total_steps=10, warmup_steps=4, shape="constant")
    assert [schedule(step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_cosine_goes_from_one_to_zero() -> None:
    schedule = Schedule(total_steps=12, warmup_steps=2)
    assert schedule(2) == 1.0
    assert schedule(7) == pytest.approx(0.5)
    assert schedule(11) == pytest.approx(0.5 * (1 + math.cos(0.9 * math.pi)))
    assert schedule(12) == schedule(100) == 0.0


@given(st.integers(1, 1000), st.data())
def test_every_factor_lies_between_zero_and_one_and_falls_after_the_warm_up(total: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, total))
    factors = [Schedule(total, warmup)(step) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    assert factors[:warmup] == sorted(factors[:warmup])


def test_a_warm_up_longer_than_the_training_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        Schedule(total_steps=3, warmup_steps=4)


def test_the_job_waits_for_what_its_critical_rank_waits_for() -> None:
    """Two ranks that stall 3 s in turn: each waits for data in half of the steps, the job in all of them."""
    data, compute = np.array([[3.0, 0.0], [0.0, 3.0]]), np.ones((2, 2))
    transfer = 0.5
    arrival = data + compute
    allreduce = arrival.max(axis=0) - arrival + transfer
    totals = attribute(np.stack([data, compute, allreduce], axis=-1), samples=8)
    assert totals.seconds == pytest.approx(9.0)
    assert totals.data_wait_share == pytest.approx(3 / 9)
    assert totals.critical_data_share == pytest.approx(6 / 9)
    assert totals.transfer_seconds == pytest.approx(1.0)
    assert totals.speedup_without_data_wait == pytest.approx(9.0 / 3.0)
    assert totals.samples_per_second == pytest.approx(8 / 9)


def test_totals_add_up_and_empty_ones_have_no_shares() -> None:
    once = attribute(np.full((1, 2, 3), 0.25), samples=4)
    twice = LedgerTotals() + once + once
    assert (twice.steps, twice.samples, twice.seconds) == (4, 8, 3.0)
    assert twice.data_wait_share == once.data_wait_share
    assert (LedgerTotals().samples_per_second, LedgerTotals().speedup_without_data_wait) == (0.0, 1.0)


def test_a_ledger_hands_out_each_step_once() -> None:
    ledger = Ledger()
    ledger.add(data_seconds=1, compute_seconds=2, allreduce_seconds=3, samples=4)
    rows, samples = ledger.take()
    assert (rows.tolist(), samples) == ([[1, 2, 3]], 4)
    rows, samples = ledger.take()
    assert (rows.shape, samples) == ((0, 3), 0)
    assert attribute(rows[None], samples).steps == 0
