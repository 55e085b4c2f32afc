"""Parquet files of the Hugging Face hub with a picture a row: `image` {bytes, path} or binary, `label` number or name.

A parquet file gives no single picture cheaply, and published sets are often shuffled. So the labels are read first, and
when pictures are needed all of them are written once, in the order of the rows, to a RecordIO file below the data set
("stage"); from there they are read person by person. It takes the room of the pictures once more until the end.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from anonfw.data.card import DataError
from anonfw.data.files import sha256_of
from anonfw.data.recordio import Header, RecordWriter, pack
from anonfw.data.recordio_scan import read_index
from anonfw.data.sources import Source
from anonfw.data.sources.records import RecordPictures

BATCH = 256  # rows in memory


def parquet(path: str | Path, name: str, image_column: str = "image", label_column: str = "label") -> Source:
    """The rows of a `.parquet` file, or of all such files below a folder (by name). People are called NAME_LABEL.

    Args:
        image_column: a struct with a field `bytes`, or binary.
        label_column: integers (named, where the file has Hugging Face's class names) or strings.
    Raises:
        DataError: no such files, columns of other types, a row without a label, pyarrow is not installed.
    """
    module = _pyarrow()
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if not files:
        raise DataError(f"{path}: no .parquet file there.")
    labels: list[np.ndarray] = []
    first: dict[Any, int] = {}  # label as stored -> number
    names: list[str] | None = None
    about: dict = {"files": {}}
    for file in files:
        opened = _open(module, file, image_column, label_column)
        names = names or _class_names(opened.schema_arrow.metadata, label_column)
        about["files"][_below(path, file)] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        values = _rows(module, file, label_column, f"labels of {file}")
        labels.append(
            np.fromiter((_number(value, first, file) for value in values), np.int64, opened.metadata.num_rows)
        )
    label = np.concatenate(labels)
    stored = list(first)
    called = [_called(value, names) for value in stored]
    # Ranks instead of numbers in order of appearance: people come in the order of their labels, not of a shuffle.
    rank = np.empty(len(stored), np.int64)
    rank[sorted(range(len(stored)), key=stored.__getitem__)] = np.arange(len(stored))
    by_rank = [called[number] for number in np.argsort(rank)]
    ends = np.cumsum([len(each) for each in labels])

    def photo(row: int) -> str:
        number = int(np.searchsorted(ends, row, side="right"))
        return f"{_below(path, files[number])}, row {row - int(ends[number] - len(labels[number]))}"

    def stage(folder: Path, progress: bool) -> tuple[RecordPictures, np.ndarray]:
        return _stage(module, files, image_column, folder, len(label), progress)

    return Source(
        RecordPictures(Path()),
        rank[label] if len(label) else label,
        np.zeros(len(label), np.int64),
        name_of=lambda number: f"{name}_{by_rank[number]}",
        photo_of=photo,
        about={**about, "images": len(label), "labels": len(stored)},
        stage=stage,
    )


def _pyarrow() -> ModuleType:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("reading parquet needs pyarrow: pip install 'anonfw[sources]'") from error
    return pyarrow


def _open(module: ModuleType, file: Path, image_column: str, label_column: str) -> Any:
    try:
        opened = module.parquet.ParquetFile(file)
    except (OSError, module.ArrowException) as error:
        raise DataError(f"{file} is not a readable parquet file: {error}. Get it again.") from error
    schema = opened.schema_arrow
    for column in (image_column, label_column):
        if column not in schema.names:
            raise DataError(
                f"{file} has no column {column!r}; it has {', '.join(schema.names)}. Name it with --image-column or "
                "--label-column."
            )
    kind = schema.field(image_column).type
    content = kind.field("bytes").type if module.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (module.types.is_binary(content) or module.types.is_large_binary(content)):
        raise DataError(f"{file}: column {image_column!r} is {kind}; expected a struct with `bytes`, or binary.")
    kind = schema.field(label_column).type
    if not (module.types.is_integer(kind) or module.types.is_string(kind) or module.types.is_large_string(kind)):
        raise DataError(f"{file}: column {label_column!r} is {kind}; expected whole numbers or strings.")
    return opened


def _rows(module: ModuleType, file: Path, column: str, what: str) -> Iterator[Any]:
    """The values of a column, a few rows in memory at a time."""
    try:
        with module.parquet.ParquetFile(file, pre_buffer=False) as opened:
            for batch in opened.iter_batches(BATCH, columns=[column]):
                yield from batch.column(0).to_pylist()
    except (OSError, module.ArrowException) as error:
        raise DataError(f"{what}: damaged: {error}. Get the file again.") from error


def _number(value: Any, first: dict[Any, int], file: Path) -> int:
    if value is None:
        raise DataError(f"{file} has a row without a label.")
    if first and isinstance(value, str) != isinstance(next(iter(first)), str):
        raise DataError(f"{file}: its labels are of another type than those of the files before.")
    return first.setdefault(value, len(first))


def _class_names(metadata: dict[bytes, bytes] | None, column: str) -> list[str] | None:
    """Hugging Face writes the names of classes into the file's metadata."""
    try:
        return json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return None


def _called(value: int | str, names: list[str] | None) -> str:
    if isinstance(value, str):
        return value
    return str(names[value]) if names and 0 <= value < len(names) else f"{value:06d}"


def _below(folder: Path, file: Path) -> str:
    return file.name if file == folder else str(file.relative_to(folder))


def _stage(
    module: ModuleType, files: list[Path], column: str, folder: Path, rows: int, progress: bool
) -> tuple[RecordPictures, np.ndarray]:
    from tqdm import tqdm

    record_file = folder / "pictures.rec"
    if not record_file.is_file():  # it appears whole: an earlier run's can be taken
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with (
            RecordWriter(record_file) as writer,
            tqdm(total=rows, unit="row", desc="stage", disable=not progress) as bar,
        ):
            row = 0
            for file in files:
                for value in _rows(module, file, column, f"pictures of {file}"):
                    content = value.get("bytes") if isinstance(value, dict) else value
                    writer.write(row, pack(Header(0.0, row), content or b""))
                    row += 1
                    bar.update()
    _, offsets = read_index(record_file.with_suffix(".idx"))
    if len(offsets) != rows:
        raise DataError(f"{folder} holds {len(offsets)} pictures for {rows} rows. Remove it and run again.")
    return RecordPictures(record_file), offsets
