"""What Weights & Biases keeps on disk: `wandb/[offline-]run-TIME-ID/run-ID.wandb`, read back without an account.

The file is LevelDB's log format around wandb's protobuf messages. Current wandb reads it in its compiled core only and
offers no reader to Python, so the framing (20 lines) is ours; the messages are parsed by wandb's own classes.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anonfw.errors import AnonfwError

IDENT, VERSION = b":W&B", b"\xe1\xbe\x00"
BLOCK, HEADER = 32768, struct.Struct("<IHB")  # checksum, length, type of a piece; pieces never cross a block
FULL, FIRST, LAST = 1, 2, 4
STEP = "trainer/global_step"  # the axis that Lightning logs against


@dataclass
class StoredRun:
    """One run as its files have it, several processes of it in the order of their starts.

    Attributes:
        id, name, project, group, job_type, tags: as given to `wandb.init`.
        config, summary: what was last set, by top-level key.
        rows: history in the order written; each has `_step`, `_timestamp` and, from a trainer, STEP.
        exit_code: of the newest process; None while it runs or where it was killed.
    """

    id: str
    name: str = ""
    project: str = ""
    group: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None


def find_files(place: str | Path) -> list[Path]:
    """The .wandb files of a run folder, of `wandb/`, of one `[offline-]run-*` in it, or a file: oldest start first."""
    place = Path(place)
    if place.suffix == ".wandb":
        return [place]
    patterns = ("run-*.wandb", "*run-*/run-*.wandb", "wandb/*run-*/run-*.wandb")
    found = {path.resolve(): path for pattern in patterns for path in place.glob(pattern)}
    # offline-run-20260131_235959-id and run-20260131_235959-id: the time sorts, the prefix must not.
    return sorted(found.values(), key=lambda path: path.parent.name.removeprefix("offline-"))


def read_runs(files: Iterable[Path]) -> list[StoredRun]:
    """The runs in these files, by id, in the order in which they first appear.

    Raises:
        AnonfwError: a file that is not wandb's.
    """
    runs: dict[str, StoredRun] = {}
    for file in files:
        run: StoredRun | None = None
        for record in _records(file):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run = runs.setdefault(record.run.run_id, StoredRun(record.run.run_id))
                run.exit_code = None
                _begin(run, record.run)
            elif run is None:
                continue  # headers come before the run
            elif kind == "config":
                _update(run.config, record.config.update)
            elif kind == "summary":
                _update(run.summary, record.summary.update)
            elif kind == "history":
                row: dict[str, Any] = {}
                _update(row, record.history.item)
                run.rows.append(row)
            elif kind == "exit":
                run.exit_code = record.exit.exit_code
    return list(runs.values())


def _begin(run: StoredRun, record: Any) -> None:
    run.name, run.project = record.display_name, record.project
    run.group, run.job_type, run.tags = record.run_group, record.job_type, list(record.tags)
    _update(run.config, record.config.update)
    run.config.pop("_wandb", None)


def _update(tree: dict[str, Any], items: Iterable[Any]) -> None:
    """`key` or the path `nested_key`, and a value in JSON. History's keys are paths of one part, slashes included."""
    for item in items:
        *above, last = list(item.nested_key) or [item.key]
        place = tree
        for part in above:
            place = place.setdefault(part, {})
        place[last] = json.loads(item.value_json)


def _records(file: Path) -> Iterator[Any]:
    """Each whole record. A process that was killed leaves half of one at the end: reading stops there."""
    from wandb.proto.wandb_internal_pb2 import Record

    try:
        content = file.read_bytes()
    except OSError as error:
        raise AnonfwError(f"cannot read {file}: {error.strerror}") from error
    if content and not content.startswith(IDENT + VERSION):
        raise AnonfwError(f"{file} is no file of wandb's, or of a format that this version does not know")
    at, parts = len(IDENT + VERSION), b""
    while at + HEADER.size <= len(content):
        left = BLOCK - at % BLOCK
        if left < HEADER.size:
            at += left
            continue
        checksum, length, kind = HEADER.unpack_from(content, at)
        piece = content[at + HEADER.size : at + HEADER.size + length]
        if len(piece) < length or zlib.crc32(bytes([kind]) + piece) != checksum:
            return
        at += HEADER.size + length
        parts = piece if kind in (FULL, FIRST) else parts + piece
        if kind in (FULL, LAST):
            yield Record.FromString(parts)
