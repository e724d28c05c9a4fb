"""Functions of C that kernels call, of the libraries inside the wheels of our sums and codecs: which library has them, and where
they are in memory. Without numba: machine code that is loaded needs only this.
"""

import ctypes
import functools
import importlib

from .errors import StageinError

PREFIX = "stagein_"
"""Before their names in kernels: another library of the process may have a function of the same name."""
_LIBRARIES = {
    "XXH3": "xxhash._xxhash",
    "blosc": "numcodecs.blosc",
    "ZSTD": "numcodecs.blosc",
    "LZ4": "numcodecs.blosc",
    "crc32c": "google_crc32c._crc32c",
}
"""The extension module, by how the names of functions start that it has or is linked with."""


@functools.cache
def address_of(name: str) -> int:
    """Where a function is: of the C library by its own name, of a wheel with PREFIX before it.

    Raises StageinError for a wheel whose library does not show it.
    """
    if not name.startswith(PREFIX):
        return _address(ctypes.CDLL(None), name)
    name = name.removeprefix(PREFIX)
    extension = importlib.import_module(_LIBRARIES[name.split("_")[0]])
    try:
        return _address(ctypes.CDLL(str(extension.__file__)), name)
    except (OSError, AttributeError):
        raise StageinError(
            f"{extension.__name__} as it is installed has no function {name}: install its wheel from the package index"
        ) from None


def _address(library: ctypes.CDLL, name: str) -> int:
    address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    assert address is not None
    return address
