"""Measures s3borgbackup against other ways to back up a bucket, on this machine alone.

`tests/benchmark` installs what it needs and starts it. All contenders read the same bucket of the same S3
server, through a proxy that adds the latency, and write to buckets of their own: first into an empty one,
then with nothing changed, then with 1 % of the objects overwritten.

Everything takes about half an hour on two cores. What it makes is in a temporary folder, which is removed at
the end, after Ctrl-C too.
"""

import argparse
import contextlib
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from benchmark_contenders import BEFORE, CONTENDERS, Contender, Place, measure
from benchmark_report import PHASES, RESTORE, Measurement, ReportError, load, save, table, write_report
from demo import STOP_SIGNALS, say, stop, workplace
from helpers import Bucket, seal_environment
from servers import ADMIN, SeaweedFS, ServerError, ToxicProxy, Toxiproxy, s3_client

README = Path(__file__).resolve().parent.parent / "README.md"

SEED = 107
CHANGED_SHARE = 0.01
FOLDER_COUNT = 50
# S3's times are in whole seconds, and borg does not trust a time that is the newest of all.
SETTLE_SECONDS = 3
LATENCY_PROBES = 9
BUSY_LOAD = 0.5
EXIT_FAILED, EXIT_USAGE = 1, 2


# ------------------------------------------------------------------------------------------------------- Data


@dataclass(frozen=True)
class Dataset:
    """What is in the source bucket: always the same objects. Every other one can be compressed.

    The last one is to be small: it becomes the newest object of all, which borg reads again each time.
    """

    name: str
    description: str
    sizes: Callable[[random.Random], list[int]]
    settle_seconds: float = SETTLE_SECONDS

    def objects(self) -> Iterator[tuple[str, bytes]]:
        """Key and content of each object, one at a time."""
        chance = random.Random(SEED)
        lines = [chance.randbytes(20).hex().encode() + b"\n" for _ in range(200)]
        for number, size in enumerate(self.sizes(random.Random(SEED))):
            key = f"folder-{number % FOLDER_COUNT:02}/object-{number:05}"
            yield key, _content(chance, size, lines if number % 2 else [])

    def changes(self) -> Iterator[tuple[str, bytes]]:
        """Key and new content of one object in a hundred, at least of one; their sizes stay the same."""
        sizes = self.sizes(random.Random(SEED))[:-1]
        chance = random.Random(SEED + 1)
        ordinary = [number for number, size in enumerate(sizes) if size <= 2 * statistics.median(sizes)]
        for number in chance.sample(ordinary, max(1, round(len(sizes) * CHANGED_SHARE))):
            yield f"folder-{number % FOLDER_COUNT:02}/object-{number:05}", chance.randbytes(sizes[number])


def _content(chance: random.Random, size: int, lines: Sequence[bytes]) -> bytes:
    if not lines:
        return chance.randbytes(size)
    return b"".join(chance.choices(lines, k=size // len(lines[0]) + 1))[:size]


def _mixed_sizes(chance: random.Random) -> list[int]:
    small = [chance.randrange(1_000, 46_000) for _ in range(2_000)]
    return [*small[:500], 30_000_000, *small[500:1_000], 30_000_000, *small[1_000:]]


DATASETS = {
    dataset.name: dataset
    for dataset in (
        Dataset("mixed", "2,002 objects, 107 MB: 2,000 of 1 to 46 KB, two of 30 MB", _mixed_sizes),
        Dataset(
            "small",
            "1,500 objects of 5 to 20 KB",
            lambda chance: chance.choices(range(5_000, 20_000), k=1_500),
        ),
        Dataset("large", "6 objects of 40 MB, and a small one", lambda _: [*[40_000_000] * 6, 1_000]),
        Dataset("tiny", "30 objects, to try the benchmark itself", lambda _: [10_000] * 30, 1),
    )
}


# ------------------------------------------------------------------------------------------------------- Plan

DEFAULT_LATENCIES = {"mixed": (20, 0, 100), "small": (20,), "large": (20,), "tiny": (0,)}
VARIANTS_AT = ("mixed", 20)


@dataclass(frozen=True)
class Group:
    """Contenders that are compared with each other: the same objects, the same latency."""

    dataset: Dataset
    latency_ms: int
    contenders: tuple[Contender, ...]


def plan(
    datasets: Sequence[str] | None, latencies: Sequence[int] | None, contenders: Sequence[str] | None
) -> list[Group]:
    """What to measure; None stands for what is usual.

    What needs no network is measured once for each bucket, as latency is nothing to it.
    """
    groups = []
    for dataset in datasets or [name for name in DATASETS if name != "tiny"]:
        for number, latency_ms in enumerate(latencies or DEFAULT_LATENCIES[dataset]):
            usual = [
                name
                for name, contender in CONTENDERS.items()
                if (not contender.is_variant or (dataset, latency_ms) == VARIANTS_AT)
                and (not contender.is_asked_for or BEFORE in os.environ)
            ]
            chosen = [CONTENDERS[name] for name in contenders or usual]
            groups.append(
                Group(
                    DATASETS[dataset],
                    latency_ms,
                    tuple(one for one in chosen if not (one.is_local and number)),
                )
            )
    return [group for group in groups if group.contenders]


def missing_programs(groups: Sequence[Group]) -> list[str]:
    """Programs that are not on the PATH and take part."""
    needed = {program for group in groups for one in group.contenders for program in one.programs}
    return sorted(program for program in needed if not shutil.which(program))


# -------------------------------------------------------------------------------------------------- Measuring


class Benchmark:
    """Runs groups of contenders and keeps what was measured, in a file, too, if one is named."""

    def __init__(self, json_path: Path | None = None) -> None:
        self.measurements: list[Measurement] = []
        self._json_path = json_path
        self._machine = machine()
        self._started = time.monotonic()

    def run(self, groups: Sequence[Group]) -> None:
        """Measure all groups, each with servers of its own."""
        if os.getloadavg()[0] > BUSY_LOAD:
            say(f"This machine is busy (load {os.getloadavg()[0]:.1f}): times will be longer")
        for group in groups:
            with (
                workplace("benchmark") as folder,
                SeaweedFS(has_metrics=True) as server,
                Toxiproxy() as toxiproxy,
            ):
                proxy = toxiproxy.proxy(server.endpoint)
                with _latency(proxy, group.latency_ms):
                    self._run_group(group, server, proxy, folder)

    def _run_group(self, group: Group, server: SeaweedFS, proxy: ToxicProxy, folder: Path) -> None:
        name = f"{group.dataset.name}, {group.latency_ms} ms"
        self._say(f"{name}: {group.dataset.description}")
        source, files = Bucket(server, "source").create(), folder / "files"
        new_bytes = _store(group.dataset.objects(), source, files, group.dataset.settle_seconds)
        self._say(f"{name}: a request takes {request_milliseconds(proxy.endpoint, source):.1f} ms")
        places = [
            _place(one, number, server, proxy, folder) for number, one in enumerate(group.contenders, 1)
        ]
        self._run_phase(group, places, "first", new_bytes)
        self._run_phase(group, places, "unchanged", 0)
        new_bytes = _store(group.dataset.changes(), source, files, group.dataset.settle_seconds)
        self._run_phase(group, places, "changed", new_bytes)
        self._run_phase(group, places, RESTORE, 0)

    def _run_phase(self, group: Group, places: Sequence[Place], phase: str, new_bytes: int) -> None:
        """All contenders, one after another; without those that failed before."""
        earlier = self.measurements[:]
        for contender, place in zip(group.contenders, places, strict=True):
            if phase not in contender.phases:
                continue
            latency_ms = None if contender.is_local else group.latency_ms
            described = Measurement(contender.name, group.dataset.name, latency_ms, phase)
            what = f"{contender.name}, {PHASES.get(phase, phase)}"
            self._say(f"{group.dataset.name}, {group.latency_ms} ms: {what} ...")
            if any(one.failure and one.series == described.series for one in earlier):
                self._keep(replace(described, failure="not run, as an earlier run failed"))
            else:
                self._keep(measure(contender, place, described, new_bytes))

    def _keep(self, one: Measurement) -> None:
        self.measurements.append(one)
        if self._json_path:
            save(self._json_path, self._machine, self.measurements)
        if one.failure:
            self._say(f"    FAILED: {one.failure}")
            return
        megabytes = ", ".join(f"{size / 1e6:.1f} MB {way}" for way, size in one.traffic.items())
        requests = f"{one.request_count:,} requests, {megabytes}, " if one.latency_ms is not None else ""
        self._say(f"    {one.seconds:.1f} s, {requests}{one.peak_bytes / 1e6:.0f} MB of memory")

    def _say(self, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        say(f"[{minutes:3}:{seconds:02}] {text}")


def _place(contender: Contender, number: int, server: SeaweedFS, proxy: ToxicProxy, folder: Path) -> Place:
    """Where a contender works, with its empty buckets."""
    targets = tuple(f"target-{number}-{copy}" for copy in range(contender.target_count))
    restored = f"restored-{number}"
    for name in (*targets, restored):
        Bucket(server, name).create()
    own = folder / f"contender-{number}"
    own.mkdir()
    return Place(own, server, proxy.endpoint, "source", targets, folder / "files", restored)


@contextlib.contextmanager
def _latency(proxy: ToxicProxy, milliseconds: int) -> Iterator[None]:
    """In this block every answer comes so much later. To connect takes no longer."""
    with proxy.toxic("latency", latency=milliseconds) if milliseconds else contextlib.nullcontext():
        yield


def request_milliseconds(endpoint: str, bucket: Bucket) -> float:
    """How long a small request takes there: the median, so that connecting does not count."""
    client = s3_client(endpoint, ADMIN)
    times = []
    for _ in range(LATENCY_PROBES):
        started = time.perf_counter()
        client.head_bucket(Bucket=bucket.name)
        times.append((time.perf_counter() - started) * 1000)
    return statistics.median(times)


def _store(objects: Iterator[tuple[str, bytes]], bucket: Bucket, files: Path, settle_seconds: float) -> int:
    """Write objects into the bucket and as files, wait until their times are past, return their bytes.

    The last one comes later than the others, as borg reads again what has the newest time of all.
    """
    written = dict(objects)
    last = next(reversed(written))
    for part in ({key: body for key, body in written.items() if key != last}, {last: written[last]}):
        bucket.put(part)
        for key, body in part.items():
            (files / key).parent.mkdir(parents=True, exist_ok=True)
            (files / key).write_bytes(body)
        time.sleep(settle_seconds)
    return sum(map(len, written.values()))


def machine() -> dict[str, str | int]:
    """What the results depend on: this machine, the programs' versions."""
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    versions = {
        "borg": ["borg", "--version"],
        "tigrisfs": ["tigrisfs", "--version"],
        "restic": ["restic", "version"],
        "rclone": ["rclone", "--version"],
        "seaweedfs": ["weed", "version"],
    }
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": model[0].partition(":")[2].strip() if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 1_000_000,
        "kernel": platform.release(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: _first_line(command) for name, command in versions.items() if shutil.which(command[0])},
    }


def _first_line(command: Sequence[str]) -> str:
    output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    return output.strip().partition("\n")[0]


# ----------------------------------------------------------------------------------------------- Command line


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; ends with 2 where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="tests/benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shown = ", ".join(name for name in DATASETS if name != "tiny")
    options: Mapping[str, Mapping[str, object]] = {
        "--dataset": {"choices": DATASETS, "metavar": "NAME", "help": f"{shown}; default: all of these"},
        "--latency": {
            "type": int,
            "metavar": "MS",
            "help": "of each request; default: 20, for mixed also 0 and 100",
        },
        "--contender": {
            "choices": CONTENDERS,
            "metavar": "NAME",
            "help": f"{', '.join(map(repr, CONTENDERS))}; default: all, variants only at mixed, 20 ms",
        },
    }
    for option, details in options.items():
        parser.add_argument(option, action="append", **details)  # type: ignore[arg-type]
    parser.add_argument("--json", type=Path, metavar="FILE", help="write raw results there, after each run")
    parser.add_argument("--before", metavar="FILE", help="measure this backup.py, too")
    parser.add_argument("--report", action="store_true", help="write the table into README.md, and the chart")
    parser.add_argument(
        "--from",
        type=Path,
        metavar="FILE",
        dest="earlier",
        help="measure nothing, take the raw results of FILE",
    )
    options_given = parser.parse_args(arguments)
    if options_given.before:
        os.environ[BEFORE] = str(Path(options_given.before).resolve())
    if min(options_given.latency or [0]) < 0:
        parser.error("--latency: no less than 0")
    return options_given


def measured(options: argparse.Namespace) -> list[Measurement]:
    """The measurements that are asked for: of now, or of an earlier run. Raises ReportError."""
    if options.earlier:
        return load(options.earlier)
    groups = plan(options.dataset, options.latency, options.contender)
    if missing := missing_programs(groups):
        raise ReportError(
            f"not on the PATH: {', '.join(missing)}; `tests/setup benchmark` installs all that is needed"
        )
    benchmark = Benchmark(options.json)
    benchmark.run(groups)
    return benchmark.measurements


def main(arguments: Sequence[str]) -> int:
    """Measure and report; the exit code is 0 only when no contender failed."""
    options = parse(arguments)
    seal_environment()
    for number in STOP_SIGNALS:
        signal.signal(number, stop)
    try:
        measurements = measured(options)
        say(f"\n{table(measurements)}")
        if options.report:
            write_report(measurements, README)
    except (ReportError, ServerError) as error:
        say(f"benchmark: {error}")
        return EXIT_USAGE
    failures = [one for one in measurements if one.failure]
    for one in failures:
        say(f"\nfailed: {one.contender}, {one.dataset}, {PHASES.get(one.phase, one.phase)}: {one.failure}")
    return EXIT_FAILED if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
