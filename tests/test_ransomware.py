"""A thief has the backup container's keys and passphrase: what they cannot do, and how everything comes back.

The policy and the program that rescues an older state are the README's, word for word.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import botocore.exceptions
import pytest

from helpers import (
    BACKUP,
    Bucket,
    Repository,
    mounted,
    run_backup,
    settings,
    wait_until,
    with_target,
    with_target_secrets,
)
from servers import ADMIN, WRITER, Identity, Moto, SeaweedFS, Server

README = (BACKUP.parent / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("\n## Ransomware\n")[2].partition("\n## ")[0]
NewBucket = Callable[..., Bucket]

pytestmark = pytest.mark.usefixtures("needs_fuse")


def code_block(language: str) -> str:
    """The one block of a language in the README's section."""
    [block] = re.findall(rf"^ *```{language}\n(.*?)^ *```$", SECTION, re.MULTILINE | re.DOTALL)
    return block


def refusal(request: Callable[..., Any], **arguments: Any) -> str:
    """S3's code for why it refuses a request; empty when it does not."""
    try:
        request(**arguments)
    except botocore.exceptions.ClientError as error:
        return error.response["Error"]["Code"]
    return ""


@dataclass
class Site:
    """A source, a target whose old versions are kept, and a configuration that may not touch these."""

    server: Server
    environment: dict[str, str]
    source: Bucket
    target: Bucket
    folder: Path
    identity: Identity = WRITER

    @property
    def thief(self) -> Any:
        """A client with the backup container's keys."""
        return self.server.client(self.identity)

    def elsewhere(self, bucket: Bucket) -> dict[str, str]:
        """The configuration of a clean machine, which has no source and never saw the repository."""
        environment = settings(self.server, self.folder / "clean", self.source.name, {"first": bucket.name})
        environment["DATA_DIR"] = self.environment["DATA_DIR"]
        return {name: value for name, value in environment.items() if not name.startswith("SOURCE_")}

    def maintenance(self) -> dict[str, str]:
        """The configuration of the maintenance container: other keys, `prune`, and no source."""
        environment = with_target(self.elsewhere(self.target), "first", prune="--keep-last=1")
        keys = {"access_key_id": ADMIN.access_key_id, "secret_access_key": ADMIN.secret_access_key}
        return with_target_secrets(environment, "first", **keys)

    def attack(self) -> None:
        """Overwrites what archives are made of, and deletes everything."""
        for key in self.target.sizes():
            if key.startswith("data/"):
                self.thief.put_object(Bucket=self.target.name, Key=key, Body=b"your data is mine")
            self.thief.delete_object(Bucket=self.target.name, Key=key)
        assert self.target.sizes() == {}

    def rescue(self, when: datetime, rescued: Bucket) -> None:
        """Runs the README's program."""
        program = self.folder / "rescue.py"
        program.write_text(code_block("python"), encoding="utf-8")
        keys = {
            "AWS_ENDPOINT_URL": self.server.endpoint,
            "AWS_ACCESS_KEY_ID": ADMIN.access_key_id,
            "AWS_SECRET_ACCESS_KEY": ADMIN.secret_access_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        words = [sys.executable, str(program), self.target.name, when.isoformat(), rescued.name]
        done = subprocess.run(words, env=keys, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr


def quiet_moment() -> datetime:
    """A moment that is apart from what happened before and after, as S3's times have whole seconds."""
    time.sleep(2)
    moment = datetime.now(UTC)
    time.sleep(2)
    return moment


def make_site(
    server: Server, source: Bucket, target: Bucket, folder: Path, identity: Identity = WRITER
) -> Site:
    """A site in which nothing was backed up yet."""
    source.put({f"folder/{number}": bytes([number]) * 1000 for number in range(20)})
    targets = {"first": target.name}
    environment = settings(server, folder, source.name, targets, target_identity=identity)
    return Site(server, environment, source, target, folder, identity)


def assert_rescued(site: Site, moment: datetime, rescued: Bucket, objects: dict[str, bytes]) -> None:
    """The repository of that moment comes back and is whole, and the objects are extracted from it."""
    site.rescue(moment, rescued)
    environment = site.elsewhere(rescued)
    listed = run_backup(environment, "list", "first").expect(0)
    archive = listed.lines[-1].split()[1]
    run_backup(environment, "borg", "first", "check", "--verify-data").expect(0)
    place = site.folder / "restored"
    place.mkdir()
    done = subprocess.run(
        [sys.executable, str(BACKUP), "borg", "first", "extract", f"::{archive}"],
        env=environment,
        cwd=place,
        check=False,
    )
    assert done.returncode == 0
    source_folder = Path(site.environment["DATA_DIR"]).resolve() / "source"
    found = place / str(source_folder).lstrip("/")
    assert {
        str(path.relative_to(found)): path.read_bytes() for path in found.rglob("*") if path.is_file()
    } == objects
    copy = Repository.download(rescued, site.folder / "copy")
    copy.check()


@pytest.fixture
def site(server: SeaweedFS, new_bucket: NewBucket, tmp_path: Path) -> Site:
    """The target's bucket keeps versions, and has the README's policy for the backup container's keys.

    Without the policy these might do anything in it, so that it is the policy that refuses.
    """
    source, target = new_bucket("source"), new_bucket("target")
    admin = server.client(ADMIN)
    admin.put_bucket_versioning(Bucket=target.name, VersioningConfiguration={"Status": "Enabled"})
    policy = code_block("json").replace("my-backups", target.name)
    rights = (*WRITER.actions, f"Admin:{target.name}")
    identity = server.add_identity(Identity(f"owner-of-{target.name}", "owner-secret-52c1", rights))
    user = f"arn:aws:iam::000000000000:user/{identity.access_key_id}"
    policy = policy.replace("arn:aws:iam::123456789012:user/s3borgbackup", user)
    assert user in policy
    admin.put_bucket_policy(Bucket=target.name, Policy=policy)
    site = make_site(server, source, target, tmp_path, identity)
    suspend = {"Bucket": target.name, "VersioningConfiguration": {"Status": "Suspended"}}
    wait_until(lambda: refusal(site.thief.put_bucket_versioning, **suspend), 10, "the policy holds")
    admin.put_bucket_versioning(Bucket=target.name, VersioningConfiguration={"Status": "Enabled"})
    return site


def test_a_thief_cannot_touch_what_is_needed_to_get_everything_back(
    site: Site, new_bucket: NewBucket
) -> None:
    """Backups work with so few permissions; and nothing of them is lost by whoever has the same."""
    objects = site.source.contents()
    run_backup(site.environment).expect(0)
    run_backup(site.environment).expect(0)
    moment = quiet_moment()
    admin, thief, name = site.server.client(ADMIN), site.thief, site.target.name
    version = next(
        entry
        for entry in admin.list_object_versions(Bucket=name)["Versions"]
        if entry["Key"].startswith("data/")
    )
    this = {"Bucket": name, "Key": version["Key"], "VersionId": version["VersionId"]}
    rule = {
        "ID": "x",
        "Status": "Enabled",
        "Filter": {},
        "NoncurrentVersionExpiration": {"NoncurrentDays": 1},
    }
    retention = {"Mode": "COMPLIANCE", "RetainUntilDate": datetime.now(UTC) + timedelta(days=1)}
    lock = {"ObjectLockEnabled": "Enabled", "Rule": {"DefaultRetention": {"Mode": "COMPLIANCE", "Days": 1}}}
    policy = json.dumps({"Version": "2012-10-17", "Statement": []})
    assert [
        refusal(thief.delete_object, **this),
        refusal(thief.delete_object, **this, BypassGovernanceRetention=True),
        refusal(thief.put_bucket_versioning, Bucket=name, VersioningConfiguration={"Status": "Suspended"}),
        refusal(
            thief.put_bucket_lifecycle_configuration, Bucket=name, LifecycleConfiguration={"Rules": [rule]}
        ),
        refusal(thief.put_object_retention, **this, Retention=retention),
        refusal(thief.put_object_lock_configuration, Bucket=name, ObjectLockConfiguration=lock),
        refusal(thief.put_bucket_policy, Bucket=name, Policy=policy),
        refusal(thief.delete_bucket_policy, Bucket=name),
        refusal(thief.delete_bucket, Bucket=name),
    ] == ["AccessDenied"] * 9
    site.attack()
    result = run_backup(site.elsewhere(site.target), "list").expect(2)
    assert "holds no repository" in result.output
    assert_rescued(site, moment, new_bucket("rescued"), objects)


@pytest.mark.long
def test_what_a_thief_prunes_comes_back_too(site: Site, new_bucket: NewBucket) -> None:
    """With borg, in place of S3: archives deleted and the space compacted."""
    objects = site.source.contents()
    run_backup(site.environment).expect(0)
    moment = quiet_moment()
    run_backup(site.environment, "borg", "first", "delete", "--glob-archives", "*").expect(0)
    run_backup(site.environment, "borg", "first", "compact", "--threshold", "0").expect(0)
    assert run_backup(site.environment, "list").expect(0).lines[-1].split() == ["first", "-", "-", "-", "-"]
    assert_rescued(site, moment, new_bucket("rescued"), objects)


@pytest.mark.long
def test_the_maintenance_container_does_what_the_backup_container_leaves(site: Site) -> None:
    """Without a source. No backup deletes anything below `data/`: each such marker is the maintenance's."""
    for content in (b"1", b"2", b"3"):
        site.source.put({"changes": content})
        run_backup(site.environment).expect(0)

    def deleted() -> list[str]:
        found = site.server.client(ADMIN).list_object_versions(Bucket=site.target.name, Prefix="data/")
        return [entry["Key"] for entry in found.get("DeleteMarkers", []) if not entry["Key"].endswith("/")]

    assert deleted() == []
    assert "pruned 2 archives, kept 1" in run_backup(site.maintenance(), "maintain").expect(0).output
    assert deleted() != []
    run_backup(site.environment).expect(0)
    assert len(run_backup(site.environment, "list").expect(0).lines) == 1 + 2


def test_the_commands_for_versioning_and_lifecycle_do_what_the_text_says(moto: Moto) -> None:
    """By boto3, which judges names as the `aws` command does, against a server that keeps what it is told."""
    admin, bucket = moto.client(ADMIN), Bucket(moto, "my-backups").create()
    words = shlex.split(code_block("shell").replace("\\\n", " "))
    starts = [*(number for number, word in enumerate(words) if word == "aws"), len(words)]
    for start, end in pairwise(starts):
        _, service, operation, *options = words[start:end]
        assert (service, options[:2]) == ("s3api", ["--bucket", bucket.name])
        name, value = options[2:]
        fields = json.loads(value) if value.startswith("{") else dict([value.split("=")])
        parameter = name.removeprefix("--").title().replace("-", "")
        getattr(admin, operation.replace("-", "_"))(Bucket=bucket.name, **{parameter: fields})
    assert admin.get_bucket_versioning(Bucket=bucket.name)["Status"] == "Enabled"
    [rule] = admin.get_bucket_lifecycle_configuration(Bucket=bucket.name)["Rules"]
    assert rule.pop("ID") == "old versions"
    assert rule == {
        "Status": "Enabled",
        "Filter": {},
        "NoncurrentVersionExpiration": {"NoncurrentDays": 60},
        "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 7},
        "Expiration": {"ExpiredObjectDeleteMarker": True},
    }


@pytest.mark.long
@pytest.mark.parametrize("mode", ["GOVERNANCE", "COMPLIANCE"])
def test_backups_prune_and_compact_in_a_bucket_with_object_lock(
    moto: Moto, tmp_path: Path, mode: str
) -> None:
    """And the versions that are locked cannot be deleted, by nobody.

    Moto checks retention, but no permissions. Under a default retention it wants a checksum of copies, too,
    which S3 does not: so each version is locked here when it was written.
    """
    admin = moto.client(ADMIN)
    source = Bucket(moto, f"source-{mode.lower()}").create()
    target, rescued = Bucket(moto, f"locked-{mode.lower()}"), Bucket(moto, f"rescued-{mode.lower()}").create()
    admin.create_bucket(Bucket=target.name, ObjectLockEnabledForBucket=True)
    site = make_site(moto, source, target, tmp_path)
    objects = source.contents()
    run_backup(site.environment).expect(0)
    moment = quiet_moment()
    retention = {"Mode": mode, "RetainUntilDate": datetime.now(UTC) + timedelta(days=1)}
    locked = []
    for entry in admin.list_object_versions(Bucket=target.name)["Versions"]:
        this = {"Bucket": target.name, "Key": entry["Key"], "VersionId": entry["VersionId"]}
        admin.put_object_retention(**this, Retention=retention)
        locked.append(this)
    source.put({"more": b"more"})
    run_backup(with_target(site.environment, "first", prune="--keep-last=1", compact=0)).expect(0)
    assert {refusal(admin.delete_object, **this) for this in locked} == {"AccessDenied"}
    site.attack()
    assert_rescued(site, moment, rescued, objects)


def test_a_default_retention_asks_for_checksums_and_gets_them(moto: Moto, tmp_path: Path) -> None:
    """S3 takes no object without one then: what we write ourselves has it, and what TigrisFS uploads."""
    admin = moto.client(ADMIN)
    source, target = Bucket(moto, "source-default").create(), Bucket(moto, "locked-default")
    admin.create_bucket(Bucket=target.name, ObjectLockEnabledForBucket=True)
    rule = {"DefaultRetention": {"Mode": "COMPLIANCE", "Days": 1}}
    configuration = {"ObjectLockEnabled": "Enabled", "Rule": rule}
    admin.put_object_lock_configuration(Bucket=target.name, ObjectLockConfiguration=configuration)
    site = make_site(moto, source, target, tmp_path)
    run_backup(site.environment, "check-config").expect(0)
    content = os.urandom(30_000_000)
    with mounted(target, tmp_path / "mount") as folder:
        (folder / "small").write_bytes(b"small")
        (folder / "large").write_bytes(content)
    assert target.contents() == {"small": b"small", "large": content}
