"""`check NAME`, and `check` of a target: a repository is checked bit by bit, and damage is a failure."""

import json
import os
import re
import signal
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pexpect
import pytest

import backup
from faults.proxy import Action, FaultProxy
from helpers import BACKUP, Backup, Bucket, Repository, run_backup, settings, wait_until, with_target
from loading import load_settings
from readme import README
from servers import SeaweedFS

RECORD = ".s3borgbackup-checked"
ID = "0" * 64


def day(number: float) -> datetime:
    """A moment."""
    return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=number)


# ----------------------------------------------------------------------------------------------- The grammar


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("30m", backup.CheckPlan(1800)),
        ("90s", backup.CheckPlan(90)),
        ("2h/day", backup.CheckPlan(7200, "day")),
        ("030m/week", backup.CheckPlan(1800, "week")),
        ("full", backup.CheckPlan(None)),
        ("full/month", backup.CheckPlan(None, "month")),
    ],
)
def test_what_check_means(text: str, plan: backup.CheckPlan) -> None:
    assert backup.TARGET["check"](text) == plan


@pytest.mark.parametrize(
    "text",
    [
        "30",
        "m",
        "0m",
        "-5m",
        "30 m",
        "30m/",
        "30m/year",
        "/week",
        "week",
        "full/",
        "FULL",
        "1.5h",
        "30m/week/day",
    ],
)
def test_what_check_cannot_mean_is_a_mistake_that_says_what_to_write(text: str) -> None:
    with pytest.raises(
        ArgumentTypeError, match=f"^{re.escape(repr(text))} is not understood; write such as 30m"
    ):
        backup.TARGET["check"](text)


@pytest.mark.parametrize("value", ["never", 30, True, ["30m"]])
def test_a_wrong_check_is_reported_with_all_other_mistakes(value: object) -> None:
    entry = {"endpoint": "http://127.0.0.1:1", "path": "b", "check": value, "compact": 200}
    environment = {
        "TARGETS": json.dumps({"first": entry}),
        "TARGET_SECRETS": json.dumps(
            {"first": {"access_key_id": "a", "secret_access_key": "b", "borg_passphrase": "c"}}
        ),
    }
    with pytest.raises(backup.ConfigurationError) as caught:
        load_settings(environment, needs_source=False)
    assert len(caught.value.mistakes) == 2
    assert len([mistake for mistake in caught.value.mistakes if '"check"' in mistake]) == 1


# ----------------------------------------------------------------------------------------- What is kept of it


@pytest.mark.parametrize(
    ("every", "began", "now", "due"),
    [
        ("", day(0), day(0), True),
        ("week", None, day(0), True),
        ("week", day(0), day(1), False),
        ("week", day(0), day(6), False),
        (
            "week",
            day(0),
            day(6.99),
            True,
        ),  # a nightly run that begins some minutes earlier than a week before
        ("day", day(0), day(0.5), False),
        ("day", day(0), day(0.95), True),
        ("month", day(0), day(20), False),
        ("month", day(0), day(30), True),
    ],
)
def test_when_a_check_is_due(every: str, began: datetime | None, now: datetime, due: bool) -> None:
    assert backup.is_due(backup.CheckPlan(1800, every), began, now) == due


def record(**fields: Any) -> backup.CheckRecord:
    """What is known of the checks of the repository."""
    return backup.CheckRecord(repository=ID, **fields)


@pytest.mark.parametrize(
    ("known", "written", "since"),
    [
        (record(), {}, None),
        # Nothing was ever checked: the oldest data counts.
        (record(), {1: 3, 2: 5}, 3),
        # A complete pass began on day 8: what was written before was read then or later.
        (record(checked_from=day(8)), {1: 3, 2: 5}, 8),
        # Also where all data is newer than that.
        (record(checked_from=day(8)), {7: 9, 8: 10}, 9),
        # The first pass is under way: what it has read counts from its beginning, the rest since written.
        (record(pass_began=day(6), segment=1), {1: 3, 2: 5}, 5),
        (record(pass_began=day(6), segment=2), {1: 3, 2: 5}, 6),
        # A later pass is under way: the rest was read in the one before.
        (record(checked_from=day(8), pass_began=day(20), segment=1), {1: 3, 2: 5}, 8),
        (record(checked_from=day(8), pass_began=day(20), segment=2), {1: 3, 2: 5, 3: 21}, 20),
        (record(checked_from=day(8), pass_began=day(20), segment=2), {1: 3, 2: 5, 3: 19}, 19),
    ],
)
def test_since_when_the_oldest_unchecked_data_is_so(
    known: backup.CheckRecord, written: dict[int, int], since: int | None
) -> None:
    segments = {number: (1, day(when)) for number, when in written.items()}
    assert known.unchecked_since(segments) == (None if since is None else day(since))


@pytest.mark.parametrize(
    ("known", "position", "expected"),
    [
        # The first slice, and the first one of the next pass.
        (record(), -1, record(pass_began=day(9))),
        (record(pass_began=day(1), segment=5), -1, record(pass_began=day(9))),
        # It goes on.
        (record(pass_began=day(1), segment=5), 5, record(pass_began=day(1), segment=5)),
        # Our record was written, and borg's config did not reach the bucket.
        (record(pass_began=day(1), segment=5), 3, record(pass_began=day(1), segment=3)),
        # Somebody went on with the pass, and what was found is not known: borg is set back.
        (record(pass_began=day(1), segment=5), 8, record(pass_began=day(1), segment=5)),
        (record(), 8, record(pass_began=day(9))),
    ],
)
def test_where_a_check_goes_on(
    known: backup.CheckRecord, position: int, expected: backup.CheckRecord
) -> None:
    assert backup.before_check(known, position, day(9)) == expected


DAMAGED = {"damage": "bad", "damaged": day(3), "kind": "segments"}


@pytest.mark.parametrize(
    ("known", "position", "damage", "kind", "expected"),
    [
        # A slice that is not the last one of its pass.
        (
            record(pass_began=day(1)),
            5,
            "",
            "segments",
            record(pass_began=day(1), segment=5),
        ),
        # The last one.
        (
            record(pass_began=day(1), segment=5),
            -1,
            "",
            "segments",
            record(checked=day(9), checked_from=day(1)),
        ),
        # Damage in a pass: it counts as no good one, not at its end either.
        (
            record(pass_began=day(1)),
            5,
            "bad",
            "segments",
            record(pass_began=day(1), segment=5, damage="bad", damaged=day(9), kind="segments"),
        ),
        (record(pass_began=day(1), segment=5, **DAMAGED), -1, "", "segments", record(**DAMAGED)),
        # A later pass finds nothing: it was repaired.
        (
            record(pass_began=day(4), segment=5, **DAMAGED),
            -1,
            "",
            "archives",
            record(checked=day(9), checked_from=day(4)),
        ),
        # One that sees less than what found the damage does not prove that.
        (
            record(pass_began=day(4), damage="bad", damaged=day(3), kind="archives"),
            -1,
            "",
            "segments",
            record(checked=day(9), checked_from=day(4), damage="bad", damaged=day(3), kind="archives"),
        ),
    ],
)
def test_what_is_known_after_a_check(
    known: backup.CheckRecord, position: int, damage: str, kind: str, expected: backup.CheckRecord
) -> None:
    assert backup.after_check(known, position, damage, kind, day(9)) == expected


class Notes:
    """Of an S3 client what reads and writes notes, with one note."""

    store = SimpleNamespace(key_prefix="")

    def __init__(self, body: bytes = b"") -> None:
        self.body = body

    def find(self, _key: str) -> "Notes":
        return self

    def put(self, _key: str, body: bytes) -> None:
        self.body = body


def last_check(notes: Notes, identity: str) -> backup.CheckRecord:
    """What these notes say of the repository with this id."""
    return backup.last_check(SimpleNamespace(client=notes, identity=identity))


def test_the_record_is_kept_as_json_and_counts_for_its_repository_only() -> None:
    known = record(checked=day(1), checked_from=day(0), pass_began=day(2), segment=7, began=day(3), **DAMAGED)
    notes = Notes()
    for each in (record(), known):
        backup.write_note(notes, RECORD, asdict(each))
        assert last_check(notes, ID) == each
        assert last_check(notes, "1" * 64) == backup.CheckRecord("1" * 64)
    assert json.loads(notes.body)["checked"] == "2026-01-02T00:00:00+00:00"


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{}", b"\xff", b"[" * 100_000, json.dumps({"repository": ID, "segment": "x"}).encode()],
)
def test_a_record_that_cannot_be_read_is_none(body: bytes) -> None:
    assert last_check(Notes(body), ID) == record()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 seconds"), (60, "1 minute"), (7300, "2 hours"), (86399, "23 hours"), (86400 * 9.9, "9 days")],
)
def test_ages(seconds: float, text: str) -> None:
    assert backup.age(seconds) == text


# ------------------------------------------------------------------------------------------ Real repositories


@pytest.fixture
def environment(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path, needs_fuse: None
) -> dict[str, str]:
    """A configuration with one target, and a backup of a few objects."""
    source.put({f"folder/{number}": os.urandom(100_000) for number in range(10)})
    made = settings(server, tmp_path, source.name, {"first": target.name})
    run_backup(made).expect(0)
    return made


@pytest.fixture
def many_segments(environment: dict[str, str], source: Bucket, server: SeaweedFS) -> Iterator[dict[str, str]]:
    """The same with many small segments, each of which takes its time to read: a slice checks some."""
    run_backup(environment, "borg", "first", "config", "::", "max_segment_size", "20000").expect(0)
    source.put({f"more/{number}": os.urandom(30_000) for number in range(150)})
    run_backup(environment).expect(0)
    with FaultProxy(server.endpoint) as proxy:
        proxy.add(lambda request: request.key.startswith("data/"), Action.DELAY, seconds=0.03)
        yield with_target(environment, "first", endpoint=proxy.endpoint)


def record_in(target: Bucket) -> dict[str, Any]:
    """The record that lies in the bucket."""
    return json.loads(target.get(RECORD))


def borgs_position(target: Bucket) -> int:
    """The last segment that borg notes as checked in the pass under way; -1 where none is."""
    found = re.search(r"^last_segment_checked = (\d+)$", target.get("config").decode(), re.MULTILINE)
    return int(found[1]) if found else -1


def largest_segment(target: Bucket) -> str:
    """Its key."""
    sizes = target.sizes("data/")
    return max(sizes, key=lambda name: sizes[name])


@pytest.mark.long
@pytest.mark.parametrize("options", [[], ["--verify-data"], ["--max-duration", "1m"]])
def test_a_sound_repository_is_found_sound_and_stays_as_it_is(
    environment: dict[str, str], source: Bucket, target: Bucket, tmp_path: Path, options: list[str]
) -> None:
    """Without the source; the record is in nobody's way, neither ours nor borg's."""
    bare = {name: value for name, value in environment.items() if not name.startswith("SOURCE_")}
    before = target.contents("data/")
    result = run_backup(bare, "check", "first", *options).expect(0)
    assert "no damage was found; the oldest unchecked data is" in result.output
    assert target.contents("data/") == before
    known = record_in(target)
    assert known["checked"] >= known["checked_from"] >= known["began"]
    assert (known["pass_began"], known["damage"]) == (None, "")
    run_backup(environment).expect(0)
    copy = Repository.download(target, tmp_path / "copy")
    copy.check()
    assert len(copy.archives()) == 2


@pytest.mark.long
def test_a_pass_goes_on_from_slice_to_slice_until_everything_is_checked(
    many_segments: dict[str, str], target: Bucket
) -> None:
    positions, began, done = [], set(), {}
    for _ in range(30):
        result = run_backup(many_segments, "check", "first", "--max-duration", "1s").expect(0)
        known = record_in(target)
        assert borgs_position(target) == known["segment"]
        if known["checked"]:
            done = known
            break
        assert "in this pass" in result.output
        positions.append(known["segment"])
        began.add(known["pass_began"])
    assert len(positions) > 1, "one slice was enough: nothing is proved"
    assert positions == sorted(set(positions))
    assert [done["checked_from"]] == list(began), "the pass counts from its first slice on"
    assert (done["segment"], done["pass_began"]) == (-1, None)


@pytest.mark.long
def test_a_slice_sets_borg_back_to_where_we_know_that_all_was_well(
    many_segments: dict[str, str], target: Bucket
) -> None:
    """Somebody went on by hand, and skipped damage that they were told of; nothing was told to us."""
    run_backup(many_segments, "check", "first", "--max-duration", "1s").expect(0)
    known = record_in(target)["segment"]
    assert 0 <= known < 140
    key = f"data/0/{known + 2}"
    target.flip_a_byte(key)
    by_hand = ("config", "::", "last_segment_checked", str(known + 9))
    run_backup(many_segments, "borg", "first", *by_hand).expect(0)
    result = run_backup(many_segments, "check", "first", "--max-duration", "1m").expect(2)
    assert f"[segment {known + 2}," in result.output
    known_later = record_in(target)
    assert (known_later["kind"], known_later["checked"]) == ("segments", None)


@pytest.mark.long
def test_a_stopped_check_goes_on_with_the_next(many_segments: dict[str, str], target: Bucket) -> None:
    with Backup(many_segments, "check", "first", "--max-duration", "1h") as running:
        running.wait_for_line("borg check begins")
        wait_until(target.locks, 20, "borg has its lock")
        running.send_signal(signal.SIGTERM)
        result = running.wait(30)
    assert result.exit_code == 143, result.output
    assert target.locks() == []
    run_backup(many_segments, "check", "first", "--max-duration", "1h").expect(0)
    assert record_in(target)["checked"] > record_in(target)["checked_from"]


@pytest.mark.parametrize("options", [[], ["--max-duration", "1m"]])
def test_a_corrupted_segment_is_a_failure_until_it_is_sound_again(
    environment: dict[str, str], source: Bucket, target: Bucket, options: list[str]
) -> None:
    """Although borg ends with 1. A run stores its archive, says so, and fails; and so does the next."""
    key = largest_segment(target)
    before = target.flip_a_byte(key)
    result = run_backup(environment, "check", "first", *options).expect(2)
    assert (
        "target-first: the repository is damaged: Data integrity error: Segment entry checksum"
        in result.output
    )
    assert "copy it before you try" in result.output
    assert (record_in(target)["checked"], record_in(target)["kind"]) == (
        None,
        "segments" if options else "archives",
    )
    nightly = with_target(environment, "first", check="30m/week")
    source.put({"folder/new": b"new"})
    result = run_backup(nightly).expect(2)
    assert re.search(
        r"^first: the archive \S+ is stored, but .*is damaged: Data integrity", result.output, re.M
    )
    assert "no check is due" in result.output
    target.put({key: before})
    assert len(run_backup(environment, "borg", "first", "list", "--short").lines) >= 2
    run_backup(environment, "check", "first").expect(0)
    assert (record_in(target)["damage"], record_in(target)["checked"] is None) == ("", False)
    run_backup(nightly).expect(0)


@pytest.mark.long
@pytest.mark.parametrize("options", [[], ["--max-duration", "1m"]])
def test_a_segment_that_is_missing_is_a_failure(
    environment: dict[str, str], target: Bucket, options: list[str]
) -> None:
    """What a lifecycle rule does. borg's slices do not notice it."""
    key = largest_segment(target)
    target.delete(key)
    result = run_backup(environment, "check", "first", *options).expect(2)
    assert "the repository is damaged: " in result.output
    if options:
        assert f"1 segment with data missing from the bucket: {key.rpartition('/')[2]}" in result.output


@pytest.mark.long
def test_what_is_lost_is_repaired_as_the_readme_says_and_the_next_backup_stores_it_anew(
    environment: dict[str, str], source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    """borg wants to be told YES, and names what lost a part; the next archive is whole."""
    source.put({"later": os.urandom(1000)})
    run_backup(environment).expect(0)
    target.delete(largest_segment(target))
    run_backup(environment, "check", "first").expect(2)
    words = ["borg", "first", "check", "--repair"]
    assert f"`s3bb {' '.join(words)}`" in README
    command = [str(BACKUP), *words]
    with pexpect.spawn(sys.executable, command, env=environment, encoding="utf-8", timeout=60) as terminal:
        terminal.expect("Type 'YES' if you understand")
        terminal.sendline("YES")
        terminal.expect(pexpect.EOF)
    assert terminal.exitstatus == 0, terminal.before
    assert "source/folder/" in terminal.before
    assert "source/later" not in terminal.before
    run_backup(environment, "check", "first").expect(0)
    run_backup(environment).expect(0)
    copy = Repository.download(target, tmp_path / "copy")
    copy.check()
    newest = copy.archives()[-1]
    mounted_at = Path(environment["DATA_DIR"]).resolve() / "source"
    assert copy.contents(newest, mounted_at, tmp_path / "newest") == source.contents()


def test_a_run_checks_as_its_target_says(environment: dict[str, str], target: Bucket) -> None:
    """In each run, or not before the time has come."""
    each = run_backup(with_target(environment, "first", check="1m")).expect(0)
    assert "no damage was found" in each.output
    first = record_in(target)
    weekly = run_backup(with_target(environment, "first", check="1m/week")).expect(0)
    assert "no check is due; the oldest unchecked data is" in weekly.output
    assert record_in(target) == first
    old = {**first, "began": (datetime.now(UTC) - timedelta(days=7)).isoformat()}
    target.put({RECORD: json.dumps(old).encode()})
    run_backup(with_target(environment, "first", check="full/week")).expect(0)
    later = record_in(target)
    assert later["checked"] > first["checked"]
    assert later["began"] > old["began"]
    assert "borg check" not in run_backup(environment).expect(0).output


def test_wrong_options_are_told(environment: dict[str, str]) -> None:
    for options, told in (
        (["--max-duration", "30"], "write a number and a unit (s, m, h), such as 30m"),
        (
            ["--max-duration", "30m", "--verify-data"],
            "--verify-data: not allowed with argument --max-duration",
        ),
        (["--repair"], "unrecognized arguments: --repair"),
    ):
        assert told in run_backup(environment, "check", "first", *options).expect(78).output
