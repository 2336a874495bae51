"""What the media of records measure, from their headers alone: the basis for packing without decoding.

An inventory is a Parquet file beside the records, one row a record: `reason` (why it cannot be used, else null), `sizes` (height and
width of each image, flat, after EXIF rotation), and for a video `frames` and `fps`, and `times` in seconds if they are not evenly
spaced. Together with the text it gives the exact number of tokens and crops of an example (`measure` of the preprocessors).
"""

from __future__ import annotations

import concurrent.futures
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import ActorPoolStrategy

from molmo_core.config import ConfigError
from molmo_core.preprocessing.media import MediaError, image_size
from molmo_core.preprocessing.video_readers import open_video
from pipelines.cluster import quiet, reading
from pipelines.data.config import MAX_IMAGE_PIXELS
from pipelines.data.records.media import Media, fetch
from pipelines.data.records.reading import read_record
from pipelines.data.rejects import Rejected, unusable
from pipelines.data.sources import Records
from pipelines.files import write_table

CHUNK = 256
_THREADS = 8
_EVEN_S = 1e-3
SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "reason": pa.string(),
        "sizes": pa.list_(pa.int64()),
        "frames": pa.int64(),
        "fps": pa.float64(),
        "times": pa.list_(pa.float64()),
    }
)


def inventory_path(records: str) -> Path:
    """Where the inventory of a file, folder or glob of records lies."""
    path = Path(records)
    return path / "inventory.parquet" if path.is_dir() else path.with_name(f"{path.name.replace('*', '_')}.inventory.parquet")


def require_inventory(path: Path) -> None:
    """Raises ConfigError if there is no inventory at `path`."""
    if not path.is_file():
        raise ConfigError(f"{path}: packing streamed records needs their inventory: run `python -m jobs.inventory CONFIG` first")


def measure_media(example: dict[str, Any]) -> dict[str, Any]:
    """Sizes of an example's images, or frames, rate and times of its video; or the reason why it cannot be used."""
    row: dict[str, Any] = {}
    try:
        for reference in example.get("images") or ([example["image"]] if "image" in example else []):
            row["sizes"] = [*row.get("sizes", []), *image_size(fetch(reference), MAX_IMAGE_PIXELS)]
        if "video" in example:
            reader = open_video(fetch(example["video"]))
            times = reader.timestamps
            even = np.allclose(times, np.arange(len(times)) / reader.fps, rtol=0, atol=_EVEN_S)
            row |= {"frames": len(times), "fps": reader.fps, "times": None if even else times.tolist()}
            reader.close()
    except Rejected as error:
        row = {"reason": str(error)}
    except MediaError as error:
        row = {"reason": str(unusable("video" if "video" in example else "image", error))}
    return row


def measure_records(records: Records, rows: list[int], pool: concurrent.futures.Executor) -> list[dict[str, Any]]:
    """The inventory's rows of some records; their media are opened several at a time, because that waits for disks and networks."""
    found: dict[int, dict[str, Any]] = {}
    examples: dict[int, dict[str, Any]] = {}
    for row in rows:  # one file handle a source: read in this thread
        try:
            examples[row] = read_record(records[row])
        except Rejected as error:
            found[row] = {"reason": str(error)}
    found |= zip(examples, pool.map(measure_media, examples.values()))
    return [{"row": row, **found[row]} for row in rows]


class InventoryActor:
    """The Ray Data actor that measures records."""

    def __init__(self, records: Any):
        self.records: Records = ray.get(records[0])
        self.pool = concurrent.futures.ThreadPoolExecutor(_THREADS)

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = [i for chunk in batch.to_pylist() for i in range(chunk["first"], chunk["stop"])]
        return pa.Table.from_pylist(measure_records(self.records, rows, self.pool), schema=SCHEMA)


def take_inventory(records: Records, path: Path) -> dict[str, int]:
    """Measures all records on the cluster and writes the inventory.

    Returns:
        rows, usable, and the number of rows with each reason.
    """
    quiet()
    actors = max(1, int(ray.cluster_resources().get("CPU", 1)))
    chunks = [{"first": i, "stop": min(i + CHUNK, len(records))} for i in range(0, len(records), CHUNK)]
    # The chunks are handed over, not read: a read task would wait for ever for a CPU that the actors hold.
    dataset = ray.data.from_items(chunks, override_num_blocks=len(chunks)).map_batches(
        InventoryActor,
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=min(actors, len(chunks))),
        fn_constructor_args=([ray.put(records)],),
        num_cpus=1,
    )
    with reading(dataset.iter_batches(batch_size=None, batch_format="pyarrow")) as tables:
        table = pa.concat_tables([t.cast(SCHEMA) for t in tables])
    return write_inventory(table.sort_by("row"), records, path)


def write_inventory(table: pa.Table, records: Records, path: Path) -> dict[str, int]:
    """Writes an inventory; returns rows, usable, and the number of rows with each reason."""
    fingerprint = json.dumps(records.stamp)
    write_table(table.replace_schema_metadata({"records": fingerprint}), path)
    reasons = [r for r in table.column("reason").to_pylist() if r is not None]
    counts = {kind: sum(r.startswith(kind) for r in reasons) for kind in sorted({":".join(r.split(":")[:2]) for r in reasons})}
    return {"rows": table.num_rows, "usable": table.num_rows - len(reasons), **counts}


class Inventory:
    """An inventory in memory.

    Attributes:
        usable: int64, the records that can be used, ascending.

    Raises:
        ConfigError: no inventory, or one of other records.
    """

    def __init__(self, records: Records, path: Path):
        require_inventory(path)
        table = pq.read_table(path)
        if (table.schema.metadata or {}).get(b"records", b"").decode() != json.dumps(records.stamp):
            raise ConfigError(f"{path}: an inventory of other records (or they changed): run `python -m jobs.inventory CONFIG` again")
        self.usable = np.flatnonzero(table.column("reason").is_null().to_numpy())
        sizes = table.column("sizes").combine_chunks()
        self._offsets, self._sizes = sizes.offsets.to_numpy(), sizes.values.to_numpy()
        self._frames, self._fps, self._times = (table.column(n).combine_chunks() for n in ("frames", "fps", "times"))

    def media(self, row: int) -> Media:
        """What the media of a record measure."""
        flat = self._sizes[self._offsets[row] : self._offsets[row + 1]].tolist()
        frames, fps, times = (column[row].as_py() for column in (self._frames, self._fps, self._times))
        if times is None and frames is not None:
            times = np.arange(frames) / fps
        return Media(list(zip(flat[::2], flat[1::2])), None if times is None else np.asarray(times), fps)
