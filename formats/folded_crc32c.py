"""CRC-32C by carry-less multiplication of whole vector registers, where the processor can: by 64 bytes twice as fast as by its
crc32 instruction, by 32 as fast.

The method is that of Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction" (Intel, 2009):
128 bits of a message that stand D bits ahead of others may be added to those, multiplied by x^D mod P; the remainder stays
what it is. Four vectors of such pieces are taken along at once. Memory is slower than that, so a second function copies what it
sums on the way: that takes no longer than copying alone, with either vectors. A third one writes past the caches: what is larger
than they are is copied half as fast again, as memory that is to be written is not read before. The functions are generated as LLVM IR when they are first asked for, in
some 10 ms each: numba has no type for what a vector register holds.
"""

import functools
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

_POLYNOMIAL = 0x82F63B78
"""P of CRC-32C (RFC 3720), with the highest power in the lowest bit, as in all remainders here."""
_INSTRUCTIONS = {64: ("vpclmulqdq", "avx512f", "crc32"), 32: ("vpclmulqdq", "avx2", "crc32")}
"""What vectors of so many bytes take."""
_VECTORS = 4
_FETCH_SOURCE_BYTES, _FETCH_TARGET_BYTES = 4096, 1024
"""So far ahead of where it copies memory is fetched into the caches: the processor itself fetches nothing of the next page."""

_BYTE, _WORD, _QUAD = ir.IntType(8), ir.IntType(32), ir.IntType(64)


def vector_widths() -> list[int]:
    """How many bytes the vectors have that this processor can multiply, the most first; none where it cannot."""
    features = llvm.get_host_cpu_features()
    return [
        width
        for width, instructions in _INSTRUCTIONS.items()
        if all(features.get(name, False) for name in instructions)
    ]


def function_address(vector_bytes: int) -> int:
    """Where the function is that works by vectors of this width:
    uint32 (crc32c of what comes before, address of the data, int64 nbytes) -> crc32c of both."""
    return _compile(vector_bytes)


def copying_function_address(vector_bytes: int) -> int:
    """The same of a function that copies the data, too:
    uint32 (crc32c of what comes before, address of the data, int64 nbytes, address to copy them to) -> crc32c of both."""
    return _compile(vector_bytes, copies=True)


def streaming_function_address(vector_bytes: int) -> int:
    """The same of a function that copies the data to memory past the caches."""
    return _compile(vector_bytes, copies=True, streams=True)


@functools.cache
def _compile(vector_bytes: int, *, copies: bool = False, streams: bool = False) -> int:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=2
    )
    source = assembly(_NAME, vector_bytes, copies=copies, streams=streams)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(source), machine)
    engine.finalize_object()
    _engines.append(engine)
    return int(engine.get_function_address(_NAME))


def assembly(name: str, vector_bytes: int, *, copies: bool = False, streams: bool = False) -> str:
    """The function, under this name, as LLVM IR.

    streams  it copies past the caches.
    """
    return str(_Generator(name, vector_bytes, copies, streams).module)


_NAME = "folded_crc32c"
_engines: list[Any] = []
"""The code lives as long as these."""


class _Generator:
    """Makes `module`, with the function in it."""

    def __init__(self, name: str, vector_bytes: int, copies: bool, streams: bool) -> None:
        self._vector, self._vector_bytes = ir.VectorType(_QUAD, vector_bytes // 8), vector_bytes
        self._streams = streams
        self.module = ir.Module()
        function = ir.Function(self.module, ir.FunctionType(_WORD, (_WORD, *[_QUAD] * (3 if copies else 2))), name)
        self._build = ir.IRBuilder(function.append_basic_block())
        before, data, nbytes, *target = function.args
        self._copies_ahead = [self._build.sub(address, data) for address in target]
        self._stop = self._build.add(data, nbytes)
        start = (data, self._build.not_(before))
        if streams:
            start = tuple(self._while_left(1, self._add_byte, *start, until=self._is_aligned))
        with self._build.if_else(self._is_left(start[0], _VECTORS * self._vector_bytes)) as (is_long, is_short):
            with is_long:
                behind_vectors, long = self._sum_vectors(*start), self._build.block
            with is_short:
                short = self._build.block
        place, state = (
            self._phi((one, short), (other, long)) for one, other in zip(start, behind_vectors, strict=True)
        )
        place, state = self._while_left(_QUAD.width // 8, self._add_quad, place, state)
        place, state = self._while_left(1, self._add_byte, place, state)
        if streams:
            self._build.call(self._intrinsic("llvm.x86.sse.sfence", ir.VoidType()), ())
        self._build.ret(self._build.not_(state))

    def _sum_vectors(self, place: Any, state: Any) -> tuple[Any, Any]:
        """Where the last whole vector ends, and the state there."""
        zeros = ir.Constant(self._vector, [0] * (self._vector_bytes // 8))
        vectors = [self._take(self._vector, place, number * self._vector_bytes) for number in range(_VECTORS)]
        first = self._build.insert_element(zeros, self._build.zext(state, _QUAD), _WORD(0))
        vectors[0] = self._build.xor(vectors[0], first)
        place = self._build.add(place, _QUAD(_VECTORS * self._vector_bytes))
        place, *vectors = self._while_left(_VECTORS * self._vector_bytes, self._add_vectors, place, *vectors)
        total = functools.reduce(lambda total, vector: self._fold(total, self._vector_bytes, vector), vectors)
        place, total = self._while_left(self._vector_bytes, self._add_vectors, place, total)
        pieces = [self._shuffle(total, 2 * number) for number in range(self._vector_bytes // 16)]
        total = functools.reduce(lambda total, piece: self._fold(total, 16, piece), pieces)
        for half in range(2):
            state = self._crc32(
                _QUAD, _WORD(0) if half == 0 else state, self._build.extract_element(total, _WORD(half))
            )
        return place, state

    def _add_vectors(self, place: Any, *vectors: Any) -> list[Any]:
        """The next of as many vectors, each folded into its own: all of them lie so far ahead of the next."""
        ahead = len(vectors) * self._vector_bytes
        return [
            self._fold(vector, ahead, self._take(self._vector, place, number * self._vector_bytes))
            for number, vector in enumerate(vectors)
        ]

    def _add_quad(self, place: Any, state: Any) -> list[Any]:
        return [self._crc32(_QUAD, state, self._take(_QUAD, place))]

    def _add_byte(self, place: Any, state: Any) -> list[Any]:
        return [self._crc32(_BYTE, state, self._take(_BYTE, place))]

    def _fold(self, vector: Any, ahead: int, onto: Any) -> Any:
        """Each 128 bits of `vector` moved `ahead` bytes on, to what lies there.

        Of 128 bits the first 64 are 64 bits further ahead. A product of reflected factors is one bit short, and a constant
        of 32 bits stands 32 powers too high: hence 33.
        """
        factors = [_power(8 * ahead + 64 - 33), _power(8 * ahead - 33)] * (vector.type.count // 2)
        constant = ir.Constant(vector.type, factors)
        bits = 64 * vector.type.count
        name = "llvm.x86.pclmulqdq" + (f".{bits}" if bits > 128 else "")
        multiply = self._intrinsic(name, vector.type, vector.type, vector.type, _BYTE)
        products = [self._build.call(multiply, (vector, constant, _BYTE(halves))) for halves in (0x00, 0x11)]
        return self._build.xor(self._build.xor(*products), onto)

    def _crc32(self, unit: Any, state: Any, value: Any) -> Any:
        """The crc32 instruction: the state behind one more unit."""
        if unit is _BYTE:
            return self._build.call(self._intrinsic("llvm.x86.sse42.crc32.32.8", _WORD, _WORD, _BYTE), (state, value))
        crc32 = self._intrinsic("llvm.x86.sse42.crc32.64.64", _QUAD, _QUAD, _QUAD)
        return self._build.trunc(self._build.call(crc32, (self._build.zext(state, _QUAD), value)), _WORD)

    def _shuffle(self, vector: Any, first: int) -> Any:
        """Two neighbouring elements of a vector."""
        pair = ir.Constant(ir.VectorType(_WORD, 2), [first, first + 1])
        return self._build.shuffle_vector(vector, vector, pair)

    def _take(self, kind: Any, place: Any, offset: int = 0) -> Any:
        """The data of this kind that lie there; they are copied, if this function copies."""
        address = self._build.add(place, _QUAD(offset))
        value = self._build.load(self._build.inttoptr(address, kind.as_pointer()), align=1)
        for ahead in self._copies_ahead:
            target = self._build.add(address, ahead)
            streams = self._streams and kind is self._vector
            align = self._vector_bytes if streams else 1
            store = self._build.store(value, self._build.inttoptr(target, kind.as_pointer()), align=align)
            if streams:
                store.set_metadata("nontemporal", self.module.add_metadata([_WORD(1)]))
            if kind is self._vector:
                self._fetch(self._build.add(address, _QUAD(_FETCH_SOURCE_BYTES)), to_write=False)
                if not streams:
                    self._fetch(self._build.add(target, _QUAD(_FETCH_TARGET_BYTES)), to_write=True)
        return value

    def _fetch(self, address: Any, *, to_write: bool) -> None:
        """Have this memory come into the second-level cache, to be read, or the first, to be written; there may be none."""
        pointer = _BYTE.as_pointer()
        prefetch = self._intrinsic("llvm.prefetch", ir.VoidType(), pointer, _WORD, _WORD, _WORD)
        locality, of_data = _WORD(3 if to_write else 2), _WORD(1)
        self._build.call(prefetch, (self._build.inttoptr(address, pointer), _WORD(int(to_write)), locality, of_data))

    def _while_left(
        self,
        step: int,
        add: Callable[..., list[Any]],
        place: Any,
        *values: Any,
        until: Callable[[Any], Any] | None = None,
    ) -> list[Any]:
        """As long as `step` bytes are left, and `until(place)` is false: `values = add(place, *values)`; the place behind them,
        and the values."""
        before, head, body, behind = self._build.block, *(self._build.append_basic_block() for _ in range(3))
        self._build.branch(head)
        self._build.position_at_end(head)
        news = [self._phi((value, before)) for value in (place, *values)]
        goes_on = self._is_left(news[0], step)
        if until is not None:
            goes_on = self._build.and_(goes_on, self._build.not_(until(news[0])))
        self._build.cbranch(goes_on, body, behind)
        self._build.position_at_end(body)
        nexts = [self._build.add(news[0], _QUAD(step)), *add(*news)]
        for new, value in zip(news, nexts, strict=True):
            new.add_incoming(value, body)
        self._build.branch(head)
        self._build.position_at_end(behind)
        return news

    def _is_aligned(self, place: Any) -> Any:
        """Whether it is copied to where a vector may be written past the caches."""
        (ahead,) = self._copies_ahead
        behind = self._build.and_(self._build.add(place, ahead), _QUAD(self._vector_bytes - 1))
        return self._build.icmp_signed("==", behind, _QUAD(0))

    def _is_left(self, place: Any, nbytes: int) -> Any:
        return self._build.icmp_signed(">=", self._build.sub(self._stop, place), _QUAD(nbytes))

    def _phi(self, *values: tuple[Any, Any]) -> Any:
        phi = self._build.phi(values[0][0].type)
        for value, block in values:
            phi.add_incoming(value, block)
        return phi

    def _intrinsic(self, name: str, result: Any, *arguments: Any) -> Any:
        known = self.module.globals.get(name)
        return known or ir.Function(self.module, ir.FunctionType(result, arguments), name)


def _power(exponent: int) -> int:
    """x to the `exponent`, modulo P."""
    remainder = 1 << 31
    for _ in range(exponent):
        remainder = remainder >> 1 ^ (_POLYNOMIAL if remainder & 1 else 0)
    return remainder
