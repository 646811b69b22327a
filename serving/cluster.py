"""Bulk scoring on the machines of a Ray or Spark cluster, which move, retry and balance the work.

    ray      `python -m serving score SOURCE --out OUT --ray ADDRESS`
    Spark    spark.read.format("binaryFile").load("s3a://bucket/photos/*.jpg").mapInPandas(
                 partial(frames, archive="/shared/model.mar"), schema=SPARK_SCHEMA)

A picture is read where it is answered, so its machine has to find it: in S3, or in a folder that
all of them share. This package has to be installed on each.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from serving.answers import SCHEMA, Row, ScoringError, SourceError
from serving.archive import open_model
from serving.files import temporary
from serving.predictor import Predictor
from serving.scoring import Item, Summary, collect, in_order

if TYPE_CHECKING:
    import pandas as pd

BLOCK = 100  # pictures that an actor takes at once
PICTURES = pa.schema([("path", pa.string()), ("place", pa.binary()), ("content", pa.binary())])
"""Of an :class:`Item`; a place need not be in UTF-8."""
SPARK_SCHEMA = (
    "path string, label string, probability float, familiarity float, "
    "top array<struct<label: string, probability: float>>, model string, version string, "
    "error string, width int, height int, bytes bigint, sha256 string"
)
"""`answers.SCHEMA`, as Spark writes it."""


def answered(predictor: Predictor, pictures: pa.Table) -> pa.Table:
    """Rows of `answers.SCHEMA` for pictures in one thread.

    Args:
        pictures: columns `path`, and of `place` and `content` what there is (:class:`Item`).
    """
    columns = [name for name in PICTURES.names if name in pictures.column_names]
    items = [
        Item(**{**row, "place": os.fsdecode(row.get("place") or "")})
        for row in pictures.select(columns).to_pylist()
    ]
    rows = chain.from_iterable(in_order(items, predictor, threads=1))
    return pa.Table.from_pylist(list(rows), SCHEMA)


def frames(pictures: Iterator["pd.DataFrame"], archive: str) -> Iterator["pd.DataFrame"]:
    """:func:`answered` for Spark's `mapInPandas`; loads the network once for each partition.

    Args:
        archive: a file that every machine has at that path.
    """
    predictor = Predictor.open(archive, threads=1)
    for frame in pictures:
        table = pa.Table.from_pandas(frame, preserve_index=False)
        yield answered(predictor, table).to_pandas(integer_object_nulls=True)


class Scorer:
    """:func:`answered` for Ray's `map_batches`: an actor, which keeps the network, on one core."""

    def __init__(self, archive: Any) -> None:
        """
        Args:
            archive: a reference to the file's content in Ray's object store.
        """
        import ray

        with temporary() as folder:
            file = folder / "model.mar"
            file.write_bytes(ray.get(archive))
            self.predictor = Predictor.open(file, threads=1)

    def __call__(self, pictures: pa.Table) -> pa.Table:
        return answered(self.predictor, pictures)


def score(archive: Path, address: str, source: str, target: Path | str) -> Summary:
    """:func:`serving.scoring.collect` of what a Ray cluster answers.

    Raises:
        ModelError: it is not an archive.
        ScoringError: it is a folder, Ray is not installed, or as :func:`serving.scoring.collect`.
        SourceError: no Ray answers at that address, or storage fails.
    """
    model = open_model(archive)
    if archive.is_dir():
        raise ScoringError(f"{archive}: --ray takes an archive, not a folder")
    ray = connect(address)
    work = partial(on_ray, archive=ray.put(archive.read_bytes()))
    return collect(model.description, source, target, work)


def connect(address: str) -> Any:
    """The package `ray`, connected to a cluster, and silent: what matters is in its logs, too.

    Raises:
        ScoringError: it is not installed here.
        SourceError: no cluster answers at that address, or one of another version.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # It would try a wrong address for a quarter of an hour.
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")
    try:
        import ray.data
    except ModuleNotFoundError as error:
        raise ScoringError(f"--ray needs pip install 'inception-transfer[ray]' ({error})") from None
    try:
        ray.init(address, log_to_driver=False, logging_level="critical")
    except (ConnectionError, RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise SourceError(f"no Ray cluster answers at {address}: {said}") from None
    ray.data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)
    return ray


def on_ray(items: Iterator[Item], archive: Any) -> Iterator[list[Row]]:
    """Rows of all items, a block at a time, from an actor for each core of the cluster that
    :func:`connect` reached. What a machine held that is lost is answered by others.

    Args:
        archive: a reference to the file's content.

    Raises:
        SourceError: storage fails.
    """
    import ray
    from ray.exceptions import RayTaskError

    cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
    blocks = [ray.put(table(some)) for some in iter(lambda: list(islice(items, BLOCK)), [])]
    answers = ray.data.from_arrow_refs(blocks).map_batches(
        Scorer,
        fn_constructor_args=(archive,),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, initial_size=cores),
    )
    try:
        for block in answers.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield block.to_pylist()
    except RayTaskError as error:  # of which an actor's own is left as text
        _, told, reason = str(error).rpartition(f"{SourceError.__name__}: ")
        if not told:
            raise
        raise SourceError(reason.splitlines()[0]) from None


def table(items: Sequence[Item]) -> pa.Table:
    rows = [{**asdict(item), "place": os.fsencode(item.place)} for item in items]
    return pa.Table.from_pylist(rows, PICTURES)
