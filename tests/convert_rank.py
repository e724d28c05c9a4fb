"""A rank of test_convert_ranks: converts its slow records, and prints how many shards its own workers have made."""

import sys
from concurrent.futures import Future
from pathlib import Path

from stagein.formats.shard_tasks import ShardResult, ShardTask
from stagein.formats.shard_workers import ShardWorkers
from stagein.formats.sources.python import scan_python
from stagein.tools import convert
from stagein.tools.convert_options import ConvertOptions


class CountingWorkers(ShardWorkers):
    made = 0

    def submit(self, task: ShardTask) -> Future[ShardResult]:
        CountingWorkers.made += 1
        return super().submit(task)


if __name__ == "__main__":
    convert.ShardWorkers = CountingWorkers  # type: ignore[misc]
    options = ConvertOptions(shard_bytes=1000, codec="none", workers=1)
    convert.run(lambda: scan_python("slow:Slow"), Path(sys.argv[1]), options)
    print(f"made {CountingWorkers.made}", flush=True)
