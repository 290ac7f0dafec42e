"""What a server does with what is written to it: the storage class, and encryption of its own."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from faults.proxy import Action, FaultProxy, Request
from helpers import Bucket, first_short, run_backup, settings, with_target
from servers import WRITER, Moto, SeaweedFS

pytestmark = pytest.mark.usefixtures("needs_fuse")

CLASS, SSE, KEY = (
    "x-amz-storage-class",
    "x-amz-server-side-encryption",
    "x-amz-server-side-encryption-aws-kms-key-id",
)
KMS_KEY = "arn:aws:kms:eu-west-1:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab"
DEMANDS = {
    "a class and a key": (
        {"storage_class": "GLACIER_IR", "sse": f"aws:kms:{KMS_KEY}"},
        {CLASS: "GLACIER_IR", SSE: "aws:kms", KEY: KMS_KEY},
    ),
    "AES256": ({"sse": "AES256"}, {SSE: "AES256"}),
    "the account's key": ({"sse": "aws:kms"}, {SSE: "aws:kms", KEY: None}),
    "a class": ({"storage_class": "STANDARD_IA"}, {CLASS: "STANDARD_IA", SSE: None}),
}


def makes_an_object(request: Request) -> bool:
    """Whether a policy that demands headers looks at it."""
    return request.kind in ("PUT", "COPY", "INITIATE")


@contextmanager
def demanding(server: SeaweedFS, headers: Mapping[str, str | None]) -> Iterator[FaultProxy]:
    """A server that refuses to make an object without these headers, which SeaweedFS need not know."""

    def is_lacking(request: Request) -> bool:
        return makes_an_object(request) and any(
            request.headers.get(name) != text for name, text in headers.items()
        )

    with FaultProxy(server.endpoint) as proxy:
        proxy.add(is_lacking, Action.REFUSE)
        proxy.add(makes_an_object, Action.REWRITE, rewrite=lambda request: request.without(CLASS, SSE, KEY))
        yield proxy


@pytest.mark.parametrize(("fields", "headers"), first_short([*DEMANDS.values()]), ids=DEMANDS)
def test_each_request_that_makes_an_object_says_how_it_is_to_be_kept(
    server: SeaweedFS,
    source: Bucket,
    target: Bucket,
    new_bucket: Callable[..., Bucket],
    tmp_path: Path,
    fields: dict[str, str],
    headers: dict[str, str | None],
) -> None:
    """Of a mount and of ours; and without the setting the server's refusal is told in time."""
    objects = {"a": b"a", "large": os.urandom(17 * 1024 * 1024)}
    source.put(objects)
    restored = new_bucket("restored")
    with demanding(server, headers) as proxy:
        env = settings(server, tmp_path, source.name, {"first": {"path": target.name, "prune": "-d1"}})
        env = with_target(env, "first", endpoint=proxy.endpoint)
        env |= {
            "RESTORE_ENDPOINT": proxy.endpoint,
            "RESTORE_ACCESS_KEY_ID": WRITER.access_key_id,
            "RESTORE_SECRET_ACCESS_KEY": WRITER.secret_access_key,
        }
        refused = run_backup(env).expect(2)
        assert "AccessDenied (403)" in refused.output
        assert "Give the key s3:PutObject on" in refused.output
        assert target.sizes() == {}

        env = with_target(env, "first", **fields)
        run_backup(env).expect(0)
        source.delete("a")
        run_backup(env).expect(0)
        run_backup(env).expect(0)
        run_backup(env, "maintain").expect(0)
        assert "AccessDenied" in run_backup(env, "restore", "first", "--to-bucket", restored.name).output
        assert restored.sizes() == {}
        env |= {f"RESTORE_{name.upper()}": text for name, text in fields.items()}
        middle = len(proxy.requests)
        run_backup(env, "restore", "first", "--to-bucket", restored.name).expect(0)
        seen = {
            (request.bucket, request.kind, "user-agent" in request.headers)
            for request, status in proxy.requests
            if makes_an_object(request) and status == 200
        }
    assert restored.contents() == {"large": objects["large"]}
    # What is written by the mount, and by our own client.
    wanted = {(target.name, kind, True) for kind in ("PUT", "COPY", "INITIATE")} | {
        (target.name, "PUT", False)
    }
    assert seen >= wanted | {(restored.name, "INITIATE", False)}
    assert not [each for each, status in proxy.requests[middle:] if status == 403]


@pytest.mark.long
def test_objects_are_kept_as_the_settings_say(
    moto: Moto, new_bucket: Callable[..., Bucket], tmp_path: Path
) -> None:
    source, target, restored = (new_bucket(name, on=moto) for name in ("source", "target", "restored"))
    source.put({"a": b"a", "large": os.urandom(6_000_000)})
    kept = {"storage_class": "STANDARD_IA", "sse": f"aws:kms:{KMS_KEY}"}
    more = {f"RESTORE_{name.upper()}": text for name, text in kept.items()}
    env = settings(moto, tmp_path, source.name, {"first": {"path": target.name, **kept}}, **more)
    run_backup(env).expect(0)
    run_backup(env, "restore", "first", "--to-bucket", restored.name).expect(0)
    for bucket in (target, restored):
        for key in bucket.sizes():
            head = bucket.client.head_object(Bucket=bucket.name, Key=key)
            found = head.get("StorageClass"), head.get("ServerSideEncryption"), head.get("SSEKMSKeyId")
            assert found == ("STANDARD_IA", "aws:kms", KMS_KEY), key
    assert len(target.sizes()) > 5
