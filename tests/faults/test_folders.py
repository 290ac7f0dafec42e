"""What borg asks of folders: TigrisFS would wait for ever for one, and hear of no error of S3."""

from pathlib import Path

import pytest

from helpers import Bucket, run_backup, sample_objects, settings
from proof import Table, prove_intact
from proxy import Action, FaultProxy, Request
from servers import SeaweedFS

pytestmark = pytest.mark.usefixtures("needs_fuse")

STALL_SECONDS = 20


def is_deletion_of_a_lock(request: Request) -> bool:
    """Also of the name that it has before it is taken."""
    return request.kind == "DELETE" and request.key.startswith("lock.exclusive.") and request.key[-1] != "/"


def is_index(request: Request) -> bool:
    """Also the name that it has before it is whole."""
    return request.key.startswith("index.")


def test_an_s3_that_is_away_while_borg_takes_its_lock_holds_nobody_up(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path, table: Table
) -> None:
    """Each deletion of the name that a lock had at first fails once."""
    source.put(sample_objects(17, 5))
    with table.attempt("a lock's deletions fail at first"), FaultProxy(server.endpoint) as proxy:
        entry = {"path": target.name, "endpoint": proxy.endpoint}
        environment = settings(
            server, tmp_path, source.name, {"first": entry}, STALL_TIMEOUT=str(STALL_SECONDS)
        )
        failed: set[str] = set()

        def is_first(request: Request) -> bool:
            if not is_deletion_of_a_lock(request) or request.key in failed:
                return False
            failed.add(request.key)
            return True

        proxy.add(is_first, Action.RESET)
        run_backup(environment).expect(0)
        assert failed
        assert target.locks() == []


@pytest.mark.long
def test_an_index_is_deleted_only_when_the_next_one_is_in_the_bucket(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path, table: Table
) -> None:
    """borg deletes it after an fsync of the folder, in which S3 fails here."""
    source.put(sample_objects(19, 5))
    with table.attempt("an index's renaming fails at first"), FaultProxy(server.endpoint) as proxy:
        entry = {"path": target.name, "endpoint": proxy.endpoint}
        environment = settings(server, tmp_path, source.name, {"first": entry})
        fault = proxy.add(lambda request: is_index(request) and request.kind == "COPY", Action.RESET, times=2)
        run_backup(environment).expect(0)
        assert fault.hit == 2
        there, gone = set[str](), set[str]()
        for request, status in proxy.requests:
            if is_index(request) and request.kind == "COPY" and status == 200:
                there.add(request.key)
            elif is_index(request) and request.kind == "DELETE" and not request.key.endswith(".tmp"):
                gone.add(request.key)
                assert there - gone, f"{request.key} was deleted before there was another"
        assert gone
        prove_intact(environment, source, target, tmp_path)


@pytest.mark.long
def test_a_lock_of_which_tigrisfs_does_not_know_that_it_is_in_the_bucket_is_no_failure(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path, table: Table
) -> None:
    """It forgets it when borg gives it back: as far as it knows there is nothing to delete."""
    source.put(sample_objects(23, 5))
    with table.attempt("the answer to a lock's upload is lost"), FaultProxy(server.endpoint) as proxy:
        entry = {"path": target.name, "endpoint": proxy.endpoint}
        environment = settings(server, tmp_path, source.name, {"first": entry})
        fault = proxy.add(
            lambda request: request.kind == "PUT" and request.key.startswith("lock.exclusive/"),
            Action.LOSE_ANSWER,
        )
        run_backup(environment).expect(0)
        assert fault.hit
        assert target.locks() == []
