"""crc32c by carry-less multiplication, several times as fast as the processor's own instruction for it.

The sum is the remainder of a polynomial over GF(2). Blocks of four vectors are folded onto the next, multiplied by what
moves them there modulo the polynomial, until one vector is left that has the remainder of all (Gopal et al., "Fast CRC
Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel 2009). The instructions are VPCLMULQDQ: of Intel since
Ice Lake, of AMD since Zen 3. Other processors sum as `google_crc32c` does.
"""

from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .native import kernel
from .native_calls import crc32c_extend as extend_by_bytes

_POLYNOMIAL = 0x1EDC6F41
"""Castagnoli's, without x^32 (RFC 3720, section 12.1)."""
_VECTORS = 4
"""In flight at a time: a multiplication takes about four cycles."""
_WORTHWHILE_BLOCKS = 2
_ALL_ONES = np.uint32(0xFFFFFFFF)
"""What a sum is before and after its state: `extend_by_bytes` adds it on both sides."""


def _words_of_a_vector() -> int:
    """Words of 64 bits that this processor multiplies at a time, 0 where it cannot do it."""
    features = llvmlite.binding.get_host_cpu_features()
    if not features.get("vpclmulqdq"):
        return 0
    return 8 if features.get("avx512f") else 4


_WORDS = _words_of_a_vector()


@intrinsic
def _fold_blocks(context: Any, words: Any, state: Any, address: Any, blocks: Any, target: Any) -> Any:
    """At `target` one vector that has the remainder of so many blocks, the first of them added to the state of a sum."""
    if not isinstance(words, types.IntegerLiteral):
        return None  # numba asks again with the constant
    return types.void(words, types.uint32, types.intp, types.intp, types.intp), _fold_blocks_code


def _fold_blocks_code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    _, state, address, blocks, target = arguments
    words = signature.args[0].literal_value
    vector_type, word_type = ir.VectorType(ir.IntType(64), words), ir.IntType(64)
    block_bytes = _VECTORS * words * 8
    multiply = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call, unused-ignore]
        builder.module,
        ir.FunctionType(vector_type, [vector_type, vector_type, ir.IntType(8)]),
        f"llvm.x86.pclmulqdq.{64 * words}",
    )

    def moved(vector: Any, bits: int) -> Any:
        """Each 128 bits, times x^bits modulo the polynomial. The product of two reversed words is one bit short: hence -1."""
        factors = ir.Constant(vector_type, [_power(bits + 64 - 1), _power(bits - 1)] * (words // 2))
        halves = (builder.call(multiply, [vector, factors, ir.IntType(8)(which)]) for which in (0x00, 0x11))
        return builder.xor(*halves)

    def load(block: Any, number: int) -> Any:
        offset = builder.add(builder.mul(block, word_type(block_bytes)), word_type(number * words * 8))
        return builder.load(builder.inttoptr(builder.add(address, offset), vector_type.as_pointer()), align=1)

    sums = []
    for number in range(_VECTORS):
        sums.append(cgutils.alloca_once_value(builder, load(word_type(0), number)))  # type: ignore[no-untyped-call, unused-ignore]
    seed = builder.insert_element(vector_type([0] * words), builder.zext(state, word_type), ir.IntType(32)(0))
    builder.store(builder.xor(builder.load(sums[0]), seed), sums[0])
    with cgutils.for_range(builder, blocks, start=word_type(1)) as loop:
        for number, place in enumerate(sums):
            folded = moved(builder.load(place), 8 * block_bytes)
            builder.store(builder.xor(folded, load(loop.index, number)), place)
    total = builder.load(sums[0])
    for place in sums[1:]:
        total = builder.xor(moved(total, 64 * words), builder.load(place))
    builder.store(total, builder.inttoptr(target, vector_type.as_pointer()), align=1)
    return context.get_dummy_value()


def _power(exponent: int) -> int:
    """x^exponent modulo the polynomial, as 64 bits of which the lowest is the coefficient of x^63."""
    remainder = 1
    for _ in range(exponent):
        remainder <<= 1
        if remainder >> 32:
            remainder ^= 1 << 32 | _POLYNOMIAL
    return int(f"{remainder:064b}"[::-1], 2)


@kernel
def extend_by_vectors(before: np.uint32, address: int, nbytes: int) -> Any:
    vector_bytes = 8 * _WORDS
    block_bytes = _VECTORS * vector_bytes
    blocks = nbytes // block_bytes
    if blocks < _WORTHWHILE_BLOCKS:
        return extend_by_bytes(before, address, nbytes)
    remainder = np.empty(vector_bytes, np.uint8)
    _fold_blocks(_WORDS, np.uint32(before) ^ _ALL_ONES, address, blocks, remainder.ctypes.data)  # type: ignore[call-arg, unused-ignore]
    found = extend_by_bytes(_ALL_ONES, remainder.ctypes.data, vector_bytes)
    done = blocks * block_bytes
    return extend_by_bytes(found, address + done, nbytes - done)


crc32c_extend = extend_by_vectors if _WORDS else extend_by_bytes
"""(sum of what comes before, address, nbytes) -> sum of both."""
