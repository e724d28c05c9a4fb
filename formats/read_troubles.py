"""What is wrong with a record that `read_kernels` reads, where no error number (above 0) says it."""

CUT_OFF = -1
"""The file ends before it."""
DAMAGED = -2
"""Its crc32c differs."""
UNDECODABLE = -3
"""It is not what the codec makes of a record."""
