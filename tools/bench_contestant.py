"""One contestant of `stagein bench load`, in a process of its own: started by `bench_load`, told when to run by a line on stdin.

    python -m stagein.tools.bench_contestant SPEC      # SPEC: JSON, see `main`

Writes a line of JSON when its first batch is there ({"first_batch_s"}), then one after each round ({"rate"}); or, where that
is asked for, only {"psnr"}.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .rates import rate_of_batches

if TYPE_CHECKING:
    from stagein.loaders.image_peers import ImageWork


def main(spec: dict[str, Any]) -> None:
    """Run a contestant until stdin ends.

    kind        "images" or "tensors"; `name` is one of that module's PEERS, or of `image_bounds.OURS`, then with `dataset`.
    work        the fields of ImageWork or TensorWork.
    round_s     seconds of a round.
    psnr        say only how close its images come to Pillow's.
    """
    import torch  # noqa: F401 - every contestant takes it, and a second for it: not counted as theirs

    answers = _answers()
    began = time.perf_counter()
    start, work = _contestant(spec)
    if spec.get("psnr"):
        print(json.dumps({"psnr": _psnr(start, work)}), file=answers, flush=True)
        os._exit(0)
    batches = start(work)
    next(batches)
    first_batch_s = time.perf_counter() - began
    print(json.dumps({"first_batch_s": round(first_batch_s, 2)}), file=answers, flush=True)
    amount = len if spec["kind"] == "images" else _megabytes
    for _ in sys.stdin:
        print(json.dumps({"rate": rate_of_batches(batches, spec["round_s"], amount)}), file=answers, flush=True)
    os._exit(0)  # peers leave threads and processes that would wait for each other


def _contestant(spec: dict[str, Any]) -> tuple[Callable[[Any], Iterator[Any]], Any]:
    """What makes its batches, and of what work."""
    fields = {**spec["work"], **_paths(spec["work"])}
    name: str = spec["name"]
    if spec["kind"] == "tensors":
        from stagein.loaders import tensor_peers

        tensors = tensor_peers.TensorWork(**fields)
        return tensor_peers.stagein_loader if name == "stagein" else tensor_peers.PEERS[name], tensors
    from stagein.loaders import image_peers

    images = image_peers.ImageWork(**fields)
    if "dataset" not in spec:
        return image_peers.PEERS[name], images
    from stagein.loaders import image_bounds

    ours, dataset = image_bounds.OURS[name], Path(spec["dataset"])
    return lambda work: ours(work, dataset), images


def _answers() -> TextIO:
    """Standard output as it was, for our lines alone: what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _paths(work: dict[str, Any]) -> dict[str, Path]:
    return {name: Path(work[name]) for name in ("images", "folder", "dataset") if name in work}


def _megabytes(tensor: Any) -> float:
    return float(tensor.nbytes / 1e6)


def _psnr(start: Callable[[Any], Iterator[Any]], work: "ImageWork") -> float | None:
    """Of whole images, resized to the output, against Pillow's resize of them; in dB, the mean over a batch.

    Pillow resizes with an antialiasing filter, or without one by an affine transform. One worker alone has the images in
    their order. None where no image of the batch is seen whole.
    """
    import io

    import numpy as np
    from PIL import Image

    from stagein.loaders.graphs import IMAGENET_MEAN, IMAGENET_STD

    folder = work.folder / "psnr"
    folder.mkdir()
    same = replace(work, folder=folder, is_shuffled=False, area=(1.0, 1.0), flip=0.0, threads=1)
    batch = next(start(same))["image"].numpy()
    found = []
    for path, image in zip(same.paths, batch, strict=False):
        picture = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
        if not 3 / 4 <= picture.width / picture.height <= 4 / 3:
            continue  # only such images are seen whole
        size = (work.size, work.size)
        if work.antialias:
            resized = picture.resize(size, Image.Resampling.BILINEAR)
        else:
            step = (picture.width / work.size, 0, 0, 0, picture.height / work.size, 0)
            resized = picture.transform(size, Image.Transform.AFFINE, step, Image.Resampling.BILINEAR)
        pixels = 255 * (image.transpose(1, 2, 0) * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN))
        difference = np.clip(pixels, 0, 255) - np.asarray(resized, np.float64)
        found.append(10 * math.log10(255**2 / float((difference**2).mean())))
    return round(sum(found) / len(found), 1) if found else None


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
