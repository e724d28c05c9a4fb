"""Codecs of a `tensor` field: one record is one chunk, and its bytes are the same in HDF5 and in Zarr.

`blosc-lz4`  a Blosc 1 frame: HDF5 filter 32001 and Zarr v3's core codec `blosc`; shuffled by bytes or by bits.
`zstd`       a Zstandard frame (RFC 8878): HDF5 filter 32015 and Zarr's codec `zstd`.
`lz4`        HDF5 filter 32004, which Zarr has not: u64be size, u32be block size, then for each block u32be size and an LZ4
             block. Blocks are equally long and never stored raw, so that a GPU can inflate them as they are.
"""

import ctypes
import functools
import math
import struct
from typing import Literal, TypeAlias

import lz4.block
import numcodecs.blosc
import numcodecs.zstd
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from .checksums import Buffer
from .errors import ChecksumError, StageinError, UsageError

CodecName = Literal["blosc-lz4", "lz4", "zstd"]
WORTHWHILE_RATIO = 1.15
"""Below this, decoding costs more than the bytes it saves."""

_BLOSC_LEVEL = 5
_ZSTD_LEVEL = 3
_LZ4_BLOCK_BYTES = 65536
_SHUFFLES = {"byte": 1, "bit": 2}

BLOSC, ZSTD, LZ4 = 1, 2, 3
"""What kernels know the codecs by."""
_KERNEL_NUMBERS: dict[CodecName, int] = {"blosc-lz4": BLOSC, "zstd": ZSTD, "lz4": LZ4}

WORK_BYTES = 1 << 20
"""Of memory that a kernel needs to decode, of whatever codec. Blocks of Blosc frames that it takes itself are at most as large: they
stay in the second-level cache."""

numcodecs.blosc.use_threads = False  # its own threads serialise ours, and its global state is not safe among them


class Codec(BaseModel):
    """How the records of a field are compressed. `shuffle` is Blosc's, by bytes or by bits of the elements."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: CodecName
    shuffle: Literal["byte", "bit"] | None = None

    @property
    def kernel_number(self) -> int:
        """What kernels know this codec by."""
        return _KERNEL_NUMBERS[self.name]

    def hdf5_filter(self, itemsize: int, record_bytes: int) -> tuple[int, tuple[int, ...]]:
        """Registered number and parameters of the HDF5 filter."""
        if self.name == "blosc-lz4":
            return 32001, (2, 2, itemsize, record_bytes, _BLOSC_LEVEL, _SHUFFLES[self.shuffle or "byte"], 1)
        if self.name == "zstd":
            return 32015, (_ZSTD_LEVEL,)
        return 32004, (lz4_block_bytes(record_bytes),)

    def zarr_codec(self, itemsize: int) -> dict[str, object]:
        """The codec in a Zarr v3 metadata document."""
        if self.name == "zstd":
            return {"name": "zstd", "configuration": {"level": _ZSTD_LEVEL, "checksum": False}}
        shuffle = "bitshuffle" if self.shuffle == "bit" else "shuffle"
        configuration = {
            "cname": "lz4",
            "clevel": _BLOSC_LEVEL,
            "shuffle": shuffle,
            "typesize": itemsize,
            "blocksize": 0,
        }
        return {"name": "blosc", "configuration": configuration}

    def encode(self, record: Buffer, itemsize: int) -> bytes:
        """The stored bytes of one record."""
        if self.name == "blosc-lz4":
            shuffle = _SHUFFLES[self.shuffle or "byte"]
            return bytes(numcodecs.blosc.compress(record, b"lz4", _BLOSC_LEVEL, shuffle, 0, itemsize))
        if self.name == "zstd":
            return bytes(numcodecs.zstd.compress(record, _ZSTD_LEVEL))
        return _encode_lz4(memoryview(record).cast("B"))

    def decode_into(self, stored: NDArray[np.uint8], record: NDArray[np.uint8]) -> None:
        """Fill `record` with the bytes that `stored` stands for; other threads run meanwhile.

        Raises ChecksumError when `stored` is not what `encode` makes of a record of this size.
        """
        try:
            if self.name == "lz4":
                _decode_lz4_into(stored, record)
                return
            _refuse_other_size(self.name, stored, record)
            (numcodecs.blosc if self.name == "blosc-lz4" else numcodecs.zstd).decompress(stored, record)
        except (RuntimeError, ValueError, struct.error) as error:
            raise ChecksumError(f"a {self.name} chunk cannot be decoded ({error}): it is damaged") from None


CodecChoice: TypeAlias = Codec | Literal["auto"] | None
"""A codec, none, or whichever a trial finds best."""


def parse_codec(text: str) -> CodecChoice:
    """What is called auto, none, zstd, lz4, blosc-lz4 (shuffled by bytes) or blosc-lz4:bit. Raises UsageError."""
    codecs: dict[str, CodecChoice] = {
        "auto": "auto",
        "none": None,
        "zstd": Codec(name="zstd"),
        "lz4": Codec(name="lz4"),
        "blosc-lz4": Codec(name="blosc-lz4", shuffle="byte"),
        "blosc-lz4:bit": Codec(name="blosc-lz4", shuffle="bit"),
    }
    if text not in codecs:
        raise UsageError(f"the codec {text!r} is not known: take one of {', '.join(codecs)}")
    return codecs[text]


def lz4_block_bytes(record_bytes: int) -> int:
    """The largest block of at most 64 KiB that divides a record: all its blocks are then equally long."""
    if record_bytes <= _LZ4_BLOCK_BYTES:
        return record_bytes
    fewest = math.ceil(record_bytes / _LZ4_BLOCK_BYTES)
    return next(
        (record_bytes // blocks for blocks in range(fewest, 64 * fewest) if record_bytes % blocks == 0), record_bytes
    )


def _refuse_other_size(name: str, stored: NDArray[np.uint8], record: NDArray[np.uint8]) -> None:
    """The libraries trust the size in a frame; a damaged one must not write past the record."""
    if name == "blosc-lz4":
        if len(stored) < 16:
            raise ValueError("it is shorter than a Blosc header")
        nbytes, _, stored_bytes = struct.unpack_from("<III", stored, 4)
        if nbytes != len(record) or stored_bytes != len(stored):
            raise ValueError(f"it says {nbytes} bytes in {stored_bytes}, not {len(record)} in {len(stored)}")
    elif (nbytes := _zstd_content_bytes(stored)) != len(record):  # the library fills a part and says nothing
        raise ValueError(f"it says {nbytes} bytes, not {len(record)}")


def _zstd_content_bytes(stored: NDArray[np.uint8]) -> int | None:
    """The size of its content that a Zstandard frame names (RFC 8878, section 3.1.1.1), None for one that does not."""
    header = stored[:18].tobytes()
    if header[:4] != b"\x28\xb5\x2f\xfd" or len(header) < 6:
        raise ValueError("it is no Zstandard frame")
    size_flag, is_single_segment, dictionary_flag = header[4] >> 6, header[4] >> 5 & 1, header[4] & 3
    width = (is_single_segment, 2, 4, 8)[size_flag]
    start = 5 + (1 - is_single_segment) + (0, 1, 2, 4)[dictionary_flag]
    if not width or len(header) < start + width:
        return None
    return int.from_bytes(header[start : start + width], "little") + (256 if width == 2 else 0)


def _encode_lz4(record: memoryview) -> bytes:
    block_bytes = lz4_block_bytes(len(record))
    parts = [struct.pack(">QI", len(record), block_bytes)]
    for start in range(0, len(record), block_bytes):
        block = _encode_lz4_block(record[start : start + block_bytes])
        parts += [struct.pack(">I", len(block)), block]
    return b"".join(parts)


def _encode_lz4_block(block: memoryview) -> bytes:
    """LZ4 of one block, never exactly as long as the block: readers take that for one stored raw."""
    for acceleration in (1, 2, 4, 8, 16, 64):
        encoded: bytes = lz4.block.compress(block, mode="fast", acceleration=acceleration, store_size=False)
        if len(encoded) != len(block):
            return encoded
    raise StageinError(f"an LZ4 block of {len(block)} bytes stays as long as it is: choose another codec")


@functools.cache
def _lz4_decompress() -> "ctypes._NamedFuncPointer":
    """LZ4_decompress_safe of the library inside the lz4 wheel: unlike the Python function it takes a destination, and
    ctypes lets other threads run."""
    function = ctypes.CDLL(lz4.block._block.__file__).LZ4_decompress_safe
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
    function.restype = ctypes.c_int
    return function


def _decode_lz4_into(stored: NDArray[np.uint8], record: NDArray[np.uint8]) -> None:
    decompress = _lz4_decompress()
    total, block_bytes = struct.unpack_from(">QI", stored, 0)
    if total != len(record) or (total and not 0 < block_bytes <= total):
        raise ValueError(f"it says {total} bytes in blocks of {block_bytes}, not {len(record)}")
    source, target, position = stored.ctypes.data, record.ctypes.data, 12
    for start in range(0, total, block_bytes or 1):
        (nbytes,) = struct.unpack_from(">I", stored, position)
        position += 4
        room = min(block_bytes, total - start)
        if position + nbytes > len(stored):
            raise ValueError(f"it ends within the block at byte {position}")
        if nbytes == room:  # stored raw: not by us, but other writers of the filter do that
            record[start : start + room] = stored[position : position + nbytes]
        elif decompress(source + position, target + start, nbytes, room) != room:
            raise ValueError(f"the block at byte {position} is no LZ4 block of {room} bytes")
        position += nbytes
    if position != len(stored):
        raise ValueError(f"{len(stored) - position} bytes follow its last block")
