"""Which device batches are delivered on."""

import torch

from stagein.formats.errors import UsageError


def delivery_device(device: torch.device | str | None, written: str = "device='{}'") -> torch.device:
    """`device` with its index; by default the current CUDA device where there is one, else the CPU.

    written  how the caller writes it, for errors.

    Raises UsageError for a device that batches are not delivered on, or that is not there.
    """
    wanted = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if wanted.type not in ("cpu", "cuda"):
        raise UsageError(f"{written.format(wanted)} is not supported: batches are delivered on 'cpu' or on 'cuda'")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"{written.format(wanted)} is not there: torch sees {torch.cuda.device_count()} CUDA devices here"
        )
    if wanted.type == "cuda" and wanted.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return wanted
