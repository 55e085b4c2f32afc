"""Face sets in RecordIO: InsightFace's (CASIA-WebFace, MS1M, Glint, ...) and DCFace's release.

InsightFace: record 0 is a header with two labels [a, b): images are the records 1 to a-1, one record a person follows
with the range of its images. The person of an image stands in the image's own header. `property` says how many people
there are and the size of the crops; `train.lst` is not needed, only its number of lines is compared.

DCFace: `file.rec` has neither header record nor labels; `list.txt` says INDEX<TAB>PERSON/PHOTO of each record.
"""

from __future__ import annotations

import functools
import hashlib
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from anonfw.data.card import DataError
from anonfw.data.files import atomic, cache_folder, sha256_of
from anonfw.data.recordio import AGAIN, RecordFile, unpack
from anonfw.data.recordio_scan import Scan, read_index, scan
from anonfw.data.sources import Source
from anonfw.data.sources.id_images import mark

SCAN_VERSION = 1


class RecordPictures:
    """Pictures of a `.rec` file by the offset of their record."""

    def __init__(self, path: Path, wide: bool = False) -> None:
        self.path, self.wide = path, wide
        self._file: RecordFile | None = None

    def __getstate__(self) -> dict:
        return {**vars(self), "_file": None}

    def read(self, place: int) -> bytes:
        if self._file is None:
            self._file = RecordFile(self.path)
        return unpack(self._file.read(place), self.wide, f"{self.path}, byte {place}")[1]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def insightface(folder: str | Path, name: str, progress: bool = True) -> Source:
    """The images of FOLDER/train.rec (or the only other `.rec` file there). People are called NAME_LABEL.

    Args:
        folder: with the `.rec` file, and `.idx`, `.lst`, `property` where there are some; or the `.rec` file itself.
        name: what people are called after.
    Raises:
        DataError: files are missing, damaged or contradict each other.
    """
    path = find_record_file(Path(folder), ("train.rec",))
    records = cached_scan(path, progress)
    keys = record_keys(path, records)
    images = _images(path, records, keys)
    labels = _labels(path, records, images)
    if len(images) == len(records) > 1 and not labels.any():  # no header record either
        raise DataError(
            f"{path}: all {len(labels)} records have the label 0, so nobody can be told apart. "
            "If this is DCFace's release, use data/dcface.py, which reads its list.txt."
        )
    _check_property(path, labels)
    about = describe(path, records)
    about["images"], about["labels"] = len(images), len(np.unique(labels))
    listing = path.with_suffix(".lst")
    if listing.is_file() and (lines := _line_count(listing)) != len(images):
        about["note"] = f"{listing.name} has {lines} lines for {len(images)} images; it was not used"
    return Source(
        RecordPictures(path, records.wide),
        labels,
        records.offset[images],
        name_of=functools.partial("{}_{:06d}".format, name),
        photo_of=_photo_name(path, keys[images]),
        about=about,
    )


def dcface(folder: str | Path, id_image: str | None = None, keep_copies: bool = False, progress: bool = True) -> Source:
    """DCFace as released: FOLDER/file.rec and list.txt (below FOLDER/record too).

    Args:
        id_image: regular expression; a picture whose path in list.txt it finds is the id image. None goes by copies
            (`id_images.mark`).
        keep_copies: take the copies of an oversampled picture too.
    Raises:
        DataError: as for `insightface`, or list.txt does not fit the records.
    """
    folder = Path(folder)
    if not (folder / "list.txt").is_file() and (folder / "record" / "list.txt").is_file():
        folder = folder / "record"
    path = find_record_file(folder, ("file.rec", "train.rec"))
    records = cached_scan(path, progress)
    keys = record_keys(path, records)
    listing = path.with_name("list.txt")
    photos = _read_list(listing, keys)
    people = sorted({person for person, _ in photos}, key=natural)
    number = {person: i for i, person in enumerate(people)}
    about = describe(path, records, listing)
    about["copies"] = "kept" if keep_copies else "left out"
    return Source(
        RecordPictures(path, records.wide),
        np.array([number[person] for person, _ in photos], np.int64),
        records.offset,
        name_of=lambda label: f"dcface_{people[label]}",
        photo_of=lambda row: "/".join(photos[row]),
        judge=functools.partial(mark, id_image=id_image, keep_copies=keep_copies),
        about=about,
    )


def natural(name: str) -> tuple:
    """A sort key that puts `9` before `10`."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)), name


def find_record_file(folder: Path, names: tuple[str, ...]) -> Path:
    if folder.is_file():
        return folder
    for name in names:
        if (folder / name).is_file():
            return folder / name
    found = sorted(folder.glob("*.rec")) if folder.is_dir() else []
    if len(found) != 1:
        what = f"{len(found)} .rec files" if found else "no .rec file" if folder.is_dir() else "no such folder"
        raise DataError(f"{folder}: {what}; expected {' or '.join(names)} there. Name the .rec file itself.")
    return found[0]


def cached_scan(path: Path, progress: bool) -> Scan:
    """`scan`, kept in the cache folder for as long as the file has the same size and time."""
    from tqdm import tqdm

    if not path.is_file():
        raise DataError(f"{path} does not exist.")
    state = path.stat()
    place = _scan_place(path)
    try:
        with np.load(place) as stored:
            if stored["key"].tolist() == [SCAN_VERSION, state.st_size, state.st_mtime_ns]:
                return Scan(
                    **{name: stored[name] for name in ("offset", "size", "flag", "label", "second")},
                    wide=bool(stored["wide"]),
                    bytes=state.st_size,
                    sha256=str(stored["sha256"]),
                )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # not scanned before, or by another version
    with tqdm(total=state.st_size, unit="B", unit_scale=True, desc=path.name, disable=not progress) as bar:
        records = scan(path, bar.update)
    place.parent.mkdir(parents=True, exist_ok=True)
    with atomic(place) as file:
        np.savez(file, key=np.array([SCAN_VERSION, state.st_size, state.st_mtime_ns]), **vars(records))
    return records


def _scan_place(path: Path) -> Path:
    return cache_folder() / "scans" / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}.npz"


def record_keys(path: Path, records: Scan) -> np.ndarray:
    """(n,) int64: the key of each record by the `.idx`, or its number where there is no `.idx`.

    Raises:
        DataError: the `.idx` points to a place where no record starts, or leaves records out.
    """
    index = path.with_suffix(".idx")
    if not index.is_file():
        return np.arange(len(records), dtype=np.int64)
    keys, offsets = read_index(index)
    rows = np.minimum(np.searchsorted(records.offset, offsets), len(records) - 1)
    wrong = np.flatnonzero(records.offset[rows] != offsets)
    if len(wrong):
        key, offset = keys[wrong[0]], offsets[wrong[0]]
        raise DataError(
            f"{index}: key {key} points to byte {offset} of {path.name}, where no record starts ({len(wrong)} such "
            f"lines). It is the index of another file: get both again, or remove {index.name} and do without."
        )
    if len(keys) != len(records) or len(np.unique(rows)) != len(records):
        raise DataError(
            f"{index} names {len(np.unique(rows))} of the {len(records)} records of {path.name}. "
            f"Get both again, or remove {index.name} and do without."
        )
    made = np.empty(len(records), np.int64)
    made[rows] = keys
    return made


def _images(path: Path, records: Scan, keys: np.ndarray) -> np.ndarray:
    """Rows of the records that are images, by key."""
    order = np.argsort(keys, kind="stable")
    first = order[0]
    label_bytes = (32 if records.wide else 24) + records.flag[first] * (8 if records.wide else 4)
    if keys[first] != 0 or records.flag[first] < 2 or records.size[first] != label_bytes:
        return order  # no header record: every record is an image
    where = f"{path}, byte {records.offset[first]}: the header record says that"
    start, end = float(records.label[first]), float(records.second[first])
    if not (start.is_integer() and end.is_integer() and 1 <= start <= end <= keys[order[-1]] + 1):
        raise DataError(f"{where} people's records are {start:g} to {end:g}, the file has keys to {keys[order[-1]]}.")
    images = order[(keys[order] >= 1) & (keys[order] < start)]
    people = order[(keys[order] >= start) & (keys[order] < end)]
    if len(images) != start - 1:
        raise DataError(f"{where} images have the keys 1 to {start - 1:g}, but {len(images)} of these exist. {AGAIN}")
    for row in people.tolist():
        low, high = records.label[row], records.second[row]
        if not 1 <= low <= high <= start:
            at = f"{path}, byte {records.offset[row]}: the person with key {keys[row]}"
            raise DataError(f"{at} has the images {low:g} to {high:g}, outside of 1 to {start:g}. {AGAIN}")
    if not len(images):
        raise DataError(f"{where} there are no images.")
    return images


def _labels(path: Path, records: Scan, images: np.ndarray) -> np.ndarray:
    labels = records.label[images]
    with np.errstate(invalid="ignore"):
        wrong = np.flatnonzero(~np.isfinite(labels) | (labels < 0) | (labels != np.floor(labels)) | (labels > 2**31))
    if len(wrong):
        where = f"{path}, byte {records.offset[images[wrong[0]]]}"
        raise DataError(f"{where}: the label {labels[wrong[0]]:g} is no person's number ({len(wrong)} such). {AGAIN}")
    return labels.astype(np.int64)


def _check_property(path: Path, labels: np.ndarray) -> None:
    listing = path.with_name("property")
    if not listing.is_file():
        return
    first = listing.read_text(encoding="utf-8", errors="replace")[:200].splitlines()[:1]
    try:
        people = int(first[0].split(",")[0])
    except (IndexError, ValueError) as error:
        raise DataError(f"{listing}: {first} is not PEOPLE,HEIGHT,WIDTH. {AGAIN}") from error
    if labels.max() >= people:
        raise DataError(
            f"{path} has the label {labels.max()}, but {listing} says that there are {people} people (0 to "
            f"{people - 1}). The files are of different sets: get them again, or remove {listing.name}."
        )


def _read_list(listing: Path, keys: np.ndarray) -> list[tuple[str, str]]:
    """(person, photo) of each record, from lines INDEX<TAB>PERSON/PHOTO."""
    if not listing.is_file():
        raise DataError(f"{listing} is missing: the records of DCFace have no labels, only list.txt says who is who.")
    row_of = {int(key): row for row, key in enumerate(keys.tolist())}
    found: list[tuple[str, str] | None] = [None] * len(keys)
    with open(listing, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            index, _, photo = line.rstrip("\r\n").partition("\t")
            person, _, rest = photo.split("\t")[0].removeprefix("./").rpartition("/")
            if not index.strip().isdigit() or not person or not rest:
                raise DataError(f"{listing}, line {number}: {line[:80]!r} is not INDEX<TAB>PERSON/PHOTO.")
            row = row_of.get(int(index))
            if row is None:
                raise DataError(f"{listing}, line {number}: there is no record {index} in {listing.parent}. {AGAIN}")
            found[row] = (person, rest)
    if None in found:
        missing = keys[found.index(None)]
        raise DataError(f"{listing} does not name record {missing} ({found.count(None)} such). {AGAIN}")
    return found


def describe(path: Path, records: Scan, *others: Path) -> dict:
    """Names, sizes and hashes of the files, for the card."""
    files = {path.name: {"bytes": records.bytes, "sha256": records.sha256}}
    for other in (path.with_suffix(".idx"), path.with_suffix(".lst"), path.with_name("property"), *others):
        if other.is_file():
            files[other.name] = {"bytes": other.stat().st_size, "sha256": sha256_of(other)}
    return {"files": files, "records": len(records)}


def _line_count(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(1 for line in file if line.strip())


def _photo_name(path: Path, keys: np.ndarray) -> Callable[[int], str]:
    return lambda row: f"{path.name}, record {keys[row]}"
