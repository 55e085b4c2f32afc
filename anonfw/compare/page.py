"""The comparison as one HTML file: no script, nothing that is fetched from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from anonfw import __version__
from anonfw.compare.plots import colour
from anonfw.compare.table import Comparison, known
from anonfw.evaluate.intervals import LEVEL, Estimate
from anonfw.evaluate.report import Column

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1c1c1c; background: #fff;
  max-width: 1240px; margin: 2rem auto 4rem; padding: 0 1.5rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.1rem; margin: 2.4rem 0 .5rem; }
p { margin: .3rem 0; } .quiet { color: #5a5a5a; font-size: .88rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: right; vertical-align: top; border-bottom: 1px solid #e6e6e6; }
thead th { border-bottom: 1.5px solid #888; font-weight: 600; vertical-align: bottom; line-height: 1.25; }
th:first-child { text-align: left; position: sticky; left: 0; background: #fff; font-weight: 600; }
.text, td.code { text-align: left; } th, td.text { white-space: nowrap; } thead th.text { text-align: left; }
td.code { overflow-wrap: anywhere; white-space: normal; max-width: 26rem; }
td.code, th.code { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .82rem; }
.reference th, .reference td { color: #6a6a6a; font-weight: 400; background: #fafafa; }
.swatch { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .45em; }
.small { display: block; color: #6a6a6a; font-size: .78rem; } td svg { display: block; margin: .15rem 0 0 auto; }
.note { border-left: 3px solid #D55E00; padding: .35rem .8rem; background: #fff6f0; margin: .6rem 0; }
figure { margin: .6rem 0 0; } figure svg { max-width: 100%; height: auto; display: block; }
figcaption { color: #5a5a5a; font-size: .88rem; margin-top: .3rem; max-width: 60rem; }
"""
HEAD = {"letter", "name", "place"}  # what stands at the head of a run's row


def page(comparison: Comparison, figures: Sequence[tuple[str, str, str]]) -> str:
    """The whole file.

    Args:
        comparison: the table.
        figures: title, SVG element and caption of each.
    """
    count = len(comparison.runs)
    parts = [
        f"<h1>{count} run{'s' if count != 1 else ''} compared</h1>",
        f'<p class="quiet">anonfw {escape(__version__)}. Intervals are {LEVEL:.0%}, over people.</p>',
        *(f'<p class="note">{escape(note[0].upper() + note[1:])}.</p>' for note in comparison.notes),
        "<h2>Runs</h2>" + _runs(comparison),
    ]
    parts += [f"<h2>{escape(title)}</h2>" + _measures(comparison, columns) for title, columns in comparison.blocks()]
    for title, drawing, caption in figures:
        parts.append(f"<h2>{escape(title)}</h2><figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>")
    parts.append("<h2>Where the recipes differ</h2>" + _recipe(comparison))
    names = ", ".join(run["name"] for run in comparison.runs)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(names)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _swatch(number: int) -> str:
    return f'<span class="swatch" style="background:{colour(number)}"></span>'


def _head(comparison: Comparison, row: int) -> str:
    label = list(comparison.rows)[row]
    if row >= len(comparison.runs):
        return f"<th>{escape(label.replace('_', ' '))}</th>"
    return f"<th>{_swatch(row)}{escape(label)}</th>"


def _runs(comparison: Comparison) -> str:
    keys = [key for key in comparison.runs[0] if key not in HEAD and any(run[key] for run in comparison.runs)]
    head = "<th></th>" + "".join(f'<th class="text">{escape(key)}</th>' for key in ("run", *keys))
    lines = []
    for number, run in enumerate(comparison.runs):
        place = "" if run["place"].endswith(run["name"]) else f'<span class="small">{escape(run["place"])}</span>'
        name = run["name"] if place else run["place"]
        cells = "".join(f'<td class="text{" code" * (key == "commit")}">{escape(run[key])}</td>' for key in keys)
        who = f'<th>{_swatch(number)}{run["letter"]}</th><td class="text code">{escape(name)}{place}</td>'
        lines.append(f"<tr>{who}{cells}</tr>")
    return _table(head, lines)


def _measures(comparison: Comparison, columns: Sequence[Column]) -> str:
    """Rows that have any of the columns, the runs first, each cell with its interval drawn on the column's scale."""
    names, rows = list(comparison.rows), list(comparison.rows.values())
    shown = [names.index(name) for name in comparison.rows_with(columns)]
    head = "<th></th>" + "".join(f"<th>{'<br>'.join(map(escape, c.heading))}</th>" for c in columns)
    scales = {c.key: max(_tops(row.get(c.key)) for row in rows) for c in columns}
    lines = []
    for number in shown:
        ours = number < len(comparison.runs)
        ink, kind = (colour(number), "") if ours else ("#8a8a8a", ' class="reference"')
        cells = "".join(f"<td>{_cell(rows[number].get(c.key), c, ink, scales[c.key])}</td>" for c in columns)
        lines.append(f"<tr{kind}>{_head(comparison, number)}{cells}</tr>")
    return _table(head, lines)


def _tops(estimate: Estimate | None) -> float:
    return (
        max((abs(v) for v in (estimate.value, estimate.low, estimate.high) if known(v)), default=0) if estimate else 0
    )


def _cell(estimate: Estimate | None, column: Column, ink: str, top: float) -> str:
    if estimate is None or not known(estimate.value):
        return "–"
    scale = 100 if column.percent else 1
    text = f"{scale * estimate.value:z.{column.decimals}f}"
    if not known(estimate.low):
        return text
    ends = ", ".join(f"{scale * end:z.{column.end_decimals}f}" for end in (estimate.low, estimate.high))
    return f'{text}<span class="small">{ends}</span>{_whisker(estimate, ink, top)}'


def _whisker(estimate: Estimate, ink: str, top: float, width: int = 70) -> str:
    """The interval and its estimate between 0 and the column's largest end."""
    low, value, high = (3 + (width - 6) * max(v, 0) / (top or 1) for v in (estimate.low, estimate.value, estimate.high))
    return (
        f'<svg width="{width}" height="9" role="img" aria-label="interval"><path d="M0 4.5H{width}" stroke="#eee"/>'
        f'<path d="M{low:.1f} 4.5H{high:.1f}" stroke="{ink}" stroke-width="2"/>'
        f'<circle cx="{value:.1f}" cy="4.5" r="3" fill="{ink}"/></svg>'
    )


def _recipe(comparison: Comparison) -> str:
    if not comparison.recipe:
        return "<p>Nowhere.</p>"
    heads = [f"<th>{_swatch(number)}{escape(run['letter'])}</th>" for number, run in enumerate(comparison.runs)]
    lines = []
    for key, values in comparison.recipe.items():
        cells = "".join(f'<td class="code">{escape(value)}</td>' for value in values)
        lines.append(f'<tr><th class="code">{escape(key)}</th>{cells}</tr>')
    return _table("<th></th>" + "".join(heads), lines)


def _table(head: str, lines: Sequence[str]) -> str:
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
