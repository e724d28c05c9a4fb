"""What is done to many samples at once when a JPEG is decoded: the inverse DCT, interpolation of chroma, conversion of colours; and to many
bytes of its data: the search for markers.

As LLVM's vector operations, since numba makes numbers of 64 bits of all that it adds. The arithmetic is that of libjpeg-turbo on
processors with vectors, bit by bit: its "islow" DCT (Loeffler, Ligtenberg, Moschytz: "Practical fast 1-D DCT algorithms with 11
multiplications", ICASSP 1989, in fixed point of 13 bits), its "fancy" upsampling, and the colours of JFIF in fixed point of 16
bits. For kernels only; elements of arrays are not checked.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .limits import SEARCHED_BYTES, VECTOR_PIXELS

_BITS = 13
_FIRST_PASS_BITS = 2
_LANES = 8
_COLOUR_BITS = 16


def _fixed(number: float) -> int:
    return round(number * (1 << _BITS))


def _colour(number: float) -> int:
    return round(number * (1 << _COLOUR_BITS))


class _Vectors:
    """LLVM's builder, for vectors of whole numbers."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder

    def load(self, address: Any, bits: int, lanes: int) -> Any:
        kind = ir.VectorType(ir.IntType(bits), lanes)
        return self._builder.load(self._builder.bitcast(address, kind.as_pointer()), align=1)

    def store(self, value: Any, address: Any) -> None:
        self._builder.store(value, self._builder.bitcast(address, value.type.as_pointer()), align=1)

    def constant(self, like: Any, number: int) -> Any:
        return ir.Constant(like.type, [number] * like.type.count)

    def all(self, number: Any, like: Any) -> Any:
        """A vector of one number that is known when it runs."""
        number = self._builder.trunc(number, like.type.element)
        one = self._builder.insert_element(ir.Constant(like.type, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
        return self.shuffle(one, one, [0] * like.type.count)

    def wide(self, value: Any, bits: int, *, signed: bool) -> Any:
        kind = ir.VectorType(ir.IntType(bits), value.type.count)
        return self._builder.sext(value, kind) if signed else self._builder.zext(value, kind)

    def narrow(self, value: Any, bits: int) -> Any:
        return self._builder.trunc(value, ir.VectorType(ir.IntType(bits), value.type.count))

    def times(self, value: Any, factor: int) -> Any:
        return self._builder.mul(value, self.constant(value, factor))

    def plus(self, *values: Any) -> Any:
        total = values[0]
        for value in values[1:]:
            total = self._builder.add(total, value)
        return total

    def minus(self, value: Any, other: Any) -> Any:
        return self._builder.sub(value, other)

    def down(self, value: Any, rounding: int, bits: int, *, signed: bool = True) -> Any:
        """(value + rounding) >> bits."""
        total = self._builder.add(value, self.constant(value, rounding))
        shift = self._builder.ashr if signed else self._builder.lshr
        return shift(total, self.constant(total, bits))

    def up(self, value: Any, bits: int) -> Any:
        return self._builder.shl(value, self.constant(value, bits))

    def are_zero(self, values: Sequence[Any]) -> Any:
        together = values[0]
        for value in values[1:]:
            together = self._builder.or_(together, value)
        whole = self._builder.bitcast(together, ir.IntType(together.type.count * together.type.element.width))
        return self._builder.icmp_unsigned("==", whole, ir.Constant(whole.type, 0))

    def first(self, are_so: Any) -> Any:
        """Of a vector of truths, the place of the first that is true; where none is, the number of its elements."""
        mask = self._builder.bitcast(are_so, ir.IntType(are_so.type.count))
        return self._builder.zext(self._builder.cttz(mask, ir.IntType(1)(0)), ir.IntType(64))

    def clamp(self, value: Any, least: int, most: int) -> Any:
        for bound, order in ((self.constant(value, least), "<"), (self.constant(value, most), ">")):
            value = self._builder.select(self._builder.icmp_signed(order, value, bound), bound, value)
        return value

    def shuffle(self, first: Any, second: Any, lanes: Sequence[int]) -> Any:
        """The elements of both, one after the other, at these places."""
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes))
        return self._builder.shuffle_vector(first, second, mask)

    def inverse_dct(self, rows: Sequence[Any], bits: int) -> list[Any]:
        """Of each column of eight rows, 16 bits an element, then shifted right by `bits`: rows again, 16 bits, saturated."""
        even = [self.wide(rows[number], 32, signed=True) for number in (2, 6)]
        sums = (
            self.plus(rows[0], rows[4]),
            self.minus(rows[0], rows[4]),
        )  # in 16 bits, as all that is added before a product
        sum04, difference04 = (self.up(self.wide(each, 32, signed=True), _BITS) for each in sums)
        shared = self.times(self.plus(*even), _fixed(0.541196100))
        from6 = self.plus(shared, self.times(even[1], -_fixed(1.847759065)))
        from2 = self.plus(shared, self.times(even[0], _fixed(0.765366865)))
        evens = (
            self.plus(sum04, from2),
            self.plus(difference04, from6),
            self.minus(difference04, from6),
            self.minus(sum04, from2),
        )
        sum73, sum51 = self.plus(rows[7], rows[3]), self.plus(rows[5], rows[1])
        wide73, wide51 = (self.wide(each, 32, signed=True) for each in (sum73, sum51))
        odd7, odd5, odd3, odd1 = (self.wide(rows[number], 32, signed=True) for number in (7, 5, 3, 1))
        shared = self.times(self.plus(wide73, wide51), _fixed(1.175875602))
        z1 = self.times(self.plus(odd7, odd1), -_fixed(0.899976223))
        z2 = self.times(self.plus(odd5, odd3), -_fixed(2.562915447))
        z3 = self.plus(self.times(wide73, -_fixed(1.961570560)), shared)
        z4 = self.plus(self.times(wide51, -_fixed(0.390180644)), shared)
        odds = (
            self.plus(self.times(odd1, _fixed(1.501321110)), z1, z4),
            self.plus(self.times(odd3, _fixed(3.072711026)), z2, z3),
            self.plus(self.times(odd5, _fixed(2.053119869)), z2, z4),
            self.plus(self.times(odd7, _fixed(0.298631336)), z1, z3),
        )
        pairs = list(zip(evens, odds, strict=True))
        results = [self.plus(*pair) for pair in pairs] + [self.minus(*pair) for pair in reversed(pairs)]
        shifted = [self.down(each, 1 << (bits - 1), bits) for each in results]
        return [self.narrow(self.clamp(each, -(1 << 15), (1 << 15) - 1), 16) for each in shifted]

    def transposed(self, rows: Sequence[Any]) -> list[Any]:
        """Of 8 x 8 elements."""
        low = [number // 2 + _LANES * (number % 2) for number in range(_LANES)]
        high = [number + _LANES // 2 for number in low]
        for _ in range(3):  # each pass interleaves rows that lie four apart
            rows = [self.shuffle(rows[number], rows[number + 4], half) for number in range(4) for half in (low, high)]
        return list(rows)


def _elements(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """The address of an element of an array of one dimension."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


_int16s, _uint8s, _uint16s = (types.Array(kind, 1, "C") for kind in (types.int16, types.uint8, types.uint16))


@intrinsic
def _to_samples(
    context: Any, block: Any, quantization: Any, table_at: Any, plane: Any, place: Any, row_bytes: Any
) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vectors, kinds = _Vectors(builder), signature.args
        first = _elements(context, builder, kinds[0], arguments[0], ir.Constant(ir.IntType(64), 0))
        factors = _elements(context, builder, kinds[1], arguments[1], arguments[2])
        target = _elements(context, builder, kinds[3], arguments[3], arguments[4])
        places = [builder.gep(first, [ir.Constant(ir.IntType(64), number * _LANES)]) for number in range(_LANES)]
        rows = [vectors.load(each, 16, _LANES) for each in places]
        for each, row in zip(places, rows, strict=True):
            vectors.store(vectors.constant(row, 0), each)
        is_flat = vectors.are_zero(rows[1:])
        for number, row in enumerate(rows):
            factor = vectors.load(builder.gep(factors, [ir.Constant(ir.IntType(64), number * _LANES)]), 16, _LANES)
            rows[number] = builder.mul(row, factor)
        flat = vectors.up(rows[0], _FIRST_PASS_BITS)  # the same but that it wraps, where the others saturate
        passed = vectors.inverse_dct(rows, _BITS - _FIRST_PASS_BITS)
        rows = vectors.transposed([builder.select(is_flat, flat, row) for row in passed])
        rows = vectors.transposed(vectors.inverse_dct(rows, _BITS + _FIRST_PASS_BITS + 3))
        for row in rows:
            level = vectors.plus(vectors.clamp(row, -128, 127), vectors.constant(row, 128))
            vectors.store(vectors.narrow(level, 8), target)
            target = builder.gep(target, [arguments[5]])
        return context.get_dummy_value()

    return types.void(_int16s, _int16s, types.int64, _uint8s, types.int64, types.int64), generate


@intrinsic
def _interpolate(context: Any, columns: Any, place: Any, even_bias: Any, odd_bias: Any, target: Any, to: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vectors, kinds = _Vectors(builder), signature.args
        near = _elements(context, builder, kinds[0], arguments[0], arguments[1])
        left, middle, right = (
            vectors.load(builder.gep(near, [ir.Constant(ir.IntType(64), step)]), 16, VECTOR_PIXELS)
            for step in (-1, 0, 1)
        )
        middle = vectors.times(middle, 3)
        even, odd = (
            builder.lshr(vectors.plus(middle, other, vectors.all(bias, other)), vectors.constant(other, 4))
            for other, bias in ((left, arguments[2]), (right, arguments[3]))
        )
        lanes = [number // 2 + VECTOR_PIXELS * (number % 2) for number in range(2 * VECTOR_PIXELS)]
        both = vectors.shuffle(vectors.narrow(even, 8), vectors.narrow(odd, 8), lanes)
        vectors.store(both, _elements(context, builder, kinds[4], arguments[4], arguments[5]))
        return context.get_dummy_value()

    return types.void(_uint16s, types.int64, types.int64, types.int64, _uint8s, types.int64), generate


@intrinsic
def _to_rgb(context: Any, luma: Any, at: Any, rows: Any, blue_at: Any, red_at: Any, target: Any, to: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vectors, kinds = _Vectors(builder), signature.args
        places = ((0, 1), (2, 3), (2, 4))
        y, cb, cr = (
            vectors.wide(
                vectors.load(
                    _elements(context, builder, kinds[array], arguments[array], arguments[place]), 8, VECTOR_PIXELS
                ),
                32,
                signed=False,
            )
            for array, place in places
        )
        cb, cr = (vectors.plus(each, vectors.constant(each, -128)) for each in (cb, cr))
        half, bits = 1 << (_COLOUR_BITS - 1), _COLOUR_BITS
        of_green = vectors.plus(vectors.times(cb, -_colour(0.34414)), vectors.times(cr, -_colour(0.71414)))
        changes = vectors.times(cr, _colour(1.402)), of_green, vectors.times(cb, _colour(1.772))
        rgb = [
            vectors.narrow(vectors.clamp(vectors.plus(y, vectors.down(change, half, bits)), 0, 255), 8)
            for change in changes
        ]
        pixels = range(VECTOR_PIXELS)
        red_green = vectors.shuffle(rgb[0], rgb[1], range(2 * VECTOR_PIXELS))
        blues = vectors.shuffle(rgb[2], rgb[2], range(2 * VECTOR_PIXELS))
        lanes = [lane for pixel in pixels for lane in (pixel, VECTOR_PIXELS + pixel, 2 * VECTOR_PIXELS + pixel)]
        target = _elements(context, builder, kinds[5], arguments[5], arguments[6])
        vectors.store(vectors.shuffle(red_green, blues, lanes), target)
        return context.get_dummy_value()

    return types.void(_uint8s, types.int64, _uint8s, types.int64, types.int64, _uint8s, types.int64), generate


@intrinsic
def _copy_until_ff(context: Any, source: Any, position: Any, target: Any, filled: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vectors, kinds = _Vectors(builder), signature.args
        content = vectors.load(_elements(context, builder, kinds[0], arguments[0], arguments[1]), 8, SEARCHED_BYTES)
        vectors.store(content, _elements(context, builder, kinds[2], arguments[2], arguments[3]))
        return vectors.first(builder.icmp_unsigned("==", content, vectors.constant(content, 0xFF)))

    return types.int64(_uint8s, types.int64, _uint8s, types.int64), generate


@intrinsic
def _find_marker(context: Any, source: Any, position: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vectors, kinds = _Vectors(builder), signature.args
        first = _elements(context, builder, kinds[0], arguments[0], arguments[1])
        following = builder.gep(first, [ir.Constant(ir.IntType(64), 1)])
        before, after = (vectors.load(place, 8, SEARCHED_BYTES) for place in (first, following))
        above = vectors.minus(after, vectors.constant(after, 0xD0))
        is_marker = builder.icmp_unsigned("<=", above, vectors.constant(above, 0xD9 - 0xD0))
        return vectors.first(
            builder.and_(builder.icmp_unsigned("==", before, vectors.constant(before, 0xFF)), is_marker)
        )

    return types.int64(_uint8s, types.int64), generate


to_samples: Any = _to_samples
"""(coefficients int16 [64], quantisation int16, place of its 64 factors, plane of samples, place in it, bytes of its rows): the 8 x 8
samples of a block. Coefficients and factors lie row by row; the coefficients are 0 afterwards."""

interpolate: Any = _interpolate
"""(columns uint16, place, bias of even pixels, of odd ones, target, place in it): chroma of 2 * VECTOR_PIXELS pixels from that of
VECTOR_PIXELS columns, times 4, and one on either side: 3/4 of the nearest column, 1/4 of the next."""

to_rgb: Any = _to_rgb
"""(luma, place, chroma, place of the blue, of the red, target, place in it): VECTOR_PIXELS pixels, red, green, blue each."""

copy_until_ff: Any = _copy_until_ff
"""(source, position, target, place in it): SEARCHED_BYTES bytes copied; the number of them before the first 0xFF."""

find_marker: Any = _find_marker
"""(source, position): of the SEARCHED_BYTES places from here on, how many come before the first where a restart or end marker starts. One
byte more is read."""
