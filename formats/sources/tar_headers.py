"""The members of a tar archive and where their bytes lie, from its headers alone.

Python's tarfile is no help here: it takes a damaged header after the first for the end of the archive.
Sources: POSIX.1-2017 pax, "ustar Interchange Format" and "pax Extended Header"; GNU tar manual, "Basic Tar Format".
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

_BLOCK_BYTES = 512
_MAX_EXTENSION_BYTES = 1 << 20
_READ_BYTES = 1 << 20

_PLAIN_FILE = b"0\x007"
_WITHOUT_DATA = b"123456"  # links, devices, directories, FIFOs: a size they give is not followed by data
_DIRECTORY = ord("5")
_GNU_LONG_NAME, _GNU_LONG_LINK, _GNU_SPARSE = b"LKS"
_PAX_NEXT, _PAX_GLOBAL = b"xg"
_EXTENSIONS = b"LKxg"


class BadTarError(ValueError):
    """What follows in this archive cannot be trusted; the text says why, without naming the archive."""


class TarMember(NamedTuple):
    """A member of an archive; `nbytes` bytes from `offset` in the archive on are its content if it `is_file`."""

    name: str
    offset: int
    nbytes: int
    is_file: bool


def read_members(descriptor: int, archive_bytes: int) -> Iterator[TarMember]:
    """All members but directories, in their order: ustar, pax and GNU archives, uncompressed.

    Raises BadTarError at the first thing that is no complete member, OSError as the file system does.
    """
    position = 0
    pax_global: dict[str, str] = {}
    pax_next: dict[str, str] = {}
    while True:
        header = os.pread(descriptor, _BLOCK_BYTES, position)
        if len(header) < _BLOCK_BYTES:
            raise BadTarError(f"truncated: it ends at byte {archive_bytes} without the zeros that end an archive")
        if not any(header):
            _check_end(descriptor, position, archive_bytes)
            return
        _check_sum(header, position)
        kind = header[156]
        said = {} if kind in _EXTENSIONS else pax_global | pax_next
        name = said.get("path") or _name(header)
        nbytes = _number(said["size"].encode(), 10, position) if "size" in said else _size(header, position)
        offset = position + _BLOCK_BYTES
        stored = 0 if kind in _WITHOUT_DATA else nbytes
        if offset + stored > archive_bytes:
            raise BadTarError(f"truncated: it ends within {name}")
        position = offset + -(-stored // _BLOCK_BYTES) * _BLOCK_BYTES
        if kind in (_PAX_NEXT, _PAX_GLOBAL):
            records = _pax_records(_extension(descriptor, offset, nbytes))
            if kind == _PAX_NEXT:
                pax_next |= records
            else:
                pax_global |= records
        elif kind == _GNU_LONG_NAME:
            pax_next["path"] = _text(_extension(descriptor, offset, nbytes).partition(b"\0")[0])
        elif kind != _GNU_LONG_LINK:
            if kind == _GNU_SPARSE or any(word.startswith("GNU.sparse.") for word in said):
                raise BadTarError(f"{name} is stored as a sparse file: pack the archive without --sparse")
            pax_next = {}
            if kind != _DIRECTORY and not name.endswith("/"):
                yield TarMember(name, offset, nbytes, kind in _PLAIN_FILE)


def _check_end(descriptor: int, position: int, archive_bytes: int) -> None:
    """Archives that were simply concatenated would lose all but the first."""
    while rest := os.pread(descriptor, _READ_BYTES, position):
        if any(rest):
            raise BadTarError(
                f"more follows its end, after byte {position} of {archive_bytes}: is it several archives in one?"
            )
        position += len(rest)


def _check_sum(header: bytes, position: int) -> None:
    with_blank_sum = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if _number(header[148:156], 8, position) != with_blank_sum:
        raise BadTarError(f"damaged: the 512 bytes at {position} are no header of a member")


def _size(header: bytes, position: int) -> int:
    field = header[124:136]
    if field[0] == 0x80:  # GNU: binary, for sizes that eleven octal digits cannot say
        return int.from_bytes(field[1:], "big")
    return _number(field, 8, position)


def _number(field: bytes, base: int, position: int) -> int:
    digits = field.strip(b" \0")
    if digits and not digits.isdigit():
        raise BadTarError(f"damaged: {digits!r} is no number in the header at byte {position}")
    try:
        return int(digits or b"0", base)
    except ValueError:
        raise BadTarError(f"damaged: {digits!r} is no number in the header at byte {position}") from None


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _extension(descriptor: int, offset: int, nbytes: int) -> bytes:
    if nbytes > _MAX_EXTENSION_BYTES:
        raise BadTarError(f"damaged: an extended header of {nbytes} bytes at byte {offset}")
    return os.pread(descriptor, nbytes, offset)


def _pax_records(content: bytes) -> dict[str, str]:
    """The keywords of a pax header: lines of `LENGTH KEYWORD=VALUE\\n`, where LENGTH counts the whole line."""
    records: dict[str, str] = {}
    while content:
        digits, space, _ = content[:20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        line, content = content[:length], content[length:]
        keyword, equals, value = line[len(digits) + 1 : -1].partition(b"=")
        if not (space and equals and len(line) == length and line.endswith(b"\n")):
            raise BadTarError("damaged: a pax header is not made of lines LENGTH KEYWORD=VALUE")
        records[_text(keyword)] = _text(value)
    return records


def _text(name: bytes) -> str:
    return name.decode("utf-8", errors="backslashreplace")
