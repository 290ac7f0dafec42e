"""The S3 servers of `tests/run servers` beside SeaweedFS and Moto; tests/setup installs them, each pinned."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import textwrap
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from servers import (
    ADMIN,
    READER,
    WRITER,
    Identity,
    Listed,
    Moto,
    SeaweedFS,
    Server,
    ServerError,
    die_with_parent,
)

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

    def make_bucket(self, name: str) -> None:
        super().make_bucket(name)
        rights = {READER.access_key_id: MAY_READ, WRITER.access_key_id: MAY_WRITE}
        self.client().put_bucket_policy(Bucket=name, Policy=policy(name, rights))


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


class Java(OneKey):
    """A server in Java. Logback tells everything unless it is told not to."""

    start_seconds = 120

    def environment(self) -> Mapping[str, str]:
        quiet = self.directory / "logback.xml"
        quiet.write_text('<configuration><root level="OFF"/></configuration>')
        options = f"-Dlogback.configurationFile={quiet}"
        return {**super().environment(), "JDK_JAVA_OPTIONS": options, "LC_ALL": "C.UTF-8"}


class S3Proxy(Java):
    """s3proxy on a folder."""

    name = "s3proxy"

    def command(self) -> Sequence[str | Path]:
        properties, data = self.directory / "s3proxy.properties", self.directory / "data"
        data.mkdir(exist_ok=True)
        lines = {
            "s3proxy.endpoint": self.endpoint,
            "s3proxy.authorization": "aws-v2-or-v4",
            "s3proxy.identity": ADMIN.access_key_id,
            "s3proxy.credential": ADMIN.secret_access_key,
            "jclouds.provider": "filesystem-nio2",
            "jclouds.filesystem.basedir": data,
        }
        properties.write_text("".join(f"{name}={value}\n" for name, value in lines.items()))
        return ("s3proxy", "--properties", properties)


class S3Mock(Java):
    """Adobe's S3Mock, which asks nobody for a key."""

    name = "s3mock"
    port_count = 2

    def command(self) -> Sequence[str | Path]:
        data = self.directory / "data"
        data.mkdir(exist_ok=True)
        return (
            "s3mock",
            f"--http.port={self.ports[0]}",
            f"--server.port={self.ports[1]}",
            "--server.address=127.0.0.1",
            f"--com.adobe.testing.s3mock.store.root={data}",
        )


class MinIO(Listed):
    """MinIO on a folder; its users are made by its admin API, whose bodies are encrypted."""

    name = "minio"
    port_count = 2

    def command(self) -> Sequence[str | Path]:
        address, console = (f"127.0.0.1:{port}" for port in self.ports)
        return (
            "minio",
            "server",
            "--address",
            address,
            "--console-address",
            console,
            self.directory / "data",
        )

    def environment(self) -> Mapping[str, str]:
        root = {"MINIO_ROOT_USER": ADMIN.access_key_id, "MINIO_ROOT_PASSWORD": ADMIN.secret_access_key}
        return {**super().environment(), **root, "MINIO_BROWSER": "off", "MINIO_UPDATE": "off"}

    def answers(self) -> bool:
        """It lists buckets some time before it can take users."""
        try:
            return super().answers() and self._make_users()
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise
            return False

    def _make_users(self) -> bool:
        for user, actions in ((READER, MAY_READ), (WRITER, MAY_WRITE)):
            allowed = {"Effect": "Allow", "Action": list(actions), "Resource": ["arn:aws:s3:::*"]}
            name, rights = user.access_key_id, {"Version": "2012-10-17", "Statement": [allowed]}
            self._admin("add-canned-policy", json.dumps(rights).encode(), name=name)
            account = json.dumps({"secretKey": user.secret_access_key, "status": "enabled"})
            self._admin("add-user", sealed(account.encode(), ADMIN.secret_access_key), accessKey=name)
            self._admin("set-user-or-group-policy", policyName=name, userOrGroup=name, isGroup="false")
        return True

    def _admin(self, call: str, body: bytes = b"", **parameters: str) -> None:
        url = f"{self.endpoint}/minio/admin/v3/{call}?{urllib.parse.urlencode(parameters)}"
        request = AWSRequest("PUT", url, data=body)
        key = Credentials(ADMIN.access_key_id, ADMIN.secret_access_key)
        S3SigV4Auth(key, "s3", self.region).add_auth(request)
        urllib.request.urlopen(
            urllib.request.Request(url, body, dict(request.headers), method="PUT"), timeout=30
        ).close()


def sealed(data: bytes, password: str) -> bytes:
    """Encrypted as MinIO's admin API wants it (madmin-go/encrypt.go): PBKDF2, AES-GCM, one fragment."""
    salt, nonce = os.urandom(32), os.urandom(8)
    key = AESGCM(hashlib.pbkdf2_hmac("sha256", password.encode(), salt, 8192, 32))
    first = key.encrypt(nonce + bytes(4), b"", b"")
    last_fragment = b"\x80" + first
    return salt + b"\x02" + nonce + key.encrypt(nonce + b"\1\0\0\0", data, last_fragment)


class Garage(Listed):
    """Garage, one node. Its keys have a form of their own."""

    name = "garage"
    port_count = 4
    admin = Identity("GK" + "a" * 24, "a" * 64, ())
    reader = Identity("GK" + "b" * 24, "b" * 64, ())
    writer = Identity("GK" + "c" * 24, "c" * 64, ())
    region = "garage"

    def command(self) -> Sequence[str | Path]:
        s3, rpc, web, admin = (f"127.0.0.1:{port}" for port in self.ports)
        self._config.write_text(
            f"""
            metadata_dir = "{self.directory}/meta"
            data_dir = "{self.directory}/data"
            db_engine = "lmdb"
            replication_factor = 1
            rpc_bind_addr = "{rpc}"
            rpc_public_addr = "{rpc}"
            rpc_secret = "{"d" * 64}"
            [s3_api]
            s3_region = "{self.region}"
            api_bind_addr = "{s3}"
            [s3_web]
            bind_addr = "{web}"
            root_domain = ".web.test"
            [admin]
            api_bind_addr = "{admin}"
            """
        )
        return ("garage", "-c", self._config, "server")

    @property
    def _config(self) -> Path:
        return self.directory / "garage.toml"

    def answers(self) -> bool:
        try:
            self._tell("status")
        except ServerError:
            return False
        return True

    def start(self) -> Self:
        super().start()
        node = self._tell("node", "id", "-q").partition("@")[0]
        self._tell("layout", "assign", node, "-z", "here", "-c", "10G")
        self._tell("layout", "apply", "--version", "1")
        for each in (self.admin, self.reader, self.writer):
            self._tell("key", "import", "--yes", each.access_key_id, each.secret_access_key)
        self._tell("key", "allow", "--create-bucket", self.admin.access_key_id)
        return self

    def make_bucket(self, name: str) -> None:
        """One that is made by S3 has a name for its maker alone."""
        self._tell("bucket", "create", name)
        may_write = ("--read", "--write")
        for each, rights in (
            (self.admin, ("--owner", *may_write)),
            (self.reader, ("--read",)),
            (self.writer, may_write),
        ):
            self._tell("bucket", "allow", name, *rights, "--key", each.access_key_id)

    def _tell(self, *words: str) -> str:
        return output_of("garage", "-c", self._config, *words)


class Ceph(Listed):
    """Ceph's RADOS gateway before a monitor and a store in memory, which trust each other."""

    name = "ceph"
    port_count = 2
    start_seconds = 120
    cluster, store = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))

    def __init__(self, directory: Path | None = None) -> None:
        super().__init__(directory)
        self._others: list[subprocess.Popen[bytes]] = []

    def command(self) -> Sequence[str | Path]:
        return self._with_config("radosgw", "-n", "client.rgw", "-f")

    def _with_config(self, program: str, *words: str | Path) -> Sequence[str | Path]:
        return (program, "-c", self.directory / "ceph.conf", *words)

    def _start_once(self) -> None:
        for part in ("mon", "osd", "rgw"):
            shutil.rmtree(self.directory / part, ignore_errors=True)
            (self.directory / part).mkdir()
        s3, monitor = (f"127.0.0.1:{port}" for port in self.ports)
        (self.directory / "ceph.conf").write_text(
            textwrap.dedent(
                f"""
                [global]
                fsid = {self.cluster}
                mon host = v1:{monitor}
                ms bind msgr2 = false
                public network = 127.0.0.0/8
                cluster network = 127.0.0.0/8
                auth cluster required = none
                auth service required = none
                auth client required = none
                keyring = {self.directory}/keyring
                osd pool default size = 1
                osd pool default min size = 1
                osd pool default pg num = 4
                mon allow pool size one = true
                mon max pg per osd = 1000
                osd crush chooseleaf type = 0
                osd objectstore = memstore
                memstore device bytes = 8589934592
                admin socket =
                log file = {self.directory}/$name.log
                mon data = {self.directory}/mon
                osd data = {self.directory}/osd
                rgw data = {self.directory}/rgw
                rgw frontends = beast endpoint={s3}
                """
            )
        )
        (self.directory / "keyring").touch()
        monitors = self.directory / "monitors"
        output_of(
            *("monmaptool", "--create", "--clobber", "--fsid", self.cluster),
            *("--addv", "a", f"[v1:{monitor}]", monitors),
        )
        output_of(*self._with_config("ceph-mon", "--mkfs", "-i", "a", "--monmap", monitors))
        self._start_other("ceph-mon", "-i", "a", "-f")
        output_of(*self._with_config("ceph", "--connect-timeout", "60", "osd", "new", self.store))
        output_of(*self._with_config("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", self.store))
        self._start_other("ceph-osd", "-i", "0", "-f")
        for each in (ADMIN, READER, WRITER):
            name, secret = each.access_key_id, each.secret_access_key
            words = ("--uid", name, "--display-name", name, "--access-key", name, "--secret-key", secret)
            output_of(*self._with_config("radosgw-admin", "-n", "client.rgw", "user", "create", *words))
        super()._start_once()

    def _start_other(self, program: str, *words: str) -> None:
        with self.log_path.open("ab") as log:
            self._others.append(
                subprocess.Popen(
                    [str(part) for part in self._with_config(program, *words)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=die_with_parent,
                )
            )

    def stop(self) -> None:
        super().stop()
        while self._others:
            other = self._others.pop()
            other.kill()
            other.wait()

    def make_bucket(self, name: str) -> None:
        super().make_bucket(name)
        # An object is its writer's, whom else the bucket's owner would have to ask.
        users = {ADMIN: ("s3:*",), READER: MAY_READ, WRITER: MAY_WRITE}
        rights = {f"arn:aws:iam:::user/{user.access_key_id}": may for user, may in users.items()}
        self.client().put_bucket_policy(Bucket=name, Policy=policy(name, rights))


def output_of(*command: str | Path) -> str:
    """What a program prints that has to succeed within two minutes. Raises ServerError with its words."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode:
        raise ServerError(f"{command} ended with {done.returncode}: {done.stderr}")
    return done.stdout


class Kind:
    """A server of the matrix: its class, what to call it, and how to learn its version."""

    def __init__(
        self,
        make: type[Server],
        title: str,
        *asking: str,
        pattern: str = r"\d+(\.\d+)+",
        is_quick: bool = False,
    ) -> None:
        """`asking` is the program, and what makes it print its version; none: its folder's name has that."""
        self.make, self.title, self.is_quick = make, title, is_quick
        self._asking, self._pattern = asking, pattern

    @property
    def missing(self) -> str:
        """The program that is not installed, or an empty text."""
        return "" if shutil.which(self._asking[0]) else self._asking[0]

    @property
    def version(self) -> str:
        """The version that is installed."""
        if len(self._asking) > 1:
            done = subprocess.run(
                self._asking, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
            )
            words = done.stdout
        else:
            words = Path(os.path.realpath(shutil.which(self._asking[0]) or "")).parent.name
        found = re.search(self._pattern, words)
        return found[0] if found else words.strip()


KINDS = (
    Kind(SeaweedFS, "SeaweedFS", "weed", "version"),
    Kind(Moto, "Moto", "python", "-c", "import moto; print(moto.__version__)"),
    Kind(VersityGW, "versitygw", "versitygw", "--version", is_quick=True),
    Kind(MinIO, "MinIO", "minio", pattern="20[0-9]{6}"),
    Kind(Garage, "Garage", "garage", "--version"),
    Kind(
        Ceph,
        "Ceph RADOS gateway",
        "radosgw",
        "--version",
    ),
    Kind(S3Proxy, "s3proxy", "s3proxy"),
    Kind(Rclone, "rclone serve s3", "rclone", "version"),
    Kind(S3Mock, "S3Mock", "s3mock"),
)

# What cannot be had from package registries, or not within reason.
ABSENT = {
    "RustFS 1.0.1": "it takes Rust 1.98, and hours to build",
    "Zenko CloudServer": "the npm registry does not have it",
}
