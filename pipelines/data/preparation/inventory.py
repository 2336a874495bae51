"""What the media of records measure, from their headers alone: the basis for packing without decoding.

An inventory is a Parquet file beside the records, one row a record: `reason` (why it cannot be used, else null), `sizes` (height and
width of each image, flat, after EXIF rotation), and for a video `frames` and `fps`, and `times` in seconds if they are not evenly
spaced. Together with the text it gives the exact number of tokens and crops of an example (`measure` of the preprocessors).
"""

from __future__ import annotations

import concurrent.futures
import json
import re
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import fsspec
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
from pipelines.data.isolation import VideoDecoder
from pipelines.data.records.media import Media, fetch
from pipelines.data.records.reading import read_record
from pipelines.data.records.record_file import local_path
from pipelines.data.rejects import Rejected, unusable
from pipelines.data.sources import Records
from pipelines.files import write_table
from pipelines.progress import RecordProgress

CHUNK = 256
_THREADS = 8
_EVEN_S = 1e-3
_WILD = re.compile(r"[*?\[\]/]+")
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


def inventory_path(records: str) -> str:
    """Where the inventory of a file, folder or glob of records is: in the folder, or beside the file; of a glob in the last folder before
    its first wildcard; of a file in an archive, beside the archive.

    Raises:
        ConfigError: of a web server, where nothing can be written.
    """
    if records.startswith(("http://", "https://")):
        raise ConfigError(f"{records}: no inventory can be written beside it: copy the records to a disk or a bucket")
    inner, chained, rest = local_path(records).partition("::")  # zip://train.jsonl::s3://bucket/all.zip
    if chained:
        archive, name = rest.rpartition("::")[2], inner.partition("://")[2]
        return f"{archive}.{_WILD.sub('_', name)}.inventory.parquet"
    filesystem, root = fsspec.url_to_fs(inner)
    if filesystem.isdir(root):
        return f"{inner.rstrip('/')}/inventory.parquet"
    wild = re.search(r"[*?\[]", inner)
    if wild is None or filesystem.exists(root):
        return f"{inner}.inventory.parquet"
    folder = inner[: inner.rfind("/", 0, wild.start()) + 1]
    return f"{folder}{_WILD.sub('_', inner[len(folder) :])}.inventory.parquet"


def require_inventory(path: str) -> None:
    """Raises ConfigError if there is no inventory at `path`."""
    filesystem, root = fsspec.url_to_fs(path)
    if not filesystem.isfile(root):
        raise ConfigError(f"{path}: packing streamed records needs their inventory: run `python -m jobs.inventory CONFIG` first")


class MediaMeter:
    """Measures the media of examples; a video in a process of its own (`VideoDecoder`), because opening it may crash."""

    def build(self, example: dict[str, Any], rng: np.random.RandomState | None = None) -> dict[str, Any]:
        """`sizes` of an example's images, or `frames`, `fps` and `times` of its video; raises `Rejected`."""
        row: dict[str, Any] = {}
        try:
            for reference in example.get("images") or ([example["image"]] if "image" in example else []):
                row["sizes"] = [*row.get("sizes", []), *image_size(fetch(reference), MAX_IMAGE_PIXELS)]
            if "video" in example:
                reader = open_video(example["video"])
                times = reader.timestamps
                even = np.allclose(times, np.arange(len(times)) / reader.fps, rtol=0, atol=_EVEN_S)
                row |= {"frames": len(times), "fps": reader.fps, "times": None if even else times.tolist()}
                reader.close()
        except MediaError as error:
            raise unusable("video" if "video" in example else "image", error) from None
        return row


class RecordMeter:
    """Measures records; their media are fetched and images opened several at a time, because that waits for disks and networks."""

    def __init__(self, records: Records, threads: int = _THREADS):
        self.records, self.meter = records, MediaMeter()
        self.decoder = VideoDecoder([cast(Any, self.meter)])
        self.pool = concurrent.futures.ThreadPoolExecutor(threads)
        self._one_video = threading.Lock()

    def rows(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """The inventory's rows of some records."""
        found: dict[int, dict[str, Any]] = {}
        examples: dict[int, dict[str, Any]] = {}
        for number in numbers:  # one file handle a source: read in this thread
            try:
                examples[number] = read_record(self.records[number])
            except Rejected as error:
                found[number] = {"reason": str(error)}
        found |= zip(examples, self.pool.map(self._measure, examples.values()))
        return [{"row": number, **found[number]} for number in numbers]

    def close(self) -> None:
        """Ends its threads and the process of videos."""
        self.pool.shutdown()
        self.decoder.close()

    def _measure(self, example: dict[str, Any]) -> dict[str, Any]:
        try:
            if "video" not in example:
                return self.meter.build(example)
            video = fetch(example["video"])
            with self._one_video:
                return self.decoder.build(0, {"video": video}, np.random.RandomState(0))
        except Rejected as error:
            return {"reason": str(error)}


class InventoryActor:
    """The Ray Data actor that measures records."""

    def __init__(self, records: Any):
        self.meter = RecordMeter(ray.get(records[0]))

    def __call__(self, batch: pa.Table) -> pa.Table:
        numbers = [i for chunk in batch.to_pylist() for i in range(chunk["first"], chunk["stop"])]
        return pa.Table.from_pylist(self.meter.rows(numbers), schema=SCHEMA)


def take_inventory(records: Records, path: str) -> dict[str, int]:
    """Measures all records on the cluster and writes the inventory.

    Returns:
        rows, usable, and the number of rows with each reason.

    Raises:
        ConfigError: it cannot be written.
    """
    quiet()
    _check_writable(path)
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
    made = []
    results = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    with RecordProgress("inventory", len(records)) as progress, reading(results) as tables:
        for table in tables:
            made.append(table.cast(SCHEMA))
            progress.update(sum(t.num_rows for t in made))
    return write_inventory(pa.concat_tables(made).sort_by("row"), records, path)


def write_inventory(table: pa.Table, records: Records, path: str) -> dict[str, int]:
    """Writes an inventory; returns rows, usable, and the number of rows with each reason."""
    if not np.array_equal(table.column("row").to_numpy(), np.arange(len(records))):  # it is looked up by position
        raise RuntimeError(f"{table.num_rows:,} rows were measured of {len(records):,} records: not one for each")
    stamped = table.replace_schema_metadata({"records": json.dumps(records.stamp)})
    try:
        if "://" in path:  # whole at its end, on every filesystem for which this form is used
            filesystem, root = fsspec.url_to_fs(path)
            with filesystem.open(root, "wb") as file:
                pq.write_table(stamped, file)
        else:
            write_table(stamped, Path(path))
    except OSError as error:
        raise ConfigError(f"{path}: the inventory cannot be written: {error}") from None
    reasons = [r for r in table.column("reason").to_pylist() if r is not None]
    counts = {kind: sum(r.startswith(kind) for r in reasons) for kind in sorted({":".join(r.split(":")[:2]) for r in reasons})}
    return {"rows": table.num_rows, "usable": table.num_rows - len(reasons), **counts}


def _check_writable(path: str) -> None:
    """Raises ConfigError if nothing can be written beside local records: before all of them are measured."""
    if "://" not in path:
        try:
            tempfile.TemporaryFile(dir=Path(path).parent).close()
        except OSError as error:
            raise ConfigError(f"{path}: the inventory cannot be written: {error.strerror or error}") from None


class Inventory:
    """An inventory in memory.

    Attributes:
        usable: int64, the records that can be used, ascending.

    Raises:
        ConfigError: no inventory, or one of other records.
    """

    def __init__(self, records: Records, path: str):
        require_inventory(path)
        filesystem, root = fsspec.url_to_fs(path)
        with filesystem.open(root, "rb") as file:
            table = pq.read_table(file)
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
