"""The result table: what was measured, on what, with which thresholds; as text, JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import io
import json
import math
import textwrap
from dataclasses import asdict, dataclass, field
from pathlib import Path

from anonfw.data.files import atomic
from anonfw.evaluate.intervals import LEVEL, Estimate
from anonfw.evaluate.protocols import Threshold

WIDTH = 110  # columns of a terminal


def rate_label(fpr: float) -> str:
    """0.001 -> "1e-3", 0.05 -> "5e-2"."""
    mantissa, exponent = f"{fpr:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


@dataclass(frozen=True)
class Column:
    """One measure of the table.

    Attributes:
        key: in a row. heading: two lines. decimals, end_decimals: of the value and of its interval's ends in text.
        percent: a rate, shown as a percentage (files keep the fraction).
        trivial_for_original: for the row "original" it would compare a photo with itself.
    """

    key: str
    heading: tuple[str, str]
    decimals: int = 1
    end_decimals: int = 1
    percent: bool = False
    trivial_for_original: bool = False


def privacy_columns(fprs: list[float]) -> list[Column]:
    """Verification and retrieval: lower is better for the person in the photo."""
    columns = []
    for attack, words, trivial in (("source", "own photo", True), ("other", "other photo", False)):
        for fpr in fprs:
            label = rate_label(fpr)
            columns.append(Column(f"tpr_{attack}@{label}", (f"TPR % @{label}", words), 1, 1, True, trivial))
        columns.append(Column(f"top1_{attack}", ("top-1 %", words), 1, 1, True, trivial))
    return columns


def utility_columns() -> list[Column]:
    """What is kept, and how different several anonymizations of one photo are."""
    return [
        Column("cosine_source", ("cosine to", "own photo"), 2, 2, trivial_for_original=True),
        Column("diversity", ("identity", "diversity"), 2, 2),
        Column("detected", ("face", "detected %"), percent=True),
        Column("pose_error", ("pose", "error deg"), trivial_for_original=True),
        Column("expression_error", ("expression", "error sd"), 2, trivial_for_original=True),
        Column("outside_distance", ("outside the", "face 0..255"), trivial_for_original=True),
    ]


@dataclass
class Table:
    """Rows of estimates, printed in blocks of columns with the facts below. A kind of table says which.

    Attributes:
        rows: row name -> measure -> Estimate, in the order of the table.
    """

    rows: dict[str, dict[str, Estimate]]

    def blocks(self) -> list[tuple[str, list[Column]]]:
        """Title and columns of each block."""
        raise NotImplementedError

    def facts(self) -> list[str]:
        """Lines that belong beside the numbers."""
        raise NotImplementedError

    def closing(self, folder: Path) -> list[str]:
        """What a verb prints below the table: what else was written into `folder`."""
        return [f"table  {folder / 'table.txt'} (.md .csv .json)"]

    def rows_with(self, columns: list[Column]) -> dict[str, dict[str, Estimate]]:
        """The rows that have at least one of these measures."""
        return {name: row for name, row in self.rows.items() if any(column.key in row for column in columns)}

    def value(self, row: str, measure: str) -> Estimate:
        """One cell. KeyError names what there is."""
        if row not in self.rows or measure not in self.rows[row]:
            measures = list(next(iter(self.rows.values()), {}))
            raise KeyError(f"no {measure!r} of {row!r}; rows {list(self.rows)}, measures {measures}")
        return self.rows[row][measure]

    def text(self) -> str:
        """The table for a terminal, WIDTH columns wide at most."""
        parts = []
        for title, columns in self.blocks():
            if rows := self.rows_with(columns):
                parts.append("\n".join([title, *_fixed_width(rows, columns)]))
        facts = [textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in self.facts()]
        return "\n\n".join([*parts, "\n".join(facts)]) + "\n"

    def markdown(self) -> str:
        """The same as Markdown tables; the numbers behind each cell are in the CSV."""
        parts = []
        for title, columns in self.blocks():
            if not (rows := self.rows_with(columns)):
                continue
            head = ["", *(" ".join(column.heading) for column in columns)]
            lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
            for name, row in rows.items():
                cells = [_cell(row.get(c.key), c, name) for c in columns]
                lines.append("| " + " | ".join([name, *cells]) + " |")
            parts.append("\n".join([f"**{title}**", "", *lines]))
        return "\n\n".join([*parts, "\n".join(f"- {line.strip()}" for line in self.facts())]) + "\n"

    def csv(self) -> str:
        """One line a cell: row, measure, value, low, high, n, people, method."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["row", "measure", "value", "low", "high", "n", "people", "interval"])
        for name, row in self.rows.items():
            for measure, e in row.items():
                writer.writerow([name, measure, e.value, e.low, e.high, e.n, e.people, e.method])
        return stream.getvalue()

    def as_dict(self) -> dict:
        """Plain types only; NaN becomes None. It says how it is read: columns by block, order of the rows, facts."""
        blocks = [{"title": title, "columns": [asdict(c) for c in columns]} for title, columns in self.blocks()]
        return _plain({**asdict(self), "order": list(self.rows), "blocks": blocks, "facts": self.facts()})

    def save(self, folder: str | Path) -> dict[str, Path]:
        """Write table.json, table.csv, table.md and table.txt into `folder`, each atomically; returns their paths."""
        contents = {
            "json": json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n",
            "csv": self.csv(),
            "md": self.markdown(),
            "txt": self.text(),
        }
        Path(folder).mkdir(parents=True, exist_ok=True)
        paths = {kind: Path(folder) / f"table.{kind}" for kind in contents}
        for kind, path in paths.items():
            with atomic(path) as stream:
                stream.write(contents[kind].encode())
        return paths


@dataclass
class Report(Table):
    """Rows of estimates and everything needed to read them.

    Attributes:
        rows: the anonymizer's row comes first.
        thresholds: operating points, fixed on original impostor pairs.
        judge: name, sha256 and licence of the recogniser.
        people, photos: what was anonymized; `draws` anonymizations of each photo were made.
        gallery, gallery_people: originals that thresholds and retrieval use, and how many people are on them.
        chance_top1: top-1 rate of a random ranking, own photo included.
        spread: standard deviation over originals of each expression measure: the unit of the expression error.
        settings: seed, detection threshold, alignment, further facts worth a line in the JSON.
        cost_ms: milliseconds per image of each scorer and of the anonymizer.
        notes: what a reader must know about this set, in sentences.
    """

    thresholds: list[Threshold]
    judge: dict[str, str]
    people: int
    photos: int
    draws: int
    gallery: int
    gallery_people: int
    chance_top1: float
    spread: dict[str, float]
    settings: dict[str, object] = field(default_factory=dict)
    cost_ms: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def blocks(self) -> list[tuple[str, list[Column]]]:
        fprs = [threshold.fpr for threshold in self.thresholds]
        return [
            ("Identity that a recogniser still finds: lower is better", privacy_columns(fprs)),
            ("Utility: what is kept, and how much the anonymizations of one photo differ", utility_columns()),
        ]

    def facts(self) -> list[str]:
        """Lines that belong beside the numbers."""
        lines = [
            f"{self.people} people, {self.photos} photos, {self.draws} anonymizations of each; "
            f"judge {self.judge['name']}; [..] = {LEVEL:.0%} interval over people",
        ]
        for t in self.thresholds:
            unresolved = "" if t.resolved else "  (too few pairs for this rate: read as an upper end)"
            lines.append(
                f"FPR {rate_label(t.fpr)}: cosine > {t.value:.4f}, "
                f"{t.accepted} of {t.pairs} pairs of different people's originals accepted{unresolved}"
            )
        lines.append("thresholds are fixed on the originals and kept for every row")
        lines.append(
            f"top-1: gallery of {self.gallery} originals of {self.gallery_people} people, "
            f"chance {100 * self.chance_top1:.1f} %; "
            f"face detected: SCRFD-500M score >= {self.settings.get('detection_threshold')}"
        )
        return lines + self.notes

    def closing(self, folder: Path) -> list[str]:
        cost = ", ".join(f"{name} {ms:.1f}" for name, ms in self.cost_ms.items())
        return [f"milliseconds per image: {cost}", *super().closing(folder), f"grid   {folder / 'grid.png'}"]


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _end(value: float, decimals: int) -> str:
    """An interval's end: no zero before the point, no decimals from 10 on."""
    text = f"{value:z.{0 if abs(value) >= 9.95 else decimals}f}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def _cell(estimate: Estimate | None, column: Column, row: str) -> str:
    """`1.2 [.4,3.0]`; "same" where a photo would be compared with itself, "-" where nothing was measured."""
    if row == "original" and column.trivial_for_original:
        return "same"
    if estimate is None or math.isnan(estimate.value):
        return "-"
    scale = 100.0 if column.percent else 1.0
    value = f"{scale * estimate.value:z.{column.decimals}f}".replace("100.0", "100")
    if math.isnan(estimate.low):
        return value
    ends = [_end(scale * end, column.end_decimals) for end in (estimate.low, estimate.high)]
    return f"{value} [{','.join(ends)}]"


def _fixed_width(rows: dict[str, dict[str, Estimate]], columns: list[Column]) -> list[str]:
    cells = {name: [_cell(row.get(c.key), c, name) for c in columns] for name, row in rows.items()}
    widths = [
        max([len(part) for part in column.heading] + [len(line[i]) for line in cells.values()])
        for i, column in enumerate(columns)
    ]
    label = max(len(name) for name in rows)
    lines = [
        "  ".join([" " * label, *(part.rjust(width) for part, width in zip(parts, widths, strict=True))])
        for parts in zip(*(column.heading for column in columns), strict=True)
    ]
    lines.append("-" * len(lines[0]))
    for name, line in cells.items():
        lines.append("  ".join([name.ljust(label), *(c.rjust(w) for c, w in zip(line, widths, strict=True))]))
    return [line.rstrip() for line in lines]
