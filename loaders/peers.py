"""Other loaders, to measure ours against: the same work, done their way."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.utils.dlpack

from .dali import import_dali
from .dali_pipeline import QUEUE_DEPTH
from .engine import Batch
from .graphs import ImageOutput


def dali_file_reader(images: Path, batch_size: int, threads: int, output: ImageOutput) -> Iterator[Batch]:
    """DALI's own loader over an image folder: its file reader, random-crop decoder, resize and normalisation, for ever."""
    dali = import_dali()
    pipeline = dali.Pipeline(
        batch_size=batch_size, num_threads=threads, device_id=None, prefetch_queue_depth=QUEUE_DEPTH, seed=0
    )
    with pipeline:
        encoded, label = dali.fn.readers.file(file_root=str(images), random_shuffle=True)
        image = dali.fn.decoders.image_random_crop(
            encoded, output_type=dali.types.RGB, adjust_orientation=False, random_area=(0.08, 1.0)
        )
        mirror = dali.fn.random.coin_flip()
        pipeline.set_outputs(output.normalise(output.resize(image), mirror=mirror), label)
    pipeline.build()
    while True:
        image, label = (torch.utils.dlpack.from_dlpack(each.as_tensor()) for each in pipeline.run())
        yield {"image": image, "label": label}
