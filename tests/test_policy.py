"""Keys with a policy that allows what is below a prefix, and nothing else."""

from collections.abc import Callable
from pathlib import Path

import pytest

from faults.proxy import Action, FaultProxy, Request
from helpers import Bucket, run_backup, settings
from servers import WRITER, SeaweedFS

pytestmark = pytest.mark.usefixtures("needs_fuse")

PREFIX = "team/backups"


def outside(bucket: Bucket) -> Callable[[Request], bool]:
    """Matches what a policy for `PREFIX/*` denies.

    Absent objects are among it, as with AWS, where whoever may not list the whole bucket is not told whether
    an object exists: a request for one has no prefix by which the policy could allow its listing.
    """

    def matches(request: Request) -> bool:
        place = request.key or request.query.get("prefix", "")
        if request.bucket != bucket.name or not place.startswith(f"{PREFIX}/"):
            return request.bucket == bucket.name
        return request.kind in ("GET", "HEAD") and place not in bucket.sizes(place)

    return matches


@pytest.mark.long
def test_keys_for_a_prefix_are_enough(
    server: SeaweedFS, source: Bucket, target: Bucket, new_bucket: Callable[..., Bucket], tmp_path: Path
) -> None:
    """To back up to a new repository and to one that is there, to check it, and to restore into a bucket."""
    source.put({f"{PREFIX}/a": b"1", f"{PREFIX}/b/c": b"2", f"{PREFIX}/empty/": b"", "other": b"3"})
    restored = new_bucket("restored")
    with FaultProxy(server.endpoint) as proxy:
        for bucket in (source, target, restored):
            proxy.add(outside(bucket), Action.REFUSE)
        entry = {"path": f"{target.name}:{PREFIX}", "endpoint": proxy.endpoint, "check": "full/week"}
        environment = settings(server, tmp_path, f"{source.name}:{PREFIX}", {"first": entry})
        environment["SOURCE_ENDPOINT"] = proxy.endpoint
        run_backup(environment).expect(0)
        run_backup(environment).expect(0)
        environment["RESTORE_ACCESS_KEY_ID"] = WRITER.access_key_id
        environment["RESTORE_SECRET_ACCESS_KEY"] = WRITER.secret_access_key
        run_backup(environment, "restore", "first", "--to-bucket", f"{restored.name}:{PREFIX}").expect(0)
    assert restored.sizes().keys() == source.sizes().keys() - {"other"}
