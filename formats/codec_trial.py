"""Which codec suits a field: tried on a few of its records."""

import numpy as np
from numpy.typing import NDArray

from .codecs import WORTHWHILE_RATIO, Codec
from .schema import Field

TRIED_RECORDS = 32
_CANDIDATES = (Codec(name="blosc-lz4", shuffle="byte"), Codec(name="blosc-lz4", shuffle="bit"))


class CodecTrial:
    """Compresses records of a `tensor` field in several ways and remembers how small they become."""

    def __init__(self, field: Field) -> None:
        self.field = field
        self._tried_bytes = 0
        self._stored_bytes = [0] * len(_CANDIDATES)

    def add(self, content: memoryview | NDArray[np.uint8]) -> None:
        """Try the bytes of one more record."""
        self._tried_bytes += len(content)
        for place, codec in enumerate(_CANDIDATES):
            self._stored_bytes[place] += len(codec.encode(content, self.field.stored_dtype.itemsize))

    def choice(self) -> Codec | None:
        """The codec that made them smallest; None when none made them enough smaller to be worth its time."""
        best = min(range(len(_CANDIDATES)), key=self._stored_bytes.__getitem__)
        worthwhile = self._tried_bytes >= WORTHWHILE_RATIO * max(self._stored_bytes[best], 1)
        return _CANDIDATES[best] if worthwhile else None
