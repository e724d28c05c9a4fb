"""Making one shard of a conversion, here or in another process: everything that takes is in a task, everything made in a result."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from .assembly import FinishedShard, GrowingShard, fingerprint, journal_shard, resume_shard
from .native_jobs import by_one_process
from .payload import ShardBuffers
from .shards import ShardBuilder, ShardLayout, ShardPlan
from .source import BatchedPart, RefusedRecord, SourcePart
from .values import BadValueError


@dataclass(frozen=True)
class ShardTask:
    """A shard to make, in the data set that grows in `folder`. Picklable."""

    plan: ShardPlan
    part: SourcePart
    layout: ShardLayout
    folder: Path
    skip_bad: bool

    def fingerprint(self) -> str:
        """What the shard is made from: equal fingerprints mean equal shards."""
        layout = self.layout
        schema = layout.schema.model_dump(mode="json")
        return fingerprint(
            self.part.mark(), schema, layout.container, dict(layout.capacity), layout.chunk_bytes, self.skip_bad
        )


@dataclass(frozen=True)
class ShardResult:
    """The finished shard, or None and the records that are none; `reused`: an earlier attempt had finished it."""

    plan: ShardPlan
    shard: FinishedShard | None
    reused: bool
    bad: tuple[RefusedRecord, ...] = ()


def make_shard(task: ShardTask, buffers: ShardBuffers) -> ShardResult:
    """Make a shard, or find it finished by an earlier attempt. Raises SourceError, and OSError as the file system does."""
    number, mark = task.plan.number, task.fingerprint()
    finished = resume_shard(task.folder, number, mark, task.layout.chunk_bytes)
    if finished is not None:
        return ShardResult(task.plan, finished, reused=True)
    with GrowingShard(task.folder, number, task.plan.first, task.layout) as growing:
        with by_one_process():
            files = growing.lay_out(task.plan)
            if isinstance(task.part, BatchedPart):
                task.part.prepare()
        builder = ShardBuilder(task.layout.schema, buffers, task.plan.payload_bytes, files)
        bad, counts = _fill(builder, task)
        if bad and not task.skip_bad:
            return ShardResult(task.plan, None, reused=False, bad=tuple(bad))
        growing.write(builder.content())
        shard = growing.publish(tuple(bad), counts)
    journal_shard(task.folder, number, mark, shard)
    return ShardResult(task.plan, shard, reused=False)


def _fill(builder: ShardBuilder, task: ShardTask) -> tuple[list[RefusedRecord], Counter[str]]:
    """Read the records of a task; returns what is none, and what the records are counted under."""
    bad: list[RefusedRecord] = []
    counts: Counter[str] = Counter()
    if isinstance(task.part, BatchedPart):
        for batch in task.part.read_batches(builder.batch_room):
            builder.extend(batch)
            bad += batch.refused
        return bad, counts
    for place, record in enumerate(task.part.read(builder.room)):
        try:
            if isinstance(record, RefusedRecord):
                bad.append(record)
            else:
                builder.add(record.values, record.shapes)
                counts.update(record.counts)
        except BadValueError as error:
            bad.append(RefusedRecord(f"record {task.plan.first + place}", str(error)))
        builder.forget()
    return bad, counts
