"""Whole files or none: atomic writes, hashes, and the folder for what cannot be kept beside the data."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` only if the block ends without an exception."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object, indent: int | None = 1) -> None:
    """JSON with a final newline, atomically; indented, or with `indent` None on one line without spaces."""
    separators = (",", ":") if indent is None else None
    with atomic(path) as file:
        file.write((json.dumps(value, indent=indent, separators=separators, ensure_ascii=False) + "\n").encode())


def json_lines(file: Path) -> list[dict[str, Any]]:
    """The entries of a file of one JSON object a line, but for one that a kill cut short; [] where there is no file."""
    entries = []
    for line in file.read_text().splitlines() if file.exists() else ():
        with suppress(json.JSONDecodeError):
            entries.append(json.loads(line))
    return entries


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Where downloaded shards and indexes of read-only data sets are kept: `$ANONFW_CACHE`, else `~/.cache/anonfw`."""
    explicit = os.environ.get("ANONFW_CACHE")
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anonfw"
