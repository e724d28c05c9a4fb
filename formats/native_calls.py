"""C functions that kernels call: of the C library, of the libraries inside the wheels of our sums and codecs, and one of ours.

Compiled code knows a function by its name, which is looked up when the code is loaded: kernels that call it can be kept on
disk. Import this where kernels are used: numba takes half a second to load.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import folded_crc32c, native_symbols

_ADDRESS = _SIZE = types.intp


def _of_c_library(name: str, result: Any, *arguments: Any) -> Any:
    return types.ExternalFunction(name, result(*arguments))


def _of_wheel(name: str, result: Any, *arguments: Any) -> Any:
    """A function of a library inside a wheel."""
    name = native_symbols.PREFIX + name
    return _at_address(native_symbols.address_of(name), name, result, *arguments)


def _at_address(address: int, name: str, result: Any, *arguments: Any) -> Any:
    llvmlite.binding.add_symbol(name, address)
    return types.ExternalFunction(name, result(*arguments))


errno_location = _of_c_library("__errno_location", types.CPointer(types.int32))  # type: ignore[no-untyped-call]

pread = _of_c_library("pread", types.intp, types.int32, _ADDRESS, _SIZE, types.int64)
"""(descriptor, buffer, nbytes, offset) -> bytes read, or -1."""

memcpy = _of_c_library("memcpy", _ADDRESS, _ADDRESS, _ADDRESS, _SIZE)
"""(target, source, nbytes) -> target. Many times as fast as an assignment to a slice, which numba does one by one."""

preadv2 = _of_c_library("preadv2", types.intp, types.int32, _ADDRESS, types.int32, types.int64, types.int32)
"""(descriptor, array of pairs of address and nbytes, pairs, offset, flags) -> bytes read, or -1."""

mincore = _of_c_library("mincore", types.int32, _ADDRESS, _SIZE, types.CPointer(types.uint8))  # type: ignore[no-untyped-call]
"""(address of a page in a memory map, nbytes, array of a byte a page) -> 0, or -1. Bit 0 of a byte: the page is in memory."""

madvise = _of_c_library("madvise", types.int32, _ADDRESS, _SIZE, types.int32)
"""(address of a page in a memory map, nbytes, advice) -> 0, or -1."""

lseek = _of_c_library("lseek", types.int64, types.int32, types.int64, types.int32)
"""(descriptor, offset, what it counts from) -> the new place in the file, or -1."""

posix_fadvise = _of_c_library("posix_fadvise", types.int32, types.int32, types.int64, types.int64, types.int32)
"""(descriptor, offset, nbytes, advice) -> 0, or an error number."""

openat = _of_c_library("openat", types.int32, types.int32, _ADDRESS, types.int32)
"""(descriptor of a folder, path that ends in a zero byte, flags) -> descriptor, or -1."""

close = _of_c_library("close", types.int32, types.int32)
"""(descriptor) -> 0, or -1."""

clock_gettime = _of_c_library("clock_gettime", types.int32, types.int32, _ADDRESS)
"""(clock, address of seconds and nanoseconds) -> 0, or -1."""

sched_yield = _of_c_library("sched_yield", types.int32)
"""() -> 0: other threads that wait for this processor come first."""

sem_post = _of_c_library("sem_post", types.int32, _ADDRESS)
"""(address of a semaphore) -> 0, or -1. One thread that waits for it, now or next, goes on."""

sem_getvalue = _of_c_library("sem_getvalue", types.int32, _ADDRESS, _ADDRESS)
"""(address of a semaphore, where to put an int: how many threads can go on at once) -> 0, or -1."""

sem_wait = _of_c_library("sem_wait", types.int32, _ADDRESS)
"""(address of a semaphore) -> 0, or -1 where a signal came."""

usleep = _of_c_library("usleep", types.int32, types.uint32)
"""(microseconds) -> 0."""

_CRC32C, _CRC32C_COPY, _CRC32C_STREAM = (
    native_symbols.PREFIX + name for name in ("crc32c_extend", "crc32c_copy", "crc32c_stream")
)
_crc32c_signature = (types.uint32, types.uint32, _ADDRESS, _SIZE)
GENERATED: dict[str, Callable[[], str]] = {}
"""What makes the LLVM IR of each function that is ours, by name."""
crc32c_copy = crc32c_stream = None
"""(sum of what comes before, data, nbytes, where to copy the data) -> sum of both; for processors that do it in one go. The
second copies past the caches."""
if _widths := folded_crc32c.vector_widths():
    GENERATED = {
        _CRC32C: partial(folded_crc32c.assembly, _CRC32C, _widths[0]),
        _CRC32C_COPY: partial(folded_crc32c.assembly, _CRC32C_COPY, _widths[0], copies=True),
        _CRC32C_STREAM: partial(folded_crc32c.assembly, _CRC32C_STREAM, _widths[0], copies=True, streams=True),
    }
    crc32c_extend = _at_address(folded_crc32c.function_address(_widths[0]), _CRC32C, *_crc32c_signature)
    crc32c_copy = _at_address(
        folded_crc32c.copying_function_address(_widths[0]), _CRC32C_COPY, *_crc32c_signature, _ADDRESS
    )
    crc32c_stream = _at_address(
        folded_crc32c.streaming_function_address(_widths[0]), _CRC32C_STREAM, *_crc32c_signature, _ADDRESS
    )
else:
    crc32c_extend = _of_wheel("crc32c_extend", *_crc32c_signature)
"""(sum of what comes before, data, nbytes) -> sum of both."""

pwrite = _of_c_library("pwrite", types.intp, types.int32, _ADDRESS, _SIZE, types.int64)
"""(descriptor, buffer, nbytes, offset) -> bytes written, or -1."""

pwritev = _of_c_library("pwritev", types.intp, types.int32, _ADDRESS, types.int32, types.int64)
"""(descriptor, array of pairs of address and nbytes, pairs, offset) -> bytes written, or -1."""

sync_file_range = _of_c_library("sync_file_range", types.int32, types.int32, types.int64, types.int64, types.uint32)
"""(descriptor, offset, nbytes, flags) -> 0, or -1."""

xxh3_create = _of_wheel("XXH3_createState", _ADDRESS)
"""() -> state of a sum, 0 without memory."""

xxh3_free = _of_wheel("XXH3_freeState", types.int32, _ADDRESS)

xxh3_reset = _of_wheel("XXH3_128bits_reset", types.int32, _ADDRESS)
"""(state) -> 0: the sum of nothing yet."""

xxh3_update = _of_wheel("XXH3_128bits_update", types.int32, _ADDRESS, _ADDRESS, _SIZE)
"""(state, data, nbytes) -> 0."""

_of_wheel("XXH3_128bits_digest", types.void, _ADDRESS)


@intrinsic
def _xxh3_digest(context: Any, state: Any) -> Any:
    """ExternalFunction has no results that are a structure of C."""

    def call(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.LiteralStructType((word, word)), (word,))
        function = cgutils.get_or_insert_function(builder.module, kind, f"{native_symbols.PREFIX}XXH3_128bits_digest")  # type: ignore[no-untyped-call, unused-ignore]
        halves = builder.call(function, arguments)
        return context.make_tuple(builder, signature.return_type, [builder.extract_value(halves, at) for at in (0, 1)])

    return types.UniTuple(types.uint64, 2)(types.intp), call  # type: ignore[no-untyped-call, unused-ignore]


xxh3_digest: Any = _xxh3_digest
"""(state) -> lower and upper half of the sum."""

blosc_decompress = _of_wheel("blosc_decompress_ctx", types.int32, _ADDRESS, _ADDRESS, _SIZE, types.int32)
"""(frame, target, room, threads) -> bytes made, or a negative number. It trusts the size that the frame states."""

zstd_decompress = _of_wheel("ZSTD_decompress", _SIZE, _ADDRESS, _SIZE, _ADDRESS, _SIZE)
"""(target, room, frame, nbytes of the frame) -> bytes made, or a negative number."""

lz4_decompress = _of_wheel("LZ4_decompress_safe", types.int32, _ADDRESS, _ADDRESS, types.int32, types.int32)
"""(block, target, nbytes of the block, room) -> bytes made, or a negative number."""
