"""What kernels, and those who give them memory, agree on. Without numba, which takes half a second to load."""

PADDING_BYTES = 512
"""Zeros behind data without stuffing, more than one block can use up: it has at most 64 codes of 16 bits, each with at most 15 raw
bits, and 64 correction bits, below 300 bytes."""

MAX_CODE_BITS = 16
MOST_TABLES = 4
"""Tables of each kind that a JPEG can have at a time."""
TABLE_SYMBOLS = 256
BLOCK_COEFFICIENTS = 64
DC_SIZES = 12
"""Sizes that a DC difference of 8-bit samples can have: 0 to 11."""
LOOK_BITS = 11
"""Codes of up to so many bits are looked up at once, where files are coded anew."""

# Of the decoder of windows:

HEADER_WORDS = 36
MOST_COMPONENTS = 3
MCU_BLOCKS = 6
"""Four of luma, and two of chroma."""
MCU_PIXELS = 16
"""Of a side, at most."""
BAND_ROWS = 2
"""Rows of MCUs of which samples are kept: the last rows of pixels of one take chroma from the next."""
BLOCK_WORDS = 8
"""That say what a block of an MCU is."""
LOOKED_UP_BITS = 10
"""Codes of up to so many bits are looked up at once: the tables of an image fit into the level 1 cache."""
VECTOR_PIXELS = 16
"""Pixels that are worked on at once: up to so many more than asked for are written."""
SEARCHED_BYTES = 32
"""Bytes of entropy-coded data that are looked through at once for 0xFF, which some 200 others come before."""
