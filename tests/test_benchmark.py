"""The benchmark: what it computes and writes, and that it really measures."""

import json
import os
import random
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmark import DATASETS, parse, plan
from benchmark_contenders import Processes, RunFailed, count_traffic, memory_of_trees
from benchmark_report import (
    BEGIN,
    CHART_PATH,
    END,
    PHASES,
    Measurement,
    ReportError,
    chart,
    load,
    price,
    replace_between_markers,
    rows,
    save,
    seconds_text,
    table,
    tick_step,
    write_report,
)
from servers import SeaweedFS

TESTS = Path(__file__).resolve().parent
REQUESTS = {"source": {"LIST": 1_000, "GET": 10_000}, "target": {"PUT": 500, "POST": 500, "DELETE": 7}}


def measured(
    contender: str, seconds: float, *, latency_ms: int | None = 20, failure: str = ""
) -> list[Measurement]:
    """All phases of a contender with the bucket "mixed"."""
    return [
        Measurement(
            contender,
            "mixed",
            latency_ms,
            phase,
            seconds,
            50_000_000,
            REQUESTS,
            {"from source": 7_000_000},
            failure,
        )
        for phase in PHASES
    ]


MEASUREMENTS = [
    *measured("s3borgbackup", 12.34),
    *measured("plain", 24.68),
    *measured("restic <&>", 5, failure="restic ended with exit code 1"),
    *measured("borg, local disk", 1.5, latency_ms=None),
]

# ------------------------------------------------------------------------------------------ Numbers and table


def test_requests_have_the_prices_of_the_list_and_deletions_none() -> None:
    assert price({"LIST": 1_000, "PUT": 1_000, "COPY": 1_000, "POST": 1_000}) == pytest.approx(0.02)
    assert price({"GET": 1_000, "HEAD": 1_000}) == pytest.approx(0.0008)
    assert price({"DELETE": 1_000_000}) == 0
    assert price({"UNHEARD-OF": 1_000}) == price({"PUT": 1_000})


def test_a_month_is_thirty_runs_with_the_requests_to_source_and_target() -> None:
    assert MEASUREMENTS[0].request_count == 12_007
    assert MEASUREMENTS[0].dollars_a_month == pytest.approx(30 * (0.005 + 0.004 + 0.005))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0"), (9.96, "10.0"), (99.96, "100"), (1234.5, "1,234")]
)
def test_seconds_have_few_digits(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(("largest", "step"), [(4, 1), (7, 2), (300, 100), (0.9, 0.2)])
def test_ticks_are_round(largest: float, step: float) -> None:
    assert tick_step(largest) == pytest.approx(step)


def test_the_table_has_a_row_for_each_contender_with_its_share_of_the_baselines_time() -> None:
    lines = table(MEASUREMENTS).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    counts = "12,007 / 12,007 / 12,007"
    assert cells == [
        ["mixed, 20 ms", "s3borgbackup", *["12.3 (50%)"] * 3, "-", counts, "7", "50", "0.420"],
        ["mixed, 20 ms", "plain", *["24.7"] * 3, "-", counts, "7", "50", "0.420"],
        ["mixed, 20 ms", "restic <&>", *["failed"] * 3, "-", "- / - / -", "-", "50", "-"],
        ["mixed", "borg, local disk", *["1.5"] * 3, "-", "-", "-", "50", "-"],
    ]


def test_a_phase_that_was_not_measured_is_left_blank() -> None:
    only_first = [one for one in measured("s3borgbackup", 3) if one.phase == "first"]
    assert "| 3.0 | - | - | - | 12,007 / - / - |" in table(only_first)


# ------------------------------------------------------------------------------------------------------ Files


def test_raw_results_come_back_as_they_were(tmp_path: Path) -> None:
    save(tmp_path / "raw.json", {"cores": 2}, MEASUREMENTS)
    assert load(tmp_path / "raw.json") == MEASUREMENTS
    (tmp_path / "raw.json").write_text('{"measurements": [{"contender": "a"}]}')
    with pytest.raises(ReportError, match=r"raw\.json"):
        load(tmp_path / "raw.json")


def test_only_what_is_between_the_markers_is_replaced() -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter {END}\n"
    once = replace_between_markers(text, "new")
    assert once == f"before\n{BEGIN}\nnew\n{END}\nafter {END}\n"
    assert replace_between_markers(once, "new") == once


def test_the_report_is_a_short_table_and_a_chart_beside_the_readme(tmp_path: Path) -> None:
    """Other buckets, other latencies and variants with an option are left out of it."""
    readme, svg = tmp_path / "README.md", tmp_path / CHART_PATH
    svg.parent.mkdir()
    readme.write_text("# Title\n\nno markers\n")
    with pytest.raises(ReportError, match="missing"):
        write_report(MEASUREMENTS, readme)
    assert readme.read_text() == "# Title\n\nno markers\n"
    assert not svg.exists()
    readme.write_text(f"# Title\n\n{BEGIN}\n{END}\n\nrest\n")
    more = [*measured("plain, --noxattrs", 9), *measured("elsewhere", 9, latency_ms=100)]
    write_report([*MEASUREMENTS, *more], readme)
    text = readme.read_text()
    assert text.startswith(f"# Title\n\n{BEGIN}\n")
    assert text.endswith(f"\n{END}\n\nrest\n")
    assert table(MEASUREMENTS) in text
    assert f"]({CHART_PATH})" in text
    assert "elsewhere" not in text
    assert "--noxattrs" not in text
    assert svg.read_text() == chart([*MEASUREMENTS, *more])


def test_the_readme_has_the_markers() -> None:
    replace_between_markers((TESTS.parent / "README.md").read_text(), "")


def test_the_chart_is_xml_with_a_bar_for_each_measurement() -> None:
    root = ElementTree.fromstring(chart([*MEASUREMENTS, *measured("elsewhere", 9, latency_ms=100)]))
    space = "{http://www.w3.org/2000/svg}"
    # The legend has a box for each phase, too.
    boxes = [rect.get("class") for rect in root.iter(f"{space}rect")]
    assert all(boxes.count(phase) == 1 + 4 for phase in PHASES)
    texts = [text.text for text in root.iter(f"{space}text")]
    assert {"s3borgbackup", "plain", "restic <&>", "borg, local disk", "12.3", "failed"} <= set(texts)
    assert "elsewhere" not in texts
    limit = float(root.get("width", "0"))
    assert all(
        float(rect.get("x", "0")) + float(rect.get("width", "0")) <= limit
        for rect in root.iter(f"{space}rect")
    )


def test_a_chart_of_nothing_is_refused() -> None:
    with pytest.raises(ReportError, match="nothing to draw"):
        chart(MEASUREMENTS[:1])


# ---------------------------------------------------------------------------------------------- Plan and data


def test_by_default_variants_run_once_and_the_local_disk_once_for_each_bucket() -> None:
    groups = plan(None, None, None)
    found = [(group.dataset.name, group.latency_ms, one) for group in groups for one in group.contenders]
    assert {(name, latency) for name, latency, _ in found} == {
        ("mixed", 0), ("mixed", 20), ("mixed", 100), ("small", 20), ("large", 20),
    }  # fmt: skip
    assert {(name, latency) for name, latency, one in found if one.is_variant} == {("mixed", 20)}
    assert sorted(name for name, _, one in found if one.is_local) == ["large", "mixed", "small"]


def test_options_choose() -> None:
    options = parse(
        ["--latency", "5", "--dataset", "small", "--dataset", "tiny", "--contender", "plain, --noxattrs"]
    )
    groups = plan(options.dataset, options.latency, options.contender)
    assert [(group.dataset.name, group.latency_ms) for group in groups] == [("small", 5), ("tiny", 5)]
    assert {one.name for group in groups for one in group.contenders} == {"plain, --noxattrs"}


def test_the_reference_bucket_has_2002_objects_and_107_megabytes() -> None:
    sizes = DATASETS["mixed"].sizes(random.Random(107))
    assert len(sizes) == 2_002
    assert round(sum(sizes) / 1e6) == 107


@pytest.mark.parametrize(("name", "count"), [("small", 15), ("tiny", 1)])
def test_one_object_in_a_hundred_changes_and_always_the_same(name: str, count: int) -> None:
    before, changes = dict(DATASETS[name].objects()), dict(DATASETS[name].changes())
    assert len(changes) == count
    assert all(len(before[key]) == len(body) and before[key] != body for key, body in changes.items())
    assert dict(DATASETS[name].objects()) == before
    assert dict(DATASETS[name].changes()) == changes


# -------------------------------------------------------------------------------------------------- Measuring


def test_a_program_that_fails_is_named_with_its_last_lines(tmp_path: Path) -> None:
    command = ["sh", "-c", "echo the reason; exit 3"]
    with (
        Processes(tmp_path / "log") as processes,
        pytest.raises(RunFailed, match=r"exit code 3\n +the reason"),
    ):
        processes.run(command, {"PATH": os.environ["PATH"]})


def test_memory_is_that_of_all_descendants() -> None:
    grandchild = "import sys; block = b'x' * 50_000_000; print(flush=True); sys.stdin.read()"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        process.stdout.readline()
        assert 50_000_000 < memory_of_trees([process.pid]) < 150_000_000


def test_nothing_runs_after_the_block(tmp_path: Path) -> None:
    with Processes(tmp_path / "log") as processes:
        started = processes.start(["sleep", "60"], {"PATH": os.environ["PATH"]})
    assert started.returncode == -9


def test_the_servers_counters_tell_buckets_and_kinds_apart() -> None:
    with SeaweedFS(has_metrics=True) as server:
        client = server.client()
        client.create_bucket(Bucket="one")
        client.create_bucket(Bucket="two")
        client.put_object(Bucket="one", Key="key", Body=b"x" * 1_000)
        before = count_traffic(server.metrics())
        client.put_object(Bucket="two", Key="key", Body=b"x" * 2_000)
        client.get_object(Bucket="one", Key="key", Range="bytes=0-499")["Body"].read()
        client.head_object(Bucket="one", Key="key")
        client.list_objects_v2(Bucket="one")
        client.delete_object(Bucket="two", Key="key")
        counted = count_traffic(server.metrics()) - before
    assert counted == {
        ("one", "GET"): 2,
        ("one", "LIST"): 1,
        ("one", "sent"): 500,
        ("two", "PUT"): 1,
        ("two", "DELETE"): 1,
        ("two", "received"): 2_000,
    }


@pytest.mark.long
@pytest.mark.usefixtures("needs_fuse")
def test_it_measures(tmp_path: Path) -> None:
    contenders = ("s3borgbackup", "plain", "borg, local disk")
    chosen = [argument for name in contenders for argument in ("--contender", name)]
    raw = tmp_path / "raw.json"
    done = subprocess.run(
        [sys.executable, TESTS / "benchmark.py", "--dataset", "tiny", *chosen, "--json", raw],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    measurements = load(raw)
    assert [row.any.contender for row in rows(measurements)] == list(contenders)
    assert len(measurements) == len(contenders) * len(PHASES) + 1  # one of them restores, too
    assert table(measurements) in done.stdout
    assert all(one.peak_bytes > 10_000_000 for one in measurements)
    first, changed = measurements[0], measurements[2 * len(contenders)]
    assert first.traffic["from source"] >= 30 * 10_000
    assert first.requests["source"]["GET"] >= 30
    assert first.requests["target"]["PUT"] > 1
    assert changed.phase == "changed"
    assert 10_000 <= changed.traffic["from source"] < first.traffic["from source"]
    assert json.loads(raw.read_text())["machine"]["cores"] >= 1
    assert [path.name for path in tmp_path.iterdir()] == ["raw.json"]
