"""One contestant of `stagein bench load`, in a process of its own: started by `bench_load`, told when to run by a line on stdin.

    python -m stagein.tools.bench_contestant SPEC      # SPEC: JSON, see `main`

Writes a line of JSON when its first batch is there ({"first_batch_s", "psnr"}), then one after each round ({"rate"}).
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from stagein.loaders.image_peers import ImageWork

_WARM_UP_BATCHES = 4
"""Not timed at the start of a round: what lay ready in the queue, and the start of the threads."""


def main(spec: dict[str, Any]) -> None:
    """Run a contestant until stdin ends.

    kind        "images" or "tensors"; `name` is one of that module's PEERS, or "stagein", then with `dataset`.
    work        the fields of ImageWork or TensorWork.
    round_s     seconds of a round.
    """
    answers = _answers()
    images = spec["kind"] == "images"
    start: Callable[[Any], Iterator[Any]]
    work: Any
    if images:
        from stagein.loaders import image_peers

        work = image_peers.ImageWork(**{**spec["work"], **_paths(spec["work"])})
        if "dataset" in spec:
            start = partial(image_peers.stagein_loader, dataset=Path(spec["dataset"]))
        else:
            start = image_peers.PEERS[spec["name"]]
    else:
        from stagein.loaders import tensor_peers

        work = tensor_peers.TensorWork(**{**spec["work"], **_paths(spec["work"])})
        start = tensor_peers.stagein_loader if spec["name"] == "stagein" else tensor_peers.PEERS[spec["name"]]
    began = time.perf_counter()
    batches = start(work)
    next(batches)
    first_batch_s = time.perf_counter() - began
    answer = {"first_batch_s": round(first_batch_s, 2), "psnr": _psnr(start, work) if images else None}
    print(json.dumps(answer), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps({"rate": _rate(batches, spec["round_s"], images)}), file=answers, flush=True)
    os._exit(0)  # peers leave threads and processes that would wait for each other


def _answers() -> TextIO:
    """Standard output as it was, for our lines alone: what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _paths(work: dict[str, Any]) -> dict[str, Path]:
    return {name: Path(work[name]) for name in ("images", "folder", "dataset") if name in work}


def _rate(batches: Iterator[Any], round_s: float, images: bool) -> float:
    """Images a second, or MB a second."""
    for _ in range(_WARM_UP_BATCHES):
        next(batches)
    started, done = time.perf_counter(), 0.0
    while (taken := time.perf_counter() - started) < round_s:
        (tensor, *_) = next(batches).values()
        done += len(tensor) if images else tensor.nbytes / 1e6
    return done / taken


def _psnr(start: Callable[[Any], Iterator[Any]], work: "ImageWork") -> float | None:
    """Of whole images, resized to the output, against Pillow's antialiased resize of them; in dB, the mean over a batch.

    None where the order or the window cannot be told (WebDataset and MosaicML divide files among workers, FFCV crops).
    """
    import io

    import numpy as np
    from PIL import Image

    from stagein.loaders.graphs import IMAGENET_MEAN, IMAGENET_STD

    if getattr(start, "__name__", "") in ("webdataset", "mosaic_streaming", "ffcv"):
        return None
    same = replace(work, is_shuffled=False, area=(1.0, 1.0), flip=0.0)
    batch = next(start(same))["image"].numpy()
    found = []
    for path, image in zip(same.paths, batch, strict=False):
        picture = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
        if not 3 / 4 < picture.width / picture.height < 4 / 3:
            continue  # only such images are seen whole
        pillows = np.asarray(picture.resize((work.size, work.size), Image.Resampling.BILINEAR), np.float64)
        pixels = 255 * (image.transpose(1, 2, 0) * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN))
        found.append(10 * math.log10(255**2 / float(((pixels - pillows) ** 2).mean())))
    return round(sum(found) / len(found), 1) if found else None


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
