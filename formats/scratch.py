"""Memory of a thread, kept: fresh pages cost as much as reading into them."""

import threading

import numpy as np
from numpy.typing import NDArray


class Scratch(threading.local):
    """Memory to work in; what a thread gets takes the place of what it got before."""

    _memory = np.empty(0, np.uint8)

    def of(self, nbytes: int) -> NDArray[np.uint8]:
        if len(self._memory) < nbytes:
            self._memory = np.empty(nbytes, np.uint8)
        return self._memory[:nbytes]
