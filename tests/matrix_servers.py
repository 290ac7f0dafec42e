"""The S3 servers of `tests/run servers` beside SeaweedFS and Moto; tests/setup installs them, each pinned."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import botocore.exceptions

from servers import ADMIN, READER, WRITER, Moto, SeaweedFS, Server

CACHE = Path(os.environ.get("S3BORGBACKUP_CACHE", ""))
# What the README says a source, a target and a bucket to restore into need.
MAY_READ = ("s3:ListBucket", "s3:GetObject", "s3:GetObjectTagging")
MAY_WRITE = (*MAY_READ, "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:PutObjectTagging")


def policy(bucket: str, principals: Mapping[str, Sequence[str]]) -> str:
    """A bucket policy: who (as the server names its users) may do what."""
    statements = [
        {
            "Effect": "Allow",
            "Principal": {"AWS": [who]},
            "Action": list(actions),
            "Resource": [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"],
        }
        for who, actions in principals.items()
    ]
    return json.dumps({"Version": "2012-10-17", "Statement": statements})


class Listed(Server):
    """A server that is up when it lists its buckets."""

    def answers(self) -> bool:
        try:
            self.client().list_buckets()
            return True
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError):
            return False


class VersityGW(Listed):
    """versitygw on a folder: objects are files, what belongs to them is in extended attributes."""

    name = "versitygw"

    def command(self) -> Sequence[str | Path]:
        data, users, versions = (self.directory / name for name in ("data", "users", "versions"))
        for folder in (data, users, versions):
            folder.mkdir(exist_ok=True)
        accounts = {
            each.access_key_id: {
                "access": each.access_key_id,
                "secret": each.secret_access_key,
                "role": "user",
            }
            for each in (READER, WRITER)
        }
        (users / "users.json").write_text(json.dumps({"accessAccounts": accounts}))
        return (
            *("versitygw", "--port", f"127.0.0.1:{self.ports[0]}", "--iam-dir", users, "--quiet"),
            *("--access", ADMIN.access_key_id, "--secret", ADMIN.secret_access_key),
            *("posix", "--versioning-dir", versions, data),
        )

    def admit(self, bucket: str) -> None:
        rights = {READER.access_key_id: MAY_READ, WRITER.access_key_id: MAY_WRITE}
        self.client().put_bucket_policy(Bucket=bucket, Policy=policy(bucket, rights))


class OneKey(Listed):
    """A server that knows but one key, which may do everything."""

    reader = writer = ADMIN


class Rclone(OneKey):
    """`rclone serve s3` of a folder."""

    name = "rclone"

    def command(self) -> Sequence[str | Path]:
        data = self.directory / "data"
        data.mkdir(exist_ok=True)
        key = f"{ADMIN.access_key_id},{ADMIN.secret_access_key}"
        return ("rclone", "serve", "s3", "--addr", f"127.0.0.1:{self.ports[0]}", "--auth-key", key, data)


def said(*command: str | Path, pattern: str = r"\d+(\.\d+)+") -> str:
    """The version in what a program prints."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    found = re.search(pattern, done.stdout)
    return found[0] if found else "?"


class Kind:
    """A server of the matrix: its class, what to call it, and how to learn its version."""

    def __init__(self, make: type[Server], title: str, *version_command: str, is_quick: bool = False) -> None:
        self.make, self.title, self.is_quick = make, title, is_quick
        self._version_command = version_command

    @property
    def missing(self) -> str:
        """The program that it lacks here, or an empty text."""
        program = self._version_command[0] if self._version_command else "moto_server"
        return "" if shutil.which(program) else program

    @property
    def version(self) -> str:
        """The version that is installed."""
        if self.make is Moto:
            return version("moto")
        return said(*self._version_command)


KINDS = (
    Kind(SeaweedFS, "SeaweedFS", "weed", "version"),
    Kind(Moto, "Moto"),
    Kind(VersityGW, "versitygw", "versitygw", "--version", is_quick=True),
    Kind(Rclone, "rclone serve s3", "rclone", "version"),
)

# What cannot be had from package registries, or not within reason.
ABSENT: dict[str, str] = {}
