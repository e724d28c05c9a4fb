"""Four pixels of a row at once, for the kernel of `resize`: as LLVM's vector operations, since numba makes none of three channels."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

PIXELS = 4
_CHANNELS = 3
_CONTRACT = ("contract",)
"""Multiply and add in one, as in a `float_kernel`."""
_VECTOR = ir.VectorType(ir.FloatType(), PIXELS)


def _weigh_pixels(
    context: Any,
    row: Any,
    first: Any,
    weights: Any,
    x: Any,
    y: Any,
    mirror: Any,
    scale: Any,
    offset: Any,
    out: Any,
) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = [
            context.make_array(kind)(context, builder, argument) if isinstance(kind, types.Array) else argument
            for kind, argument in zip(signature.args, arguments, strict=True)
        ]
        row, first, weights, x, y, mirror, scale, offset, out = arrays

        def number(value: int) -> Any:
            return ir.Constant(ir.IntType(64), value)

        def all_of(value: Any) -> Any:
            vector = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
            return shuffled(vector, vector, [0] * PIXELS)

        def shuffled(one: Any, other: Any, lanes: list[int]) -> Any:
            return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes))

        def times_plus(value: Any, factor: Any, added: Any) -> Any:
            return builder.fadd(builder.fmul(value, factor, flags=_CONTRACT), added, flags=_CONTRACT)

        taps = builder.extract_value(weights.shape, 1)
        pixels = [builder.add(x, number(pixel)) for pixel in range(PIXELS)]
        sources = [
            builder.gep(row.data, [builder.mul(builder.load(builder.gep(first.data, [pixel])), number(_CHANNELS))])
            for pixel in pixels
        ]
        of_pixels = [builder.gep(weights.data, [builder.mul(pixel, taps)]) for pixel in pixels]
        sums = [cgutils.alloca_once(builder, _VECTOR) for _ in pixels]  # type: ignore[no-untyped-call, unused-ignore]
        for total in sums:
            builder.store(ir.Constant(_VECTOR, [0.0] * PIXELS), total)
        with cgutils.for_range(builder, taps) as loop:  # type: ignore[no-untyped-call, unused-ignore]
            at = builder.mul(loop.index, number(_CHANNELS))
            for source, weight, total in zip(sources, of_pixels, sums, strict=True):
                colours = builder.load(builder.bitcast(builder.gep(source, [at]), _VECTOR.as_pointer()), align=4)
                factor = all_of(builder.load(builder.gep(weight, [loop.index])))
                builder.store(times_plus(colours, factor, builder.load(total)), total)
        totals = [builder.load(total) for total in sums]
        size = builder.extract_value(out.shape, 2)
        mirrored = builder.sub(builder.sub(size, x), number(PIXELS))
        place = builder.add(builder.mul(y, size), builder.select(mirror, mirrored, x))
        for channel in range(_CHANNELS):
            halves = [shuffled(totals[pixel], totals[pixel + 1], [channel, PIXELS + channel]) for pixel in (0, 2)]
            values = shuffled(halves[0], halves[1], list(range(PIXELS)))
            factor, added = (
                all_of(builder.load(builder.gep(each.data, [number(channel)]))) for each in (scale, offset)
            )
            values = times_plus(values, factor, added)
            values = builder.select(mirror, shuffled(values, values, list(reversed(range(PIXELS)))), values)
            plane = builder.mul(builder.mul(size, size), number(channel))
            target = builder.gep(out.data, [builder.add(plane, place)])
            builder.store(values, builder.bitcast(target, _VECTOR.as_pointer()), align=4)
        return context.get_dummy_value()

    floats = [types.Array(types.float32, dimensions, "C") for dimensions in (1, 2, 3)]
    places = types.Array(types.int64, 1, "C")
    kinds = (floats[0], places, floats[1], types.int64, types.int64, types.boolean, floats[0], floats[0], floats[2])
    return types.void(*kinds), generate


weigh_pixels: Any = intrinsic(_weigh_pixels)
"""(row of colours, first source pixel of each result, weights `[size, taps]`, x, y, mirror, scale, offset, out `[3, size, size]`): the
results x to x + PIXELS - 1 of row y, from the last on where it is mirrored. Beyond the last source pixel, `row` has one value more."""
