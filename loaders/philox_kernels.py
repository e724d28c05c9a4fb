"""The kernel of `philox`: the same numbers, each worked out at once instead of all of them step by step."""

import numpy as np
from numpy.typing import NDArray

from stagein.formats.native import kernel

_MULTIPLIER_0, _MULTIPLIER_2 = 0xD2511F53, 0xCD9E8D57
_KEY_STEP_0, _KEY_STEP_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_LOW_WORD = 0xFFFFFFFF
_WORD_BITS = 32


@kernel
def fill_uniforms(key_0: int, key_1: int, epoch: int, ids: NDArray[np.int64], uniforms: NDArray[np.float64]) -> None:
    """What `philox.sample_uniforms` says, for `uniforms`, [ids, blocks, 4]; integers of 64 bits wrap, so that a product has all its bits."""
    for sample in range(len(ids)):
        for block in range(uniforms.shape[1]):
            c0, c1, c2, c3 = block, epoch, ids[sample] & _LOW_WORD, ids[sample] >> _WORD_BITS & _LOW_WORD
            k0, k1 = key_0, key_1
            for _ in range(_ROUNDS):
                product_0, product_2 = _MULTIPLIER_0 * c0, _MULTIPLIER_2 * c2
                c0 = (product_2 >> _WORD_BITS & _LOW_WORD) ^ c1 ^ k0
                c1 = product_2 & _LOW_WORD
                c2 = (product_0 >> _WORD_BITS & _LOW_WORD) ^ c3 ^ k1
                c3 = product_0 & _LOW_WORD
                k0, k1 = (k0 + _KEY_STEP_0) & _LOW_WORD, (k1 + _KEY_STEP_1) & _LOW_WORD
            uniforms[sample, block, 0] = c0 * 2.0**-32
            uniforms[sample, block, 1] = c1 * 2.0**-32
            uniforms[sample, block, 2] = c2 * 2.0**-32
            uniforms[sample, block, 3] = c3 * 2.0**-32
