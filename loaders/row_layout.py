"""What the kernel of `row_maker`, and those who give it memory, agree on. Without numba, which takes half a second to load."""

ALL_TAKEN, UNREAD, UNDECODED, DECODED = range(4)
"""Why the kernel returns: no rows are left; a record has to be read, or a file that was read to be decoded, by others; a row waits for
memory of the batch."""
IN_MEMORY = -1
"""In place of a descriptor."""

COUNT, READ_NS, READ_BYTES, DECODE_NS, DECODED_BYTES, TRANSFORM_NS, CLOCK = range(7)
"""Of what was done, int64 [SPENT_WORDS]: rows, nanoseconds and bytes of each phase; then two words for the clock."""
SPENT_WORDS = CLOCK + 2

RECORD, WINDOW, PIXELS, REGION, WEIGHT_Y, WEIGHT_X, ROW, OUT = range(8)
"""Arrays that differ from row to row, int64 [ARRAYS, ARRAY_WORDS]: the address of the data, any, the address of the extents, which come
from EXTENTS on."""
ARRAYS, EXTENTS, ARRAY_WORDS = 8, 3, 6
