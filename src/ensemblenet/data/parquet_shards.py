"""Labelled images in Parquet shards that are read one after another: those in use lie on this machine as Arrow files.

A row of Parquet cannot be read alone, as images lie compressed, a hundred or more in a group; a row of an Arrow file,
which is mapped into memory, can. `datasets` makes Arrow of all shards before it begins. Here each shard is converted
when it is fetched, and makes room for others as every copy does.
"""

from __future__ import annotations

import io
import json
import mmap
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ensemblenet.data.remote import RemoteFile, is_url, patiently, system_of
from ensemblenet.errors import DataError, first_line

__all__ = ["ParquetShard"]

_ROWS = 64  # of each batch of an Arrow file but the last: some megabytes of images


@dataclass(frozen=True)
class ParquetShard(RemoteFile):
    """A Parquet file of images on a server or on a disk, whose copy on this machine is an Arrow file.

    Args:
        url: its address, or its path.
        size: in bytes, where the server says it.
        version: changes with the content, and with the columns.
        image: the column of images: structs with the field `bytes`, an encoded image, or the bytes alone.
        label: the column of labels, integers.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "train-0.parquet")
        >>> pq.write_table(pa.table({"image": [{"bytes": b"abc"}, {"bytes": b"de"}], "label": [1, 0]}), path)
        >>> shard = ParquetShard.of(path)
        >>> shard.labels(), shard.open_row(1).read()
        (([1, 0], None), b'de')
    """

    image: str = "image"
    label: str = "label"

    @classmethod
    def of(cls, file: Path | RemoteFile, image: str = "image", label: str = "label") -> ParquetShard:
        """The shard that a file is."""
        form = f"Arrow of {image} and {label}"  # tells this copy from others of the same file
        if isinstance(file, RemoteFile):
            return cls(file.url, file.size, f"{file.version} {form}", image, label)
        status = file.stat()
        return cls(str(file.absolute()), status.st_size, f"{status.st_mtime_ns} {form}", image, label)

    def labels(self) -> tuple[list[int], list[str] | None]:
        """The label of each row, and the names of the classes, if `datasets` has written them.

        A server is asked for the labels alone, if it sends parts of files.

        Raises:
            DataError: it is no Parquet file of images with labels, or is damaged.
            FetchError: its server does not give it.
        """
        labels, names = self.kept("labels", self._find_labels)
        return labels, names

    def open_row(self, row: int) -> io.BytesIO:
        """The encoded image of a row; the shard is fetched first, if it is not here (any more).

        Raises:
            DataError: the row has no image, or the shard is damaged.
            FetchError: its server does not give it.
        """
        with self.open() as file:  # the map lives as long as what looks at it
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        batch = pa.ipc.open_file(pa.py_buffer(memory)).get_batch(row // _ROWS)
        image = batch[self.image][row % _ROWS].as_py()
        encoded = image.get("bytes") if isinstance(image, dict) else image
        if encoded is None:
            raise DataError(f"{self}: row {row} has no image.")
        return io.BytesIO(encoded)

    def copy_to(self, place: Path) -> None:
        """Write it to a place of this machine as an Arrow file, where a failure may leave a part of it.

        Raises:
            DataError: it is no Parquet file of images with labels, or is damaged.
            FetchError: its server does not give it, or there is no room.
        """
        if not is_url(self.url):
            return self._convert(Path(self.url), place)
        fetched = place.with_suffix(".parquet")
        try:
            super().copy_to(fetched)
            self._convert(fetched, place)
        finally:
            fetched.unlink(missing_ok=True)

    def _convert(self, source: Path, place: Path) -> None:
        def convert() -> None:
            try:
                with pq.ParquetFile(source) as table:
                    columns = self._columns(table.schema_arrow)
                    with pa.ipc.new_file(str(place), columns) as arrow:
                        for batch in table.iter_batches(_ROWS, columns=columns.names):
                            arrow.write_batch(batch)
            except Exception as error:
                if not _is_of_arrow(error):
                    raise
                raise DataError(f"{self} is no readable Parquet file: {first_line(error)}") from error

        patiently(convert, self.url)  # for what the disk does, such as being full

    def _find_labels(self) -> tuple[list[int], list[str] | None]:
        def ask() -> pa.Table | None:
            system, path = system_of(self.url)
            try:
                with system.open(path, "rb", cache_type="none") as file, pq.ParquetFile(file) as table:
                    self._columns(table.schema_arrow)
                    return table.read([self.label])
            except Exception as error:
                if _is_of_arrow(error) or type(error) is ValueError:  # fsspec's, of a server that sends whole files
                    return None
                raise

        if (table := patiently(ask, self.url)) is None:
            with self.open() as file:
                table = pa.ipc.open_file(file).read_all()
        labels = table[self.label]
        if labels.null_count:
            raise DataError(f"{self}: {labels.null_count} of {len(labels)} rows have no label.")
        try:
            return labels.cast(pa.int64()).to_pylist(), _class_names(table.schema, self.label)
        except pa.ArrowInvalid as error:  # of 64 bits without a sign
            raise DataError(f"{self}: a label: {first_line(error)}") from error

    def _columns(self, schema: pa.Schema) -> pa.Schema:
        """Those of the images and of the labels."""
        found = {field.name: field for field in schema}
        image, label = (found.get(name, pa.field(name, pa.null())) for name in (self.image, self.label))
        encoded = image.type
        if pa.types.is_struct(encoded) and encoded.get_field_index("bytes") >= 0:
            encoded = encoded.field("bytes").type
        is_binary = pa.types.is_binary(encoded) or pa.types.is_large_binary(encoded)
        if not is_binary or not pa.types.is_integer(label.type):
            raise DataError(
                f"{self} must have the columns {image.name} (encoded images) and {label.name} (integers); it has "
                f"{', '.join(f'{field.name}: {field.type}' for field in schema)}. data.reader takes other names: "
                "input_key and target_key."
            )
        return pa.schema([image, label], schema.metadata)


def _is_of_arrow(error: Exception) -> bool:
    """Whether Arrow cannot read what it got: a damaged file, or another part of it than it asked for."""
    return isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None)


def _class_names(schema: pa.Schema, label: str) -> list[str] | None:
    """What `datasets` writes into the metadata of a file."""
    written = (schema.metadata or {}).get(b"huggingface")
    with suppress(ValueError, AttributeError):  # of other programs
        names = json.loads(written or "{}").get("info", {}).get("features", {}).get(label, {}).get("names")
        return None if names is None else [str(name) for name in names]
    return None
