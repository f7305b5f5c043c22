"""Figures beside their goals: printed for people, as JSON for programs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """What the ratio cloudfs / baseline must be: at least or at most `bound`."""

    bound: float
    at_least: bool

    def met(self, ratio: float) -> bool:
        """Whether `ratio` is good enough."""
        return ratio >= self.bound if self.at_least else ratio <= self.bound

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.bound:.2f}"


def at_least(bound: float) -> Goal:
    """A goal for what should be large: throughput."""
    return Goal(bound, at_least=True)


def at_most(bound: float) -> Goal:
    """A goal for what should be small: time."""
    return Goal(bound, at_least=False)


@dataclass(frozen=True)
class Row:
    """One figure of both sides: the samples of all rounds, in the order in which they were measured."""

    title: str
    unit: str
    baseline: Sequence[float]
    subject: Sequence[float]
    goal: Goal | None = None

    @property
    def ratio(self) -> float:
        """Median of the subject by median of the baseline."""
        below = statistics.median(self.baseline)
        return statistics.median(self.subject) / below if below else float("inf")

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest ratio of two neighbouring rounds."""
        ratios = [s / b for s, b in zip(self.subject, self.baseline, strict=True) if b]
        return (min(ratios), max(ratios)) if ratios else (self.ratio, self.ratio)

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None where there is none."""
        return None if self.goal is None else self.goal.met(self.ratio)


@dataclass(frozen=True)
class Table:
    """Rows that compare the same two sides."""

    title: str
    baseline: str
    subject: str
    rows: Sequence[Row]

    def __str__(self) -> str:
        head = ("", self.baseline, self.subject, "ratio", "(spread)", "goal", "met")
        lines = [head, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = [self.title, ""]
        for line in lines:
            cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
            text.append("  " + "  ".join(cells).rstrip())
        return "\n".join(text) + "\n"

    def json(self) -> dict[str, object]:
        """The table with every sample."""
        return {
            "title": self.title,
            "baseline": self.baseline,
            "subject": self.subject,
            "rows": [
                {
                    "figure": row.title,
                    "unit": row.unit,
                    "baseline": statistics.median(row.baseline),
                    "subject": statistics.median(row.subject),
                    "ratio": row.ratio,
                    "spread": row.spread,
                    "goal": None if row.goal is None else str(row.goal),
                    "met": row.met,
                    "baseline_samples": list(row.baseline),
                    "subject_samples": list(row.subject),
                }
                for row in self.rows
            ],
        }


def _cells(row: Row) -> tuple[str, ...]:
    low, high = row.spread
    return (
        row.title,
        _quantity(statistics.median(row.baseline), row.unit),
        _quantity(statistics.median(row.subject), row.unit),
        f"{row.ratio:.2f}",
        f"({low:.2f}-{high:.2f})",
        "-" if row.goal is None else str(row.goal),
        {None: "-", True: "yes", False: "NO"}[row.met],
    )


def _quantity(value: float, unit: str) -> str:
    digits = 0 if value >= 1000 else 1 if value >= 100 else 2 if value >= 1 else 3
    return f"{value:.{digits}f} {unit}"


def missed(tables: Iterable[Table]) -> list[Row]:
    """The rows whose goals are not met."""
    return [row for table in tables for row in table.rows if row.met is False]
