"""How every benchmark reports: ratios within interleaved rounds, never bare times."""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

_WARM_UP_BATCHES = 6
"""Not timed at the start of a round: what lay ready in the queue, and the start of the threads."""


def rate_of_batches(
    batches: Iterator[dict[str, Any]],
    round_s: float,
    amount: Callable[[Any], float],
    settle: Callable[[], None] = lambda: None,
) -> float:
    """How much of the batches' first tensors, by `amount`, comes in a second, over a round of `round_s`.

    settle  waits for what was only begun, as work on a GPU is.
    """
    for _ in range(_WARM_UP_BATCHES):
        next(batches)
    settle()
    started, done = time.perf_counter(), 0.0
    while time.perf_counter() - started < round_s:
        (tensor, *_) = next(batches).values()
        done += amount(tensor)
    settle()
    return done / (time.perf_counter() - started)


def print_rates(bench: str, rates: dict[str, list[float]], baseline: str, unit: str, **settings: object) -> None:
    """A line of JSON for each contestant, then the table of their ratios to `baseline`.

    rates  by contestant, the rate in every round; the rounds were interleaved, so a ratio is taken within its round.
    """
    for name, of_rounds in rates.items():
        line = {
            "bench": bench,
            "contestant": name,
            "unit": unit,
            **settings,
            "rates": [float(f"{rate:.4g}") for rate in of_rounds],
        }
        print(json.dumps(line))
    rounds = len(rates[baseline])
    print(
        f"{'contestant':<20}{unit:>12}{'ratio':>8}   medians of {rounds} interleaved rounds (smallest, largest ratio)"
    )
    for name, of_rounds in rates.items():
        ratios = [mine / theirs for mine, theirs in zip(of_rounds, rates[baseline], strict=True)]
        middle, ratio = statistics.median(of_rounds), statistics.median(ratios)
        print(f"{name:<20}{middle:>12.4g}{ratio:>8.3f}   ({min(ratios):.3f}, {max(ratios):.3f})")


def print_ratio(rates: dict[str, list[float]], mine: str, theirs: str) -> None:
    """One more ratio, taken within each round: how many times the rate of `theirs` that of `mine` is."""
    ratios = [a / b for a, b in zip(rates[mine], rates[theirs], strict=True)]
    print(f"{mine} beside {theirs}: {statistics.median(ratios):.3f} ({min(ratios):.3f}, {max(ratios):.3f})")
