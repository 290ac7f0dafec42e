"""What every fault test proves at its end: nothing is lost, and the next run needs nobody."""

import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from helpers import Bucket, Repository, Result, run_backup


def newest_contents(
    target: Bucket, folder: Path, environment: Mapping[str, str], prefix: str = ""
) -> dict[str, bytes]:
    """The objects in the newest archive, from a copy of the bucket that passes `borg check --verify-data`."""
    name = uuid.uuid4().hex
    repository = Repository.download(target, folder / f"proof-{name}", prefix=prefix)
    repository.check()
    newest = repository.archives()[-1]
    return repository.contents(newest, Path(environment["DATA_DIR"]) / "source", folder / f"extracted-{name}")


def prove_intact(
    environment: Mapping[str, str],
    source: Bucket,
    target: Bucket,
    folder: Path,
    *,
    prefix: str = "",
    timeout_seconds: float = 120,
) -> Result:
    """A normal run succeeds unaided, the repository is sound, and its newest archive equals the source."""
    result = run_backup(environment, timeout_seconds=timeout_seconds).expect(0)
    assert newest_contents(target, folder, environment, prefix) == source.contents()
    assert target.locks() == []
    return result


class Table:
    """Counts how often each fault is tried and survived, as properties of the test that tries it."""

    def __init__(self, properties: list[tuple[str, object]]) -> None:
        """`properties` are the test's `user_properties`, which reach the summary from any process."""
        self._properties = properties

    @contextmanager
    def attempt(self, fault: str) -> Iterator[None]:
        """Counts a try; it is survived unless an exception leaves the block."""
        self._properties.append(("tried", fault))
        yield
        self._properties.append(("survived", fault))


def table_lines(properties: Iterable[tuple[str, object]]) -> list[str]:
    """The table of all tests' properties: fault, tries, survived."""
    counts = Counter(properties)
    faults = list(dict.fromkeys(str(fault) for what, fault in counts if what == "tried"))
    rows = [("fault", "tries", "survived")]
    rows += [(fault, str(counts["tried", fault]), str(counts["survived", fault])) for fault in faults]
    width = max(len(row[0]) for row in rows)
    return [f"{fault.ljust(width)}  {tries:>5}  {survived:>8}" for fault, tries, survived in rows]
