"""Where a server wants a bucket's name, and an S3 API below a path."""

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from faults.proxy import Action, FaultProxy, Request
from helpers import Backup, Bucket, Result, run_backup, settings, skip_or_fail, with_target
from servers import WRITER, SeaweedFS

pytestmark = pytest.mark.usefixtures("needs_fuse")

HOST = "s3.s3borgbackup.test"


def with_hosts(folder: Path, names: list[str], environment: Mapping[str, str], *words: str) -> Result:
    """backup.py where these names are this machine's, for Python and for Go."""
    unshare = shutil.which("unshare")
    if os.geteuid() != 0 or not unshare:
        skip_or_fail("a mount namespace takes root and unshare(1)")
    hosts = folder / "hosts"
    hosts.write_text(f"127.0.0.1 localhost {' '.join(names)}\n")
    script = f'mount --bind "{hosts}" /etc/hosts && exec "$@"'
    with Backup(environment, *words, through=[str(unshare), "--mount", "sh", "-c", script, "sh"]) as running:
        return running.wait()


def is_virtual(request: Request) -> bool:
    """Whether the bucket is in the host's name."""
    return request.headers["host"].partition(":")[0].endswith(f".{HOST}")


def with_path(request: Request) -> Request:
    """The same in path style, as SeaweedFS takes it."""
    target = f"/{request.headers['host'].partition('.')[0]}{request.target}"
    return dataclasses.replace(request, target=target)


def story(run: Callable[..., Result], source: Bucket, restored: Bucket, environment: dict[str, str]) -> None:
    """A run, one without changes, and a restore into a bucket."""
    objects = {"a": b"a", "deep/er": b"b", "large": os.urandom(17 * 1024 * 1024)}
    source.put(objects)
    run(environment, "check-config").expect(0)
    run(environment, "run").expect(0)
    run(environment, "run").expect(0)
    keys = {"RESTORE_ACCESS_KEY_ID": WRITER.access_key_id}
    keys |= {"RESTORE_SECRET_ACCESS_KEY": WRITER.secret_access_key}
    run({**environment, **keys}, "restore", "first", "--to-bucket", restored.name).expect(0)
    assert restored.contents() == objects


def test_a_server_that_takes_virtual_hosts_only(
    server: SeaweedFS, source: Bucket, target: Bucket, new_bucket: Callable[..., Bucket], tmp_path: Path
) -> None:
    """And one who wrote `path` is told what to write."""
    restored = new_bucket("restored")
    names = [HOST, *(f"{bucket.name}.{HOST}" for bucket in (source, target, restored))]
    with FaultProxy(server.endpoint) as proxy:
        proxy.add(
            lambda request: not is_virtual(request) and "authorization" in request.headers,
            Action.REFUSE,
            code="SecondLevelDomainForbidden",
        )
        proxy.add(is_virtual, Action.REWRITE, rewrite=with_path)
        endpoint = proxy.endpoint.replace("127.0.0.1", HOST)
        env = settings(server, tmp_path, source.name, {"first": target.name}, SOURCE_ENDPOINT=endpoint)
        env = with_target(env, "first", endpoint=endpoint)

        def run(environment: Mapping[str, str], *words: str) -> Result:
            return with_hosts(tmp_path, names, environment, *words)

        wrong = run(env, "check-config").expect(2)
        assert "set SOURCE_ADDRESSING=virtual" in wrong.output
        assert 'TARGETS "first"."addressing"=virtual' in wrong.output
        env = with_target({**env, "SOURCE_ADDRESSING": "virtual"}, "first", addressing="virtual")
        before = len(proxy.requests)
        story(run, source, restored, env)
        late = proxy.requests[before:]
        assert not [each for each, status in late if status == 403 and each.authorization]


@pytest.mark.long
def test_an_api_below_a_path_and_buckets_with_dots(
    server: SeaweedFS, new_bucket: Callable[..., Bucket], tmp_path: Path
) -> None:
    source, target, restored = (new_bucket(f"{name}.with.dots") for name in ("source", "target", "restored"))
    path = "/storage/v1/s3"
    with FaultProxy(server.endpoint) as proxy:
        proxy.add(
            lambda request: not request.target.startswith(f"{path}/") and "authorization" in request.headers,
            Action.REFUSE,
            status=404,
            code="NoSuchPath",
        )
        proxy.add(
            lambda request: request.target.startswith(f"{path}/"),
            Action.REWRITE,
            rewrite=lambda request: dataclasses.replace(request, target=request.target.removeprefix(path)),
        )
        endpoint = f"{proxy.endpoint}{path}"
        env = settings(server, tmp_path, source.name, {"first": target.name}, SOURCE_ENDPOINT=f"{endpoint}/")
        story(run_backup, source, restored, with_target(env, "first", endpoint=endpoint))
        assert not [each for each, status in proxy.requests if status == 404 and each.kind == "OTHER"]
