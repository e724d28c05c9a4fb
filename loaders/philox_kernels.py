"""The kernel of `philox`: the same numbers, each worked out at once instead of all of them step by step."""

import numpy as np
from numpy.typing import NDArray

from stagein.formats.native import kernel

from .philox import KEY_STEPS, LOW_WORD, MULTIPLIERS, ROUNDS, WORD_BITS


@kernel
def fill_uniforms(key_0: int, key_1: int, epoch: int, ids: NDArray[np.int64], uniforms: NDArray[np.float64]) -> None:
    """What `philox.sample_uniforms` says, for `uniforms`, [ids, blocks, 4]; integers of 64 bits wrap, so that a product has all its bits."""
    for sample in range(len(ids)):
        for block in range(uniforms.shape[1]):
            c0, c1, c2, c3 = block, epoch, ids[sample] & LOW_WORD, ids[sample] >> WORD_BITS & LOW_WORD
            k0, k1 = key_0, key_1
            for _ in range(ROUNDS):
                product_0, product_2 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
                c0 = (product_2 >> WORD_BITS & LOW_WORD) ^ c1 ^ k0
                c1 = product_2 & LOW_WORD
                c2 = (product_0 >> WORD_BITS & LOW_WORD) ^ c3 ^ k1
                c3 = product_0 & LOW_WORD
                k0, k1 = (k0 + KEY_STEPS[0]) & LOW_WORD, (k1 + KEY_STEPS[1]) & LOW_WORD
            uniforms[sample, block, 0] = c0 * 2.0**-32
            uniforms[sample, block, 1] = c1 * 2.0**-32
            uniforms[sample, block, 2] = c2 * 2.0**-32
            uniforms[sample, block, 3] = c3 * 2.0**-32
