"""What the trainer takes a batch apart into, and how right the outputs for it are."""

from collections.abc import Mapping, Sequence

import torch

from stagein.formats.errors import UsageError

Batch = Mapping[str, torch.Tensor] | Sequence[torch.Tensor]
"""`image`, `label` and, where some rows are padding, `valid` (bool `[batch]`); or the same by position, with or without `valid`."""


def unpack(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, labels and which rows count, bool `[batch]`. Raises UsageError for a batch without them."""
    if isinstance(batch, Mapping):
        if not {"image", "label"} <= batch.keys():
            raise UsageError(
                f"a batch has {', '.join(map(str, batch))}, and the trainer takes image and label: give pairs of other fields, as "
                "of RecordDataset(…, fields=[INPUTS, LABELS], as_tuples=True)"
            )
        parts = [batch["image"], batch["label"], *([batch["valid"]] if "valid" in batch else [])]
    else:
        parts = list(batch)
    if len(parts) not in (2, 3):
        raise UsageError(
            f"a batch is {len(parts)} values, and the trainer takes (image, label) or (image, label, valid)"
        )
    inputs, labels, *rest = parts
    valid = rest[0] if rest else torch.ones(len(inputs), dtype=torch.bool)
    if valid.dtype != torch.bool or valid.shape != (len(inputs),):
        raise UsageError(
            f"valid, the third value of a batch, is {valid.dtype} {list(valid.shape)}: it says by True and False which of "
            f"the {len(inputs)} rows count"
        )
    return inputs, labels, valid


def share_right(outputs: object, labels: torch.Tensor) -> torch.Tensor | None:
    """How much of each sample is told by the highest score, from 0 to 1, float32 `[batch]`: of an image all or nothing, of a
    mask the share of its pixels. None unless outputs are scores `[batch, classes, …]` and labels numbers of classes
    `[batch, …]`."""
    if not isinstance(outputs, torch.Tensor) or outputs.ndim < 2 or labels.is_floating_point():
        return None
    if labels.shape != outputs.shape[:1] + outputs.shape[2:]:
        return None
    right = outputs.argmax(dim=1) == labels
    return right.float().reshape(len(right), -1).mean(dim=1)
