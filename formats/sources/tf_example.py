"""tf.train.Example without TensorFlow: a map from names to lists of bytes, float32 or int64.

Source of the encoding: "Protocol Buffers: Encoding" (wire format); of the messages, with field numbers:
Example {1: Features}, Features {1: map<string, Feature>}, Feature {1: BytesList | 2: FloatList | 3: Int64List}, each
list {1: repeated value}; numbers in a list may be packed. Fields that are not known are stepped over.

Bytes are fetched by position, so that an Example can be searched in its file without reading the large values in it.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Fetch: TypeAlias = Callable[[int, int], bytes | memoryview]
"""The bytes from a position on, so many of them; fewer at the end of what there is."""

Values: TypeAlias = list[memoryview] | NDArray[np.float32] | NDArray[np.int64]

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_BYTES_LIST, _FLOAT_LIST, _INT64_LIST = 1, 2, 3
_VARINT_BYTES = 10


class BadExampleError(ValueError):
    """These bytes are no tf.train.Example, or not one with what is looked for; the text says why."""


class Span(NamedTuple):
    """Where something lies: from `start` up to `stop`."""

    start: int
    stop: int


def feature_spans(fetch: Fetch, example: Span) -> Iterator[tuple[str, Span]]:
    """Name and place of every feature of the Example that lies at `example`, in their order. Raises BadExampleError."""
    for number, features in _messages(fetch, example):
        if number != 1:
            continue
        for entry_number, entry in _messages(fetch, features):
            if entry_number != 1:
                continue
            name, feature = b"", Span(0, 0)
            for part_number, part in _messages(fetch, entry):
                if part_number == 1:
                    name = bytes(fetch(part.start, part.stop - part.start))
                elif part_number == 2:
                    feature = part
            yield name.decode("utf-8", errors="backslashreplace"), feature


def single_bytes(fetch: Fetch, feature: Span) -> Span:
    """The place of the one bytes value of the feature that lies at `feature`. Raises BadExampleError if it has another."""
    kind, values = _list_of(fetch, feature)
    found = [value for number, _, value in _fields(fetch, values) if number == 1]
    if kind != _BYTES_LIST or len(found) != 1:
        raise BadExampleError("it is not one value of bytes")
    return found[0]


def feature_values(payload: memoryview, feature: Span) -> Values:
    """The values of the feature that lies at `feature` in `payload`: bytes where they lie. Raises BadExampleError."""
    fetch = fetch_from(payload)
    kind, values = _list_of(fetch, feature)
    found = [(wire, span) for number, wire, span in _fields(fetch, values) if number == 1]
    if kind == _BYTES_LIST:
        _require(all(wire == _LENGTH for wire, _ in found))
        return [payload[span.start : span.stop] for _, span in found]
    if kind == _FLOAT_LIST:
        _require(all(wire in (_LENGTH, _FIXED32) and (span.stop - span.start) % 4 == 0 for wire, span in found))
        return np.frombuffer(b"".join(payload[span.start : span.stop] for _, span in found), "<f4")
    _require(all(wire in (_LENGTH, _VARINT) for wire, _ in found))
    return np.array([number for _, span in found for number in _int64s(payload[span.start : span.stop])], np.int64)


def fetch_from(payload: memoryview) -> Fetch:
    """Fetching from memory."""
    return lambda start, nbytes: payload[start : start + nbytes]


def _list_of(fetch: Fetch, feature: Span) -> tuple[int, Span]:
    """Which list a feature holds, and where: of several the last, as protobuf has it; none is an empty list of bytes."""
    kind, values = _BYTES_LIST, Span(0, 0)
    for number, span in _messages(fetch, feature):
        if number in (_BYTES_LIST, _FLOAT_LIST, _INT64_LIST):
            kind, values = number, span
    return kind, values


def _messages(fetch: Fetch, message: Span) -> Iterator[tuple[int, Span]]:
    """The fields of a message that have a length: strings and messages."""
    return ((number, span) for number, wire, span in _fields(fetch, message) if wire == _LENGTH)


def _fields(fetch: Fetch, message: Span) -> Iterator[tuple[int, int, Span]]:
    """Number, wire type and place of the value of every field of a message."""
    position, stop = message
    while position < stop:
        head = fetch(position, min(2 * _VARINT_BYTES, stop - position))
        tag, used = _varint(head, 0)
        number, wire = tag >> 3, tag & 7
        start = position + used
        if wire == _LENGTH:
            nbytes, used = _varint(head, used)
            start = position + used
            position = start + nbytes
        elif wire == _VARINT:
            position += _varint(head, used)[1]
        elif wire in (_FIXED32, _FIXED64):
            position = start + (4 if wire == _FIXED32 else 8)
        else:
            raise BadExampleError("it is no tf.train.Example")
        _require(number > 0 and position <= stop)
        yield number, wire, Span(start, position)


def _varint(content: bytes | memoryview, position: int) -> tuple[int, int]:
    """The number that starts at `position`, seven bits a byte, the lowest first; and the position after it."""
    number = 0
    for shift, byte in enumerate(content[position : position + _VARINT_BYTES]):
        number |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return number, position + shift + 1
    raise BadExampleError("it is no tf.train.Example")


def _int64s(content: memoryview) -> Iterator[int]:
    position = 0
    while position < len(content):
        number, position = _varint(content, position)
        number &= 2**64 - 1
        yield number - 2**64 if number >= 2**63 else number


def _require(well_formed: bool) -> None:
    if not well_formed:
        raise BadExampleError("it is no tf.train.Example")
