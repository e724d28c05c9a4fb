"""Blosc 1 frames of LZ4, shuffled by bytes: what `blosc-lz4` is unless asked for otherwise.

The library shuffles 16 or 32 bytes at a time and through memory of its own; here each block's planes are put together once,
by vectors as wide as the processor has, and planes that are stored raw are taken from where they are. Any other frame goes to
the library. The format: README_CHUNK_FORMAT.rst of c-blosc 1.21.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from .codecs import WORK_BYTES
from .native import kernel, signed
from .native_calls import blosc_decompress, lz4_decompress, memcpy

_HEADER_BYTES = 16
_SHUFFLED, _FLAGS_OF_OTHERS = 0x01, 0x0E
_FORMAT_VERSION = 2
_ONE_STREAM = 0x10
_LZ4_FLAGS = 1
_FEWEST_BYTES_OF_A_STREAM = 128
_LINE_BYTES = 64


@kernel
def decode_blosc(stored: NDArray[np.uint8], record: NDArray[np.uint8], planes: NDArray[np.uint8]) -> bool:
    """Fill `record` with what `stored` stands for; False when that is not a record of this size, or not all of `stored`.

    planes  memory to work in, WORK_BYTES.
    """
    blocks = own_blocks(stored, record)
    if blocks <= 0:
        return blocks == 0 and decode_by_library(stored, record)
    good = 0
    while good < blocks and decode_block(stored, good, record, planes):
        good += 1
    return good == blocks


@kernel
def own_blocks(stored: NDArray[np.uint8], record: NDArray[np.uint8]) -> int:
    """How many blocks a frame has that `decode_block` takes; 0: it is for the library; below: it is no record of this size, or not all of
    `stored`."""
    # Sizes first: the library trusts them.
    if len(stored) < _HEADER_BYTES or little_endian_32(stored, 4) != len(record):
        return -1
    if little_endian_32(stored, 12) != len(stored) or stored[0] != _FORMAT_VERSION:
        return -1
    flags, itemsize, block_bytes = signed(stored[2]), signed(stored[3]), little_endian_32(stored, 8)
    is_ours = flags & (_SHUFFLED | _FLAGS_OF_OTHERS) == _SHUFFLED and flags >> 5 == _LZ4_FLAGS
    if not is_ours or itemsize not in (2, 4, 8) or not 0 < block_bytes <= WORK_BYTES:
        return 0
    blocks = (len(record) + block_bytes - 1) // block_bytes
    return blocks if len(stored) >= _HEADER_BYTES + 4 * blocks else -1


@kernel
def decode_by_library(stored: NDArray[np.uint8], record: NDArray[np.uint8]) -> bool:
    """Fill `record` by c-blosc; False when it finds `stored` damaged."""
    made = blosc_decompress(stored.ctypes.data, record.ctypes.data, len(record), 1)
    return signed(made) == len(record)


@kernel
def decode_block(stored: NDArray[np.uint8], number: int, record: NDArray[np.uint8], planes: NDArray[np.uint8]) -> bool:
    """Fill block `number` of a record, of a frame with `own_blocks`; False when it is damaged."""
    flags, itemsize, block_bytes = signed(stored[2]), signed(stored[3]), little_endian_32(stored, 8)
    start = number * block_bytes
    block = record[start : min(start + block_bytes, len(record))]
    is_split = (
        flags & _ONE_STREAM == 0 and len(block) == block_bytes and block_bytes // itemsize >= _FEWEST_BYTES_OF_A_STREAM
    )
    position = little_endian_32(stored, _HEADER_BYTES + 4 * number)
    return _decode_streams(stored, position, itemsize if is_split else 1, itemsize, block, planes)


@kernel
def _decode_streams(
    stored: NDArray[np.uint8], position: int, streams: int, itemsize: int, block: NDArray[np.uint8], planes: NDArray[np.uint8]
) -> bool:  # fmt: skip
    """Fill `block` from the streams of LZ4 at `position`, equally long, which together are its planes one after the other."""
    stream_bytes = len(block) // streams
    for start in range(0, stream_bytes * streams, stream_bytes):
        if position + 4 > len(stored):
            return False
        nbytes = little_endian_32(stored, position)
        position += 4
        if position + nbytes > len(stored):
            return False
        if nbytes == stream_bytes:  # stored raw
            memcpy(planes.ctypes.data + start, stored.ctypes.data + position, nbytes)
        elif (
            lz4_decompress(stored.ctypes.data + position, planes.ctypes.data + start, nbytes, stream_bytes)
            != stream_bytes
        ):
            return False
        position += nbytes
    items = len(block) // itemsize
    shuffled = items * itemsize
    if itemsize == 2:
        _join_planes(2, planes.ctypes.data, items, block.ctypes.data)  # type: ignore[call-arg, unused-ignore]
    elif itemsize == 4:
        _join_planes(4, planes.ctypes.data, items, block.ctypes.data)  # type: ignore[call-arg, unused-ignore]
    else:
        _join_planes(8, planes.ctypes.data, items, block.ctypes.data)  # type: ignore[call-arg, unused-ignore]
    memcpy(block.ctypes.data + shuffled, planes.ctypes.data + shuffled, len(block) - shuffled)
    return True


@intrinsic
def _join_planes(context: Any, itemsize: Any, planes: Any, items: Any, target: Any) -> Any:
    """Byte `plane` of item `i` at `target` is byte `i` of the plane, of as many bytes as there are items, that lie one behind the
    other from the address `planes` on."""
    if not isinstance(itemsize, types.IntegerLiteral):
        return None  # numba asks again with the constant
    return types.void(itemsize, types.intp, types.intp, types.intp), _join_planes_code


def _join_planes_code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """Items before and behind the cache lines that lie in the target are put together one by one, lines by vectors and past the caches:
    what is written is more than they hold, and would be read first to be changed there."""
    _, planes, items, target = arguments
    itemsize = signature.args[0].literal_value
    word, item_type = planes.type, ir.IntType(8 * itemsize)

    def join(first: Any, count: int) -> Any:
        """The items from `first` on, as a vector of `count` items (1: as an item)."""
        in_type = ir.VectorType(ir.IntType(8), count) if count > 1 else ir.IntType(8)
        out_type = ir.VectorType(item_type, count) if count > 1 else item_type
        joined = None
        for plane in range(itemsize):
            place = builder.add(builder.add(planes, first), builder.mul(items, word(plane)))
            loaded = builder.load(builder.inttoptr(place, in_type.as_pointer()), align=1)
            shift = [8 * plane] * count if count > 1 else 8 * plane
            part = builder.shl(builder.zext(loaded, out_type), ir.Constant(out_type, shift))
            joined = part if joined is None else builder.or_(joined, part)
        return joined

    def store(first: Any, count: int) -> None:
        joined = join(first, count)
        place = builder.add(target, builder.mul(first, word(itemsize)))
        pointer = builder.inttoptr(place, joined.type.as_pointer())
        stored = builder.store(joined, pointer, align=_LINE_BYTES if count > 1 else 1)
        if count > 1:
            stored.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))

    line_items = _LINE_BYTES // itemsize
    to_line = builder.lshr(builder.and_(builder.neg(target), word(_LINE_BYTES - 1)), word(itemsize.bit_length() - 1))
    is_aligned = builder.icmp_signed("==", builder.and_(target, word(itemsize - 1)), word(0))
    starts_late = builder.icmp_signed("<", to_line, items)
    before = builder.select(builder.and_(is_aligned, starts_late), to_line, items)
    lines = builder.udiv(builder.sub(items, before), word(line_items))
    behind = builder.add(before, builder.mul(lines, word(line_items)))
    with cgutils.for_range(builder, before) as loop:
        store(loop.index, 1)
    with cgutils.for_range(builder, lines) as loop:
        store(builder.add(before, builder.mul(loop.index, word(line_items))), line_items)
    with cgutils.for_range(builder, items, start=behind) as loop:
        store(loop.index, 1)
    builder.fence("seq_cst")  # stores past the caches are not in order with later ones by themselves
    return context.get_dummy_value()


@kernel
def little_endian_32(content: NDArray[np.uint8], at: int) -> int:
    return (
        signed(content[at])
        | signed(content[at + 1]) << 8
        | signed(content[at + 2]) << 16
        | signed(content[at + 3]) << 24
    )
