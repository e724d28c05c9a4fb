"""Putting machine code into memory: the object file (ELF, x86-64) of a kernel, as `native_compiler` makes it.

It is compiled for the large code model, in which every address is a whole word, filled in here. So it needs no linker, and code and
constants may lie anywhere.
"""

import ctypes
import functools
import mmap
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

_HEADER = struct.Struct("<40xQ10xHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")
_SYMBOLS, _RELOCATIONS, _UNWINDING = 2, 4, 0x70000001
"""Kinds of sections; the last is about exceptions, and kernels have none."""
_WRITABLE, _IN_MEMORY = 1, 2
_ELSEWHERE = 0
"""The section of what is not in this file."""
_WHOLE_WORD = 1
"""The relocation R_X86_64_64."""


def load(content: bytes, entry: str, address_of: Callable[[str], int]) -> int:
    """Where the function `entry` of this object file is, once its code is in memory.

    address_of  where a function is that the code calls, by its name.
    """
    return _ObjectFile(content).load(entry, address_of)


class _Section(NamedTuple):
    name: int
    kind: int
    flags: int
    address: int
    offset: int
    nbytes: int
    link: int
    info: int
    alignment: int
    entry_bytes: int


class _Symbol(NamedTuple):
    name: int
    info: int
    other: int
    section: int
    value: int
    nbytes: int


class _ObjectFile:
    def __init__(self, content: bytes) -> None:
        self._content = content
        start, section_bytes, count, _ = _HEADER.unpack_from(content)
        places = range(start, start + count * section_bytes, section_bytes)
        self._sections = [_Section(*_SECTION.unpack_from(content, place)) for place in places]
        (table,) = (section for section in self._sections if section.kind == _SYMBOLS)
        self._names = self._sections[table.link].offset
        places = range(table.offset, table.offset + table.nbytes, _SYMBOL.size)
        self._symbols = [_Symbol(*_SYMBOL.unpack_from(content, place)) for place in places]

    def load(self, entry: str, address_of: Callable[[str], int]) -> int:
        places, nbytes = self._lay_out()
        memory = mmap.mmap(-1, nbytes, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))

        @functools.cache
        def resolve(symbol: _Symbol) -> int:
            if symbol.section == _ELSEWHERE:
                return address_of(self._name(symbol))
            return base + places[symbol.section] + symbol.value

        for number, place in places.items():
            section = self._sections[number]
            memory[place : place + section.nbytes] = self._content[section.offset : section.offset + section.nbytes]
            for word, symbol, addend in self._relocations(number):
                struct.pack_into("<Q", memory, place + word, resolve(symbol) + addend)
        library = ctypes.CDLL(None, use_errno=True)
        if library.mprotect(ctypes.c_void_p(base), ctypes.c_size_t(nbytes), mmap.PROT_READ | mmap.PROT_EXEC):
            raise OSError(ctypes.get_errno(), "memory cannot be made executable")
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(memory))  # code outlives Python: threads are in it when that ends
        return next(resolve(symbol) for symbol in self._symbols if self._name(symbol) == entry)

    def _lay_out(self) -> tuple[dict[int, int], int]:
        """Where each section of code and constants goes, by its number, and the bytes of all. numba's variables are for Python."""
        places, filled = dict[int, int](), 0
        for number, section in enumerate(self._sections):
            if section.flags & (_IN_MEMORY | _WRITABLE) != _IN_MEMORY or section.kind == _UNWINDING:
                continue
            filled = -(-filled // section.alignment) * section.alignment
            places[number] = filled
            filled += section.nbytes
        return places, filled

    def _relocations(self, number: int) -> Iterator[tuple[int, _Symbol, int]]:
        """The words of section `number` that are addresses: where each is, of what, and what is added to it."""
        for section in self._sections:
            if section.kind != _RELOCATIONS or section.info != number:
                continue
            for place in range(section.offset, section.offset + section.nbytes, _RELOCATION.size):
                word, what, addend = _RELOCATION.unpack_from(self._content, place)
                if what & 0xFFFFFFFF != _WHOLE_WORD:
                    raise ValueError(f"it has a relocation of kind {what & 0xFFFFFFFF}")
                yield word, self._symbols[what >> 32], addend

    def _name(self, symbol: _Symbol) -> str:
        start = self._names + symbol.name
        return self._content[start : self._content.index(b"\0", start)].decode()
