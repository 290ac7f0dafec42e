"""What the benchmark reports: its raw results as JSON, a Markdown table for README.md, a chart as SVG.

All of it is made from `Measurement`s alone, so a report can be made again from the raw results of an earlier
run.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

PHASES = {"first": "first run", "unchanged": "unchanged", "changed": "1 % changed"}
RESTORE = "restored"  # a phase of those who can: into an empty bucket
BASELINE = "plain"  # what the ratios are to
CHART_GROUP = ("mixed", 20)

BEGIN, END = "<!-- benchmark begin -->", "<!-- benchmark end -->"
CHART_PATH = "tests/benchmark.svg"  # relative to README.md

# What AWS takes for S3 Standard in us-east-1, in dollars for 1,000 requests.
DOLLARS = {
    "LIST": 0.005,
    "PUT": 0.005,
    "COPY": 0.005,
    "POST": 0.005,
    "GET": 0.0004,
    "HEAD": 0.0004,
    "DELETE": 0,
}
RUNS_A_MONTH = 30


class ReportError(Exception):
    """The report cannot be made: what is missing."""


@dataclass(frozen=True)
class Measurement:
    """One run of one contender."""

    contender: str
    dataset: str
    latency_ms: int | None  # None: it uses no network
    phase: str
    seconds: float = 0
    peak_bytes: int = 0  # of all its processes together
    requests: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # source or target → kind → count
    traffic: Mapping[str, int] = field(default_factory=dict)  # `from source`, … → bytes
    failure: str = ""  # why it failed; empty when it did not

    @property
    def series(self) -> tuple[str, int | None, str]:
        """What the runs of all phases into the same target share."""
        return self.dataset, self.latency_ms, self.contender

    @property
    def request_count(self) -> int:
        """All requests, to source and target."""
        return sum(sum(kinds.values()) for kinds in self.requests.values())

    @property
    def dollars_a_month(self) -> float:
        """The price of the requests of daily runs like this one; storage and traffic not included."""
        return RUNS_A_MONTH * sum(map(price, self.requests.values()))


def price(requests: Mapping[str, int]) -> float:
    """Dollars for requests (kind → count); a kind that is not in the price list counts as the dearest."""
    dearest = max(DOLLARS.values())
    return sum(DOLLARS.get(kind, dearest) * count / 1000 for kind, count in requests.items())


# ------------------------------------------------------------------------------------------------ Raw results


def save(path: Path, machine: Mapping[str, Any], measurements: Iterable[Measurement]) -> None:
    """Write raw results: what was measured, and on what."""
    raw = {"machine": dict(machine), "measurements": [asdict(measurement) for measurement in measurements]}
    path.write_text(json.dumps(raw, indent=1) + "\n")


def load(path: Path) -> list[Measurement]:
    """What `save` has written. Raises ReportError."""
    try:
        return [Measurement(**entry) for entry in json.loads(path.read_text())["measurements"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path} cannot be used: {error}") from error


# ------------------------------------------------------------------------------------------------------ Table

COLUMNS = (
    "bucket",
    "contender",
    *(f"{title}, s (of plain)" for title in PHASES.values()),
    "restored into a bucket, s",
    "requests",
    "read from source, MB",
    "peak memory, MB",
    "$ a month",
)


@dataclass(frozen=True)
class Row:
    """All phases of one contender with one bucket and latency."""

    phases: Mapping[str, Measurement]

    @property
    def any(self) -> Measurement:
        """One of them, for what they share."""
        return next(iter(self.phases.values()))

    @property
    def group(self) -> tuple[str, int | None]:
        """What is compared with each other: bucket and latency."""
        return self.any.dataset, self.any.latency_ms


def rows(measurements: Iterable[Measurement]) -> list[Row]:
    """The measurements, a row for each contender, bucket and latency, in the order of their first run."""
    found: dict[tuple[str, int | None, str], dict[str, Measurement]] = {}
    for one in measurements:
        found.setdefault(one.series, {})[one.phase] = one
    return [Row(phases) for phases in found.values()]


def ratio(row: Row, phase: str, all_rows: Iterable[Row]) -> float | None:
    """How long this row's phase took in units of the baseline's time; None where one of them is missing."""
    for other in all_rows:
        if other.group == row.group and other.any.contender == BASELINE:
            pair = other.phases.get(phase), row.phases.get(phase)
            if all(one and not one.failure for one in pair):
                return pair[1].seconds / pair[0].seconds  # type: ignore[union-attr]
    return None


def seconds_text(seconds: float) -> str:
    """Three digits at most, and no more than one behind the point."""
    return f"{seconds:.1f}" if seconds < 99.95 else f"{seconds:,.0f}"


def _time_cell(row: Row, phase: str, all_rows: Sequence[Row]) -> str:
    if phase not in row.phases:
        return "-"
    if row.phases[phase].failure:
        return "failed"
    found = ratio(row, phase, all_rows)
    text = seconds_text(row.phases[phase].seconds)
    return text if found is None or row.any.contender == BASELINE else f"{text} ({found:.0%})"


def _requests_cell(row: Row) -> str:
    if row.any.latency_ms is None:
        return "-"
    found = (row.phases.get(phase) for phase in PHASES)
    return " / ".join(f"{one.request_count:,}" if one and not one.failure else "-" for one in found)


def _dollars_cell(row: Row) -> str:
    changed = row.phases.get("changed")
    if row.any.latency_ms is None or not changed or changed.failure:
        return "-"
    return f"{changed.dollars_a_month:.3f}"


def _source_cell(row: Row) -> str:
    first = row.phases.get("first")
    if row.any.latency_ms is None or not first or first.failure:
        return "-"
    return f"{first.traffic.get('from source', 0) / 1e6:.0f}"


def _row_cells(row: Row, all_rows: Sequence[Row]) -> list[str]:
    latency = "" if row.any.latency_ms is None else f", {row.any.latency_ms} ms"
    peak = max(one.peak_bytes for one in row.phases.values())
    return [
        row.any.dataset + latency,
        row.any.contender,
        *(_time_cell(row, phase, all_rows) for phase in (*PHASES, RESTORE)),
        _requests_cell(row),
        _source_cell(row),
        f"{peak / 1e6:.0f}" if peak else "-",
        _dollars_cell(row),
    ]


def table(measurements: Iterable[Measurement]) -> str:
    """A Markdown table; in brackets, times in percent of the baseline's."""
    all_rows = rows(measurements)
    alignment = [":---", ":---", *["---:"] * (len(COLUMNS) - 2)]
    lines = [COLUMNS, alignment, *(_row_cells(row, all_rows) for row in all_rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# ------------------------------------------------------------------------------------------------------ Chart

WIDTH, LABEL_WIDTH, VALUE_WIDTH = 760, 190, 60
BAR_HEIGHT, BAR_STEP, GROUP_GAP, TOP, BOTTOM = 13, 15, 12, 74, 30
TICKS = 5
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f }
.title { font-size: 16px; font-weight: 600 }
.small { font-size: 12px }
.grid { stroke: #8c959f; stroke-opacity: 0.35 }
.first { fill: #3f7fbf } .unchanged { fill: #4aa564 } .changed { fill: #d98a2b }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } }
"""


def telling(measurements: Iterable[Measurement]) -> list[Measurement]:
    """Those of one bucket and latency, the usual one if it was measured, and what needs no network."""
    everything = list(measurements)
    groups = [(one.dataset, one.latency_ms) for one in everything]
    dataset, latency_ms = CHART_GROUP if CHART_GROUP in groups else next(iter(groups), CHART_GROUP)
    return [one for one in everything if one.dataset == dataset and one.latency_ms in (latency_ms, None)]


def _chart_rows(measurements: Sequence[Measurement]) -> list[Row]:
    """The telling rows; those without all phases are left out."""
    complete = [row for row in rows(telling(measurements)) if PHASES.keys() <= row.phases.keys()]
    if not complete:
        raise ReportError(
            "there is no contender that was measured in all phases, so there is nothing to draw"
        )
    return complete


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def _legend() -> Iterator[str]:
    x = LABEL_WIDTH
    for phase, title in PHASES.items():
        yield f'<rect x="{x}" y="40" width="12" height="12" class="{phase}"/>'
        yield _text(x + 18, 51, title, "small")
        x += 120


def tick_step(largest: float) -> float:
    """A round distance (1, 2 or 5 times a power of ten) that makes about TICKS ticks up to `largest`."""
    step = 1e-3
    while True:
        for factor in (1, 2, 5):
            if step * factor * TICKS >= largest:
                return step * factor
        step *= 10


def _grid(largest: float, scale: float, bottom: float) -> Iterator[str]:
    step = tick_step(largest)
    for number in range(int(largest / step) + 1):
        x = LABEL_WIDTH + number * step * scale
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{bottom}" class="grid"/>'
        yield _text(x, bottom + 16, f"{number * step:g} s", "small", "middle")


def _bars(row: Row, y: float, scale: float) -> Iterator[str]:
    yield _text(LABEL_WIDTH - 10, y + BAR_STEP * 1.8, row.any.contender, anchor="end")
    for number, phase in enumerate(PHASES):
        top = y + number * BAR_STEP
        one = row.phases[phase]
        width = 0 if one.failure else one.seconds * scale
        size = f'width="{width:.1f}" height="{BAR_HEIGHT}"'
        yield f'<rect x="{LABEL_WIDTH}" y="{top:.0f}" {size} class="{phase}"/>'
        value = "failed" if one.failure else seconds_text(one.seconds)
        yield _text(LABEL_WIDTH + width + 5, top + BAR_HEIGHT - 2, value, "small")


def _chart_title(charted: Sequence[Row]) -> str:
    latency_ms = max((row.any.latency_ms for row in charted if row.any.latency_ms is not None), default=0)
    return (
        f"Seconds to back up the bucket “{charted[0].any.dataset}”, {latency_ms} ms latency (less is better)"
    )


def chart(measurements: Sequence[Measurement]) -> str:
    """An SVG of horizontal bars: seconds of each contender and phase. Raises ReportError."""
    charted = _chart_rows(measurements)
    largest = max(
        (row.phases[phase].seconds for row in charted for phase in PHASES if not row.phases[phase].failure),
        default=1,
    )
    scale = (WIDTH - LABEL_WIDTH - VALUE_WIDTH) / largest
    group_height = len(PHASES) * BAR_STEP + GROUP_GAP
    bottom = TOP + len(charted) * group_height
    title = _chart_title(charted)
    size = f'width="{WIDTH}" height="{bottom + BOTTOM}" viewBox="0 0 {WIDTH} {bottom + BOTTOM}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        _text(10, 24, title, "title"),
        *_legend(),
        *_grid(largest, scale, bottom),
    ]
    for number, row in enumerate(charted):
        parts += _bars(row, TOP + number * group_height, scale)
    return "\n".join([*parts, "</svg>", ""])


# ------------------------------------------------------------------------------------------------------ Files


def replace_between_markers(text: str, content: str, first: str = BEGIN, last: str = END) -> str:
    """The text with what is between the two markers, and only that, replaced. Raises ReportError."""
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ReportError(f"the lines {first} and {last} are missing")
    return f"{before}{first}\n{content}\n{last}{after}"


def write_report(measurements: Sequence[Measurement], readme: Path) -> None:
    """Write the telling rows into README.md and the chart beside it.

    Variants of a contender, with an option, are in the chart only. Raises ReportError, and then writes
    nothing.
    """
    svg = chart(measurements)
    image = f"![Bar chart: seconds of each contender]({CHART_PATH})"
    rows_for_readme = [one for one in telling(measurements) if ", --" not in one.contender]
    text = replace_between_markers(readme.read_text(), f"{table(rows_for_readme)}\n\n{image}")
    (readme.parent / CHART_PATH).write_text(svg)
    readme.write_text(text)
