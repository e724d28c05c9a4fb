"""How every benchmark reports: ratios within interleaved rounds, never bare times."""

import json
import statistics


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
