"""The marker segments of a JPEG file: its frame, its scans, and the tables they use (ITU-T T.81 annex B)."""

import re
import struct
from dataclasses import dataclass
from typing import NoReturn

_SOI, _EOI, _SOS, _DQT, _DHT, _DRI, _DNL, _COM = 0xD8, 0xD9, 0xDA, 0xDB, 0xC4, 0xDD, 0xDC, 0xFE
_APPLICATION = frozenset(range(0xE0, 0xF0))
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL = frozenset({0xC0, 0xC1})
PROGRESSIVE = 0xC2
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""The next marker behind the entropy-coded data of a scan, in which restart markers and fill bytes may stand."""

BLOCK_PIXELS = 8
MAX_MCU_BLOCKS = 10


class UnsupportedJpegError(ValueError):
    """This JPEG is damaged, or of a kind that is not handled; the text says which, without naming the file."""


def damaged(what: str) -> NoReturn:
    """Raise UnsupportedJpegError for bytes that are no valid JPEG."""
    raise UnsupportedJpegError(f"damaged JPEG: {what}")


@dataclass(frozen=True)
class Component:
    """One colour plane: its identifier, sampling factors and quantisation table."""

    identifier: int
    horizontal: int
    vertical: int
    quantization: int


@dataclass(frozen=True)
class Scan:
    """One scan: entropy-coded bytes `start` to `stop` of the file, and how they are coded.

    Huffman tables are as a DHT segment has them: 16 counts, then the symbols; one for each component, empty where none
    was defined. `spectral` is the band of zigzag coefficients, `approximation` the successive bit positions (high, low).
    """

    components: tuple[int, ...]
    dc_tables: tuple[bytes, ...]
    ac_tables: tuple[bytes, ...]
    spectral: tuple[int, int]
    approximation: tuple[int, int]
    restart_interval: int
    start: int
    stop: int


@dataclass(frozen=True)
class Frame:
    """An image: its size in pixels, its components and scans, and the segments that are kept whatever is re-coded.

    `marker` is the last byte of the SOF marker. `metadata` are the APPn and COM segments (JFIF, EXIF, ICC, Adobe) in
    their order, `quantization` the definitions of the quantisation tables, as a DQT segment has them.
    """

    marker: int
    height: int
    width: int
    components: tuple[Component, ...]
    metadata: bytes
    quantization: tuple[bytes, ...]
    scans: tuple[Scan, ...]

    @property
    def horizontal(self) -> int:
        """Blocks in an MCU's widest component, side by side."""
        return 1 if len(self.components) == 1 else max(each.horizontal for each in self.components)

    @property
    def vertical(self) -> int:
        """Blocks in an MCU's highest component, one above the other."""
        return 1 if len(self.components) == 1 else max(each.vertical for each in self.components)

    @property
    def mcu_columns(self) -> int:
        """MCUs in a row when all components are interleaved."""
        return -(-self.width // (BLOCK_PIXELS * self.horizontal))

    @property
    def mcu_rows(self) -> int:
        return -(-self.height // (BLOCK_PIXELS * self.vertical))

    @property
    def mcu_components(self) -> tuple[int, ...]:
        """The component of each block of an interleaved MCU, in coding order."""
        if len(self.components) == 1:
            return (0,)
        return tuple(
            number
            for number, component in enumerate(self.components)
            for _ in range(component.horizontal * component.vertical)
        )

    @property
    def is_progressive(self) -> bool:
        return self.marker == PROGRESSIVE

    def component_blocks(self, number: int) -> tuple[int, int]:
        """Blocks of a component that hold pixels, (high, wide): what a scan of it alone codes."""
        component = self.components[number]
        horizontal = max(each.horizontal for each in self.components)
        vertical = max(each.vertical for each in self.components)
        high = -(-self.height * component.vertical // (vertical * BLOCK_PIXELS))
        wide = -(-self.width * component.horizontal // (horizontal * BLOCK_PIXELS))
        return high, wide


def read_frame(content: bytes) -> Frame:
    """Read all marker segments of a JPEG file. Raises UnsupportedJpegError; what lies behind the end marker is ignored."""
    reader = _Reader(content)
    try:
        return reader.read()
    except (struct.error, IndexError):
        damaged("it ends within a segment")


class _Reader:
    """Walks over the segments of a file and remembers what they define."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._dc: dict[int, bytes] = {}
        self._ac: dict[int, bytes] = {}
        self._quantization: dict[int, bytes] = {}
        self._restart_interval = 0
        self._metadata: list[bytes] = []
        self._scans: list[Scan] = []
        self._frame: tuple[int, int, int, tuple[Component, ...]] | None = None

    def read(self) -> Frame:
        content, position = self._content, 2
        if content[:2] != bytes((0xFF, _SOI)):
            damaged("it has no start marker")
        while True:
            if content[position] != 0xFF:
                damaged("no marker where one must be")
            marker = content[position + 1]
            if marker == 0xFF:  # fill byte
                position += 1
                continue
            if marker == _EOI:
                break
            (length,) = struct.unpack_from(">H", content, position + 2)
            if length < 2 or position + 2 + length > len(content):
                damaged("it ends within a segment")
            segment = content[position : position + 2 + length]
            position += 2 + length
            if marker == _SOS:
                position = self._read_scan(segment[4:], position)
            else:
                self._read_segment(marker, segment)
        if self._frame is None or not self._scans:
            damaged("it has no scan")
        used = sorted({component.quantization for component in self._frame[3]})
        if not set(used) <= self._quantization.keys():
            damaged("a quantisation table is missing")
        quantization = tuple(self._quantization[table] for table in used)
        return Frame(*self._frame, b"".join(self._metadata), quantization, tuple(self._scans))

    def _read_segment(self, marker: int, segment: bytes) -> None:
        body = segment[4:]
        if marker in _APPLICATION or marker == _COM:
            self._metadata.append(segment)
        elif marker == _DQT:
            self._read_quantization(body)
        elif marker == _DHT:
            self._read_huffman(body)
        elif marker == _DRI:
            (self._restart_interval,) = struct.unpack_from(">H", body)
        elif marker in _FRAMES:
            self._read_frame(marker, body)
        elif marker == _DNL:
            raise UnsupportedJpegError("its height follows its first scan (DNL)")
        else:
            raise UnsupportedJpegError(f"arithmetic or hierarchical coding (marker {marker:02x})")

    def _read_quantization(self, body: bytes) -> None:
        position = 0
        while position < len(body):
            nbytes = 129 if body[position] >> 4 else 65
            table, definition = body[position] & 15, body[position : position + nbytes]
            if len(definition) != nbytes or body[position] >> 4 > 1:
                damaged("a quantisation table is cut off")
            if self._scans and self._quantization.get(table, definition) != definition:
                raise UnsupportedJpegError("its quantisation tables change between scans")
            self._quantization[table] = definition
            position += nbytes

    def _read_huffman(self, body: bytes) -> None:
        position = 0
        while position < len(body):
            kind, counts = body[position], body[position + 1 : position + 17]
            stop = position + 17 + sum(counts)
            if len(counts) != 16 or sum(counts) > 256 or stop > len(body) or kind >> 4 > 1 or kind & 15 > 3:
                damaged("a Huffman table is cut off")
            (self._ac if kind >> 4 else self._dc)[kind & 15] = body[position + 1 : stop]
            position = stop

    def _read_frame(self, marker: int, body: bytes) -> None:
        if marker not in _SEQUENTIAL and marker != PROGRESSIVE:
            raise UnsupportedJpegError(f"arithmetic, lossless or hierarchical coding (SOF{marker - 0xC0})")
        if self._frame is not None:
            damaged("it has two frames")
        precision, height, width, count = struct.unpack_from(">BHHB", body)
        if precision != 8:
            raise UnsupportedJpegError(f"{precision}-bit samples")
        if not height or not width or not 1 <= count <= 4 or len(body) != 6 + 3 * count:
            damaged("its frame header gives no size or no components")
        components = []
        for identifier, factors, quantization in struct.iter_unpack("3B", body[6:]):
            components.append(Component(identifier, factors >> 4, factors & 15, quantization))
        _refuse_sampling(components)
        self._frame = marker, height, width, tuple(components)

    def _read_scan(self, body: bytes, start: int) -> int:
        """Note a scan; returns where its data end."""
        if self._frame is None:
            damaged("a scan before its frame")
        found = _AFTER_SCAN.search(self._content, start)
        if found is None:
            damaged("it has no end marker")
        count = body[0]
        if not 1 <= count <= 4 or len(body) != 4 + 2 * count:
            damaged("a scan header of a wrong size")
        places = {component.identifier: number for number, component in enumerate(self._frame[3])}
        chosen = [(places.get(body[1 + 2 * each], -1), body[2 + 2 * each]) for each in range(count)]
        components = tuple(number for number, _ in chosen)
        if min(components) < 0 or list(components) != sorted(set(components)):
            damaged("a scan of unknown or disordered components")
        self._scans.append(
            Scan(
                components=components,
                dc_tables=tuple(self._dc.get(tables >> 4, b"") for _, tables in chosen),
                ac_tables=tuple(self._ac.get(tables & 15, b"") for _, tables in chosen),
                spectral=(body[-3], body[-2]),
                approximation=(body[-1] >> 4, body[-1] & 15),
                restart_interval=self._restart_interval,
                start=start,
                stop=found.start(),
            )
        )
        return found.start()


def _refuse_sampling(components: list[Component]) -> None:
    for component in components:
        if component.horizontal not in (1, 2, 4) or component.vertical not in (1, 2, 4):
            raise UnsupportedJpegError("sampling factors other than 1, 2 and 4")
    if len(components) > 1 and sum(each.horizontal * each.vertical for each in components) > MAX_MCU_BLOCKS:
        raise UnsupportedJpegError(f"more than {MAX_MCU_BLOCKS} blocks in an MCU")
    if len({component.identifier for component in components}) != len(components):
        damaged("two components with one identifier")


def _segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, 2 + len(body)) + body


def sequential_header(frame: Frame, dc_tables: list[bytes], ac_tables: list[bytes], restart_interval: int) -> bytes:
    """The segments of a sequential JPEG of one interleaved scan, up to its entropy-coded data.

    dc_tables, ac_tables  the Huffman tables of each component, as a DHT segment has them.

    Metadata and quantisation tables are those of `frame`. It is a baseline JPEG where it can be one.
    """
    distinct_dc, distinct_ac = list(dict.fromkeys(dc_tables)), list(dict.fromkeys(ac_tables))
    wide = any(table[0] >> 4 for table in frame.quantization)
    baseline = not wide and max(len(distinct_dc), len(distinct_ac)) <= 2
    frame_body = struct.pack(">BHHB", 8, frame.height, frame.width, len(frame.components))
    scan_body = bytes((len(frame.components),))
    for component, dc_table, ac_table in zip(frame.components, dc_tables, ac_tables, strict=True):
        factors = component.horizontal << 4 | component.vertical
        frame_body += bytes((component.identifier, factors, component.quantization))
        scan_body += bytes((component.identifier, distinct_dc.index(dc_table) << 4 | distinct_ac.index(ac_table)))
    return b"".join(
        [
            bytes((0xFF, _SOI)),
            frame.metadata,
            *(_segment(_DQT, table) for table in frame.quantization),
            _segment(0xC0 if baseline else 0xC1, frame_body),
            *(_segment(_DHT, bytes((number,)) + table) for number, table in enumerate(distinct_dc)),
            *(_segment(_DHT, bytes((0x10 | number,)) + table) for number, table in enumerate(distinct_ac)),
            _segment(_DRI, struct.pack(">H", restart_interval)),
            _segment(_SOS, scan_body + bytes((0, 63, 0))),
        ]
    )
