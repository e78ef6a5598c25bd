"""Tables as Markdown, CSV and LaTeX, and those that are made of reports."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

NOT_AVAILABLE = "not available"
REFERENCE = "reference"


@dataclass(frozen=True)
class Table:
    """A table for people, and the numbers behind it.

    Attributes:
        caption: what it shows.
        head: a title a column.
        body: rows of as many cells.
        notes: lines below it.
        records: what the CSV holds, tidy and unrounded, {column: value}; None takes the cells.
    """

    caption: str
    head: Sequence[str]
    body: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    records: Sequence[Mapping[str, Any]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        wrong = [row for row in self.body if len(row) != len(self.head)]
        if wrong:
            raise ValueError(f"body must have {len(self.head)} cells a row, got {wrong[0]!r}")

    def markdown(self) -> str:
        """The table and its notes; ends with a newline."""
        rows = [self.head, ["---", *["---:"] * (len(self.head) - 1)], *self.body]
        lines = [f"| {' | '.join(markdown_cell(cell) for cell in row)} |" for row in rows]
        if self.notes:
            lines += ["", *(f"- {' '.join(note.split())}" for note in self.notes)]
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """The records, by a header line; quoted where a value needs it (RFC 4180, `\\n` ends)."""
        records = self.records
        if records is None:
            records = [dict(zip(self.head, row, strict=True)) for row in self.body]
        columns = list(dict.fromkeys(key for record in records for key in record)) or self.head
        out = io.StringIO()
        writer = csv.DictWriter(out, list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _csv_value(value) for key, value in r.items()} for r in records)
        return out.getvalue()

    def latex(self) -> str:
        """A `table` with a `tabular` of booktabs' rules; the notes are comments below it."""
        lines = [
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{latex_escape(self.caption)}}}",
            rf"  \begin{{tabular}}{{l{'r' * (len(self.head) - 1)}}}",
            r"    \toprule",
            f"    {_latex_row(self.head)}",
            r"    \midrule",
            *(f"    {_latex_row(row)}" for row in self.body),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            *(f"% {' '.join(note.split())}" for note in self.notes),
        ]
        return "\n".join(lines) + "\n"


def markdown_cell(text: str) -> str:
    """A text that stays in its cell: one line, no bare `|`."""
    return " ".join(text.split()).replace("|", "\\|")


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "–": "--",
}


def latex_escape(text: str) -> str:
    """A text as LaTeX prints it: its special characters escaped, one line."""
    # Character by character: what one replacement inserts, another must not see.
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def _latex_row(cells: Sequence[str]) -> str:
    # Braces: a cell that begins with [ would be taken for the length after the \\ above it.
    return " & ".join(f"{{{latex_escape(cell)}}}" for cell in cells) + r" \\"


def _csv_value(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    # A spreadsheet runs cells that begin so as formulas; file names can.
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "@") else value


def number(value: float | None, digits: int = 4, sign: bool = False) -> str:
    """A rounded number; `–` where there is none."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"


def interval(low: float | None, high: float | None, sign: bool = False) -> str:
    """`low to high`, or `–` where the spread is unknown."""
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return "–"
    return f"{number(low, sign=sign)} to {number(high, sign=sign)}"


def arrow(entry: Mapping[str, Any]) -> str:
    """` ↑` where higher is better, ` ↓` where lower is, nothing where neither."""
    return {True: " ↑", False: " ↓"}.get(entry.get("higher_is_better"), "")  # type: ignore[arg-type]


def score_table(report: Mapping[str, Any], caption: str = "Scores") -> Table:
    """A report of `score_folder`, a line a metric; what was left out is listed below it."""
    body: list[list[str]] = []
    records: list[dict[str, Any]] = []
    notes: list[str] = []
    for name, entry in report["metrics"].items():
        record: dict[str, Any] = {"metric": name, "title": entry.get("title", name)}
        if "not_available" in entry:
            reason = entry["not_available"]
            body.append([name, NOT_AVAILABLE, reason, "0"])
            records.append(record | {"not_available": reason})
            continue
        count = str(entry["count"])
        body.append(
            [
                f"{name}{arrow(entry)}",
                number(entry["mean"]),
                interval(entry["low"], entry["high"]),
                count,
            ]
        )
        fields = ("higher_is_better", "mean", "low", "high", "count", "not_available")
        records.append(record | {key: entry.get(key) for key in fields})
        notes += [f"{name} skipped {file}: {why}" for file, why in entry["skipped"].items()]
        if entry.get("other_dimension"):
            notes.append(
                f"{name}: {entry['other_dimension']} videos are of prompts that VBench does not "
                "measure it on"
            )
    notes += [f"unreadable {file}: {why}" for file, why in report["unreadable"].items()]
    return Table(caption, ["metric", "mean", "95 % interval", "videos"], body, notes, records)


def method_table(
    reports: Mapping[str, Mapping[str, Any]],
    *,
    baseline: str | None = None,
    extra: Mapping[str, Mapping[str, float]] | None = None,
    caption: str = "Scores of each method",
) -> Table:
    """Reports beside each other: a line a method, a column a metric, `mean [95 % interval]`.

    Args:
        reports: method to report of `score_folder`.
        baseline: the method whose videos are the reference of the others.
        extra: column to {method: value}, put before the metrics.
        caption: of the table.
    """
    extra = extra or {}
    metrics: dict[str, Mapping[str, Any]] = {}
    for report in reports.values():
        for name, entry in report["metrics"].items():
            if "not_available" in metrics.get(name, {"not_available": ""}):
                metrics[name] = entry
    # Columns without a number come last.
    metrics = dict(sorted(metrics.items(), key=lambda item: "not_available" in item[1]))
    notes = [
        f"{entry.get('title', name)}: {NOT_AVAILABLE}: {entry['not_available']}"
        for name, entry in metrics.items()
        if "not_available" in entry
    ]
    head = ["method", *extra]
    head += [f"{entry.get('title', name)}{arrow(entry)}" for name, entry in metrics.items()]
    body: list[list[str]] = []
    records: list[dict[str, Any]] = []
    for method, report in reports.items():
        row = [method, *(number(values.get(method)) for values in extra.values())]
        records += [
            {"method": method, "metric": column, "mean": values[method]}
            for column, values in extra.items()
            if method in values
        ]
        for name in metrics:
            entry = report["metrics"].get(name, {NOT_AVAILABLE: ""})
            is_own = method == baseline and entry.get("needs_reference", False)
            is_own = is_own and "not_available" not in metrics[name]
            row.append(REFERENCE if is_own else _score_cell(entry))
            record = {"method": method, "metric": name}
            if is_own:
                records.append(record | {"not_available": "these are the reference videos"})
                continue
            fields = ("mean", "low", "high", "count", "not_available")
            records.append(record | {key: entry.get(key) for key in fields})
        body.append(row)
        notes += [f"{method}: unreadable {f}: {why}" for f, why in report["unreadable"].items()]
    return Table(caption, head, body, notes, records)


def difference_table(
    differences: Mapping[str, Mapping[str, Mapping[str, Any]]],
    baseline: str,
    caption: str = "",
) -> Table:
    """Paired differences: a line a method, a column a metric, `mean [95 % interval]`.

    Args:
        differences: method to what `sla_eval.report.paired_differences` gives.
        baseline: the method that is subtracted.
    """
    metrics: dict[str, Mapping[str, Any]] = {}
    for found in differences.values():
        for name, entry in found.items():
            metrics.setdefault(name, entry)
    head = ["method", *(f"{e.get('title', n)}{arrow(e)}" for n, e in metrics.items())]
    body: list[list[str]] = []
    records: list[dict[str, Any]] = []
    for method, found in differences.items():
        row = [method]
        for name in metrics:
            one = found.get(name)
            row.append("–" if one is None else _cell(one, sign=True))
            if one is not None:
                values = {key: one[key] for key in ("mean", "low", "high", "count")}
                records.append({"method": method, "metric": name, "minus": baseline, **values})
        body.append(row)
    caption = caption or f"Difference to {baseline}, same prompts and seeds"
    return Table(caption, head, body, (), records)


def _score_cell(entry: Mapping[str, Any]) -> str:
    return NOT_AVAILABLE if "mean" not in entry else _cell(entry)


def _cell(entry: Mapping[str, Any], sign: bool = False) -> str:
    mean = number(entry["mean"], sign=sign)
    spread = interval(entry["low"], entry["high"], sign=sign)
    return mean if spread == "–" else f"{mean} [{spread}]"
