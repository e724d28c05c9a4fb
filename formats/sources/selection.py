"""Some records of a source in an order of their own: the first few, shuffled, or dealt to several data sets."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from stagein.formats.errors import UsageError
from stagein.formats.schema import Schema
from stagein.formats.source import RefusedRecord, Source, SourcePart


@dataclass(frozen=True)
class SelectedRecords:
    """The records `numbers` of the source `whole`, in that order; a source itself."""

    whole: Source
    numbers: NDArray[np.int64]

    @property
    def kind(self) -> str:
        return self.whole.kind

    @property
    def name(self) -> str:
        return self.whole.name

    @property
    def schema(self) -> Schema:
        return self.whole.schema

    @property
    def nbytes(self) -> NDArray[np.int64]:
        return self.whole.nbytes[self.numbers]

    @property
    def secondary_nbytes(self) -> Mapping[str, NDArray[np.int64]]:
        return {name: nbytes[self.numbers] for name, nbytes in self.whole.secondary_nbytes.items()}

    @property
    def refused(self) -> tuple[RefusedRecord, ...]:
        return self.whole.refused

    def identity(self) -> object:
        return self.whole.identity(), hashlib.sha256(self.numbers.astype("<i8").tobytes()).hexdigest()

    def part(self, numbers: NDArray[np.int64]) -> SourcePart:
        return self.whole.part(self.numbers[numbers])


def select(source: Source, *, limit: int | None = None, shuffle_seed: int | None = None) -> Source:
    """`source` with its records shuffled, if there is a seed, and of these the first `limit`, if there is one."""
    if limit is None and shuffle_seed is None:
        return source
    count = len(source.nbytes)
    numbers = np.arange(count) if shuffle_seed is None else permutation(count, shuffle_seed)
    return SelectedRecords(source, numbers[:limit])


def split(source: Source, shares: Mapping[str, Fraction], seed: int = 0) -> dict[str, Source]:
    """Sources that share the records of `source` at random, each record in exactly one; each keeps the order they have.

    `shares` are as `refuse_shares` wants them. Which record goes where is a function of the seed and of their number. Raises
    UsageError for shares that are not, or that leave nothing for one of them.
    """
    refuse_shares(shares)
    count = len(source.nbytes)
    numbers = permutation(count, seed)
    stops = [round(stop * count) for stop in accumulate(shares.values())]
    parts: dict[str, Source] = {}
    for name, start, stop in zip(shares, [0, *stops], stops, strict=False):
        if start == stop:
            raise UsageError(f"{source.name}: its {count} records are too few for a split with {name} in it")
        parts[name] = SelectedRecords(source, np.sort(numbers[start:stop]))
    return parts


def refuse_shares(shares: Mapping[str, Fraction]) -> None:
    """Raise UsageError for shares of a split that are not positive or do not add up to 1."""
    total = sum(shares.values())
    if total != 1 or min(shares.values()) <= 0:
        listed = ", ".join(f"{name}={float(share):g}" for name, share in shares.items())
        raise UsageError(f"the split {listed} adds up to {float(total):.9g}: make it positive shares that add up to 1")


def permutation(count: int, seed: int) -> NDArray[np.int64]:
    """The numbers below `count` in an order that follows from the seed, whatever the version of numpy.

    Of numpy's generators only the raw stream is promised to stay (NEP 19), so it is the stream that is sorted.
    """
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")
