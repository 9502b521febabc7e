"""Images in tables (parquet files, hub data sets): which columns they are in, and how to read their bytes."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wnq.data.decode import EncodedSplit, missing_extra, read_file, stamp


def parquet_files(folder: Path) -> dict[str, list[Path]]:
    """Return the parquet files of each split, in ``folder`` or ``folder/data``; file names begin with the split."""
    files: dict[str, list[Path]] = {}
    for path in sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")]):
        files.setdefault(re.split(r"[-_.]", path.name, maxsplit=1)[0], []).append(path)
    return files


def parquet_split(name: str, paths: Sequence[Path], image_column: str | None, label_column: str | None) -> EncodedSplit:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
        from datasets import Features
    except ModuleNotFoundError as error:
        raise missing_extra(name, "datasets") from error
    try:
        files = [pq.ParquetFile(path) for path in paths]
        features: Mapping[str, Any] = Features.from_arrow_schema(files[0].schema_arrow)
        image, label = select_columns(name, features, image_column, label_column)
        column = pa.chunked_array(
            [chunk for path in paths for chunk in pq.read_table(path, columns=[label])[label].chunks]
        )
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{paths[0].parent}: cannot read the parquet files of {name} ({error})") from error
    labels, classes = labels_and_classes(name, column, features[label])

    def batches() -> Iterator[tuple[str, int, Any]]:
        for path, file in zip(paths, files, strict=True):
            row = 0
            try:
                for batch in file.iter_batches(batch_size=1000, columns=[image]):
                    yield str(path), row, batch.column(0)
                    row += len(batch)
            except (OSError, pa.ArrowException) as error:
                raise ValueError(f"{path}: cannot read the images from row {row} on ({error})") from error

    def identity() -> dict[str, Any]:
        return {"files": stamp(paths), "columns": [image, label]}

    return EncodedSplit(name, labels, classes, identity, lambda positions: _read_rows(batches(), positions))


def streamed_parquet_split(
    name: str, paths: Sequence[Path], image_column: str | None, label_column: str | None, cache_dir: Path
) -> EncodedSplit:
    """As :func:`parquet_split`, with images that can be read one by one.

    A parquet file gives only whole groups of rows, so the rows are copied once to arrow files in ``cache_dir``, which take as
    much room again.
    """
    try:
        from datasets import Dataset
    except ModuleNotFoundError as error:
        raise missing_extra(name, "datasets") from error
    try:
        dataset: Any = Dataset.from_parquet([str(path) for path in paths], cache_dir=str(cache_dir))
    except Exception as error:  # the library wraps what goes wrong in exceptions of its own, of several kinds
        cause = error.__cause__ or error
        raise ValueError(f"{paths[0].parent}: cannot read the parquet files of {name} ({cause})") from error
    return dataset_split(name, dataset, image_column, label_column)


def dataset_split(name: str, dataset: Any, image_column: str | None, label_column: str | None) -> EncodedSplit:
    """Return a split read from a ``datasets.Dataset``.

    Args:
        name: what messages call it.
        dataset: with a column of images and one of labels.
        image_column: as in :func:`load_data`.
        label_column: as in :func:`load_data`.
    """
    image, label = select_columns(name, dataset.features, image_column, label_column)
    # The arrow format hands out the encoded bytes; the library's own decoding goes row by row and is slow.
    raw = dataset.with_format("arrow")
    labels, classes = labels_and_classes(name, raw.select_columns([label])[:][label], dataset.features[label])

    def batches() -> Iterator[tuple[str, int, Any]]:
        row = 0
        for table in raw.select_columns([image]).iter(batch_size=1000):
            yield name, row, table[image].combine_chunks()
            row += len(table)

    def identity() -> dict[str, Any]:
        files = stamp([Path(file["filename"]) for file in dataset.cache_files])
        return {"files": files, "fingerprint": dataset._fingerprint, "columns": [image, label]}

    def read(positions: torch.Tensor) -> Iterator[tuple[str, bytes]]:
        return _read_rows(batches(), positions)

    return EncodedSplit(name, labels, classes, identity, read, Rows(name, raw.select_columns([image]), image))


class Rows:
    """Images of a table by number; see :class:`wnq.data.streamed.Source`.

    Args:
        name: what messages call the table.
        table: a ``datasets.Dataset`` in arrow format.
        column: of the images.
    """

    def __init__(self, name: str, table: Any, column: str) -> None:
        self.name, self.table, self.column = name, table, column

    def where(self, position: int) -> str:
        """Return table and row of an image."""
        return f"{self.name} row {position}"

    def read(self, position: int) -> bytes:
        """Return the bytes of an image, or raise ``ValueError`` naming its row."""
        return _bytes_of(self.table[position][self.column][0].as_py(), self.where(position))[1]


def _read_rows(batches: Iterator[tuple[str, int, Any]], positions: torch.Tensor) -> Iterator[tuple[str, bytes]]:
    """Yield the encoded images at ascending ``positions`` of a sequence of arrow columns."""
    wanted = iter(positions.tolist())
    position = next(wanted, None)
    start = 0
    for origin, first_row, column in batches:
        while position is not None and position < start + len(column):
            yield _bytes_of(column[position - start].as_py(), f"{origin} row {first_row + position - start}")
            position = next(wanted, None)
        start += len(column)
        if position is None:
            return


def _bytes_of(value: Any, where: str) -> tuple[str, bytes]:
    """Return where the image of a cell is and its bytes: in the table, or in a file that the table names."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None and isinstance(value, dict) and value.get("path"):
        where = value["path"]
        data = read_file(Path(where))
    if not isinstance(data, bytes):
        raise ValueError(f"{where}: there is no image in the image column")
    return where, data


def select_columns(
    name: str, features: Mapping[str, Any], image_column: str | None, label_column: str | None
) -> tuple[str, str]:
    """Return the names of the image and the label column.

    Args:
        name: what messages call the table.
        features: ``datasets`` feature of each column.
        image_column: given by the user; None: the one column of images (``Image``, or a struct of bytes and path).
        label_column: given by the user; None: the one column of class labels, or the one called fine_label or label.

    Raises:
        ValueError: there is no such column, or there are several to choose from.
    """
    images = [column for column, feature in features.items() if _is_image(feature)]
    labels = [column for column, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    by_name = [column for column in ("fine_label", "label") if column in features]
    if len(labels) != 1 and len([column for column in by_name if not labels or column in labels]) == 1:
        labels = [column for column in by_name if not labels or column in labels]
    return (
        _choose(name, "image", image_column, images, features),
        _choose(name, "label", label_column, labels, features),
    )


def labels_and_classes(name: str, column: Any, feature: Any) -> tuple[Tensor, tuple[str, ...]]:
    """Turn a column of labels into int64 labels and the names of their classes.

    Integers keep their value; without names their class is called by its number. Strings are numbered in sorted order.

    Args:
        name: what messages call the table.
        column: arrow array of integers or strings.
        feature: its ``datasets`` feature.

    Raises:
        ValueError: a label is missing or negative (as in a split without published labels), or of another type.
    """
    values: list[Any] = column.to_pylist()
    if not values:
        raise ValueError(f"{name} holds no rows")
    if any(value is None or (isinstance(value, int) and value < 0) for value in values):
        raise ValueError(f"{name}: some images have no label (null or negative); choose another split or label_column=")
    names: list[str] | None = getattr(feature, "names", None)
    if all(isinstance(value, str) for value in values):
        classes = tuple(sorted(set(values)))
        number = {label: index for index, label in enumerate(classes)}
        return torch.tensor([number[value] for value in values], dtype=torch.int64), classes
    if not all(isinstance(value, int) for value in values):
        raise ValueError(f"{name}: labels must be integers or strings, got {feature}; set label_column=")
    labels = torch.tensor(values, dtype=torch.int64)
    return labels, tuple(names) if names else tuple(str(index) for index in range(int(labels.max()) + 1))


def _is_image(feature: Any) -> bool:
    return type(feature).__name__ == "Image" or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def _choose(name: str, role: str, given: str | None, found: list[str], features: Mapping[str, Any]) -> str:
    columns = ", ".join(features)
    if given is not None:
        if given not in features:
            raise ValueError(f"{name}: no column {given!r}; the columns are: {columns}; set {role}_column=")
        return given
    if len(found) != 1:
        which = f"several columns could be the {role}" if found else f"no column is evidently the {role}"
        raise ValueError(f"{name}: {which}; set {role}_column= to one of: {columns}")
    return found[0]
