"""What public S3 providers do and no server here does: each as one rule, with whole runs through it.

A rule is played by the proxy before a real SeaweedFS. Its docstring names the provider's documentation that
says so, or the report of somebody who saw it. Through its provider's rules a run works, or it ends with one
line that has S3's own words and a remedy.
"""

import hashlib
import math
import os
import urllib.parse
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pytest

from helpers import Bucket, Result, run_backup, sample_objects, settings
from proof import prove_intact
from proxy import Action, FaultProxy, Request
from servers import ADMIN, WRITER, SeaweedFS, s3_client

pytestmark = pytest.mark.usefixtures("needs_fuse")

Rule = Callable[[FaultProxy], None]

KEY_NAMES = ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")
LEASE = ".s3borgbackup-lease"
LARGE_BYTES = 23_000_000  # in a target parts of 5 MiB, in a bucket that is restored to two of 16 MiB


@contextmanager
def provider(server: SeaweedFS, *rules: Rule) -> Iterator[FaultProxy]:
    """The server behind a provider's rules."""
    with FaultProxy(server.endpoint, 7) as proxy:
        for rule in rules:
            rule(proxy)
        yield proxy


def all_at(
    proxy: FaultProxy, server: SeaweedFS, folder: Path, source: Bucket, target: Bucket, **variables: str
) -> dict[str, str]:
    """Settings with the source, the target and whatever is restored to at one provider."""
    return settings(
        server,
        folder,
        source.name,
        {"first": {"path": target.name, "endpoint": proxy.endpoint}},
        SOURCE_ENDPOINT=proxy.endpoint,
        RESTORE_ACCESS_KEY_ID=WRITER.access_key_id,
        RESTORE_SECRET_ACCESS_KEY=WRITER.secret_access_key,
        **variables,
    )


def prove_all(
    environment: dict[str, str], source: Bucket, target: Bucket, destination: Bucket, folder: Path
) -> Result:
    """A first run, an unchanged one and a restore into a bucket; returns the first run's result."""
    source.put({**sample_objects(41, 40), "large": os.urandom(LARGE_BYTES)})
    result = run_backup(environment).expect(0)
    prove_intact(environment, source, target, folder)
    run_backup(environment, "restore", "first", "--to-bucket", destination.name).expect(0)
    assert destination.contents() == source.contents()
    return result


def the_error(result: Result) -> str:
    """The only error line of a command that failed."""
    lines = {line.partition("error: ")[2] for line in result.lines if "error: " in line}
    [line] = lines
    return line


# ---------------------------------------------------------------------------------------------- Cloudflare R2


def r2_one_write_a_second(proxy: FaultProxy) -> None:
    """One write a second to the same key; others are answered with 429.

    https://developers.cloudflare.com/r2/platform/limits/ (maximum concurrent writes to the same object name),
    https://developers.cloudflare.com/r2/api/error-codes/ (10058). The S3 API's code and words are those that
    people report.
    """
    written: dict[str, float] = defaultdict(lambda: -math.inf)

    def is_too_early(request: Request) -> bool:
        if request.kind not in ("PUT", "COPY", "COMPLETE", "DELETE"):
            return False
        is_early = request.when < written[request.path] + 1
        written[request.path] = written[request.path] if is_early else request.when
        return is_early

    words = "Reduce your concurrent request rate for the same object."
    proxy.add(is_too_early, Action.REFUSE, status=429, code="ServiceUnavailable", message=words)


def r2_equal_parts(proxy: FaultProxy) -> None:
    """All parts of an upload but the last have the same size, and the last is not larger.

    https://developers.cloudflare.com/r2/objects/multipart-objects/#limitations, and for the words
    https://github.com/cloudflare/cloudflare-docs/pull/9549, https://github.com/apache/opendal/issues/2904.
    """
    parts: dict[str, dict[int, int]] = defaultdict(dict)

    def is_unequal(request: Request) -> bool:
        upload = request.query.get("uploadId", "")
        if request.kind == "PART":
            parts[upload][int(request.query["partNumber"])] = request.body_bytes
        if request.kind != "COMPLETE":
            return False
        *sizes, last = (size for _, size in sorted(parts[upload].items()))
        return len({*sizes}) > 1 or last > min(sizes, default=last)

    words = "All non-trailing parts must have the same length."
    proxy.add(is_unequal, Action.REFUSE, status=400, code="InvalidPart", message=words)


R2_REGIONS = ("wnam", "enam", "weur", "eeur", "apac", "oc", "auto")


def r2_region(proxy: FaultProxy) -> None:
    """The region is `auto`; `us-east-1` and none are other names of it, all else is refused.

    https://developers.cloudflare.com/r2/api/s3/api/ (bucket region), for the words
    https://github.com/iterate-ch/cyberduck/issues/16377.
    """
    for region in ("eu-central-1", "us-west-2"):
        words = f"The region name '{region}' is not valid. Must be one of: {', '.join(R2_REGIONS)}"
        proxy.add(
            lambda request, region=region: signed_for(request) == region,
            Action.REFUSE,
            status=400,
            code="InvalidRegionName",
            message=words,
        )


def signed_for(request: Request) -> str:
    """The region in a request's signature."""
    return (request.headers.get("authorization", "").split("/") + [""] * 3)[2]


def r2_knows_no_tags_and_redirects(proxy: FaultProxy) -> None:
    """A header or an operation that it does not know is refused with 501, never ignored.

    https://developers.cloudflare.com/r2/api/s3/api/ (PutObject: neither tagging nor website), for the words
    https://github.com/openreplay/openreplay/issues/2018, https://github.com/jhaals/yopass/issues/3657.
    """
    for header in ("x-amz-tagging", "x-amz-tagging-directive", "x-amz-website-redirect-location"):
        proxy.add(
            lambda request, header=header: header in request.headers,
            Action.REFUSE,
            status=501,
            code="NotImplemented",
            message=f"Header '{header}' with value '…' not implemented",
        )
    proxy.add(
        lambda request: "tagging" in request.query,
        Action.REFUSE,
        status=501,
        code="NotImplemented",
        message="GetObjectTagging not implemented",
    )


R2 = (r2_one_write_a_second, r2_equal_parts, r2_region, r2_knows_no_tags_and_redirects)


@pytest.mark.long
@pytest.mark.parametrize("region", ["auto", ""])
def test_cloudflare_r2(
    server: SeaweedFS, new_bucket: Callable[..., Bucket], tmp_path: Path, region: str
) -> None:
    source, target, destination = (new_bucket(name) for name in ("source", "target", "destination"))
    with provider(server, *R2) as proxy:
        environment = all_at(proxy, server, tmp_path, source, target, SOURCE_REGION=region)
        prove_all(environment, source, target, destination, tmp_path)
        regions = {signed_for(request) for request, _ in proxy.requests if request.bucket == source.name}
        assert regions == {region or "us-east-1"}
        assert proxy.count(lambda request: request.kind == "PART") > 4


def test_what_r2_does_not_keep_is_told_when_a_bucket_is_restored_there(
    server: SeaweedFS, source: Bucket, target: Bucket, new_bucket: Callable[..., Bucket], tmp_path: Path
) -> None:
    """Of a source elsewhere. All objects arrive."""
    destination = new_bucket("destination")
    source.put({"plain": b"plain"})
    source.client.put_object(
        Bucket=source.name, Key="tagged", Body=b"tagged", Tagging="a=b", CacheControl="no-store"
    )
    with provider(server, *R2) as proxy:
        environment = settings(
            server,
            tmp_path,
            source.name,
            {"first": target.name},
            RESTORE_ENDPOINT=proxy.endpoint,
            RESTORE_ACCESS_KEY_ID=WRITER.access_key_id,
            RESTORE_SECRET_ACCESS_KEY=WRITER.secret_access_key,
        )
        environment |= {f"SOURCE_{name}": getattr(WRITER, name.lower()) for name in KEY_NAMES}
        run_backup(environment).expect(0)
        result = run_backup(environment, "restore", "first", "--to-bucket", destination.name).expect(1)
    assert "x-amz-tagging" in result.output
    assert destination.contents() == source.contents()
    assert destination.client.head_object(Bucket=destination.name, Key="tagged")["CacheControl"] == "no-store"


def test_a_lease_that_was_renewed_within_the_second_is_given_back(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    """As R2 does not delete it then (429). Else the next run would have to wait until it has expired."""
    source.put({"key": b"content"})
    with FaultProxy(server.endpoint) as proxy:
        entry = {"path": target.name, "endpoint": proxy.endpoint}
        environment = settings(server, tmp_path, source.name, {"first": entry})
        fault = proxy.add(
            lambda request: request.kind == "DELETE" and request.key == LEASE,
            Action.REFUSE,
            times=2,
            status=429,
        )
        result = run_backup(environment).expect(0)
    assert fault.hit == 2
    assert "could not be given back" not in result.output
    assert LEASE not in target.sizes()


def test_a_region_that_r2_does_not_know_is_told_before_anything_is_done(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    with provider(server, *R2) as proxy:
        environment = all_at(proxy, server, tmp_path, source, target, SOURCE_REGION="eu-central-1")
        error = the_error(run_backup(environment, "check-config").expect(2))
    assert "InvalidRegionName (400): The region name 'eu-central-1' is not valid. Must be one of:" in error
    assert error.endswith("Set SOURCE_REGION to the bucket's region.")


# ----------------------------------------------------------------------------------------------- Backblaze B2


def b2_too_busy(proxy: FaultProxy) -> None:
    """Uploads are answered with 503 now and then, by design, and are to be sent again.

    https://www.backblaze.com/blog/b2-503-500-server-error/, for the words
    https://github.com/mastodon/mastodon/issues/30030.
    """
    proxy.add(
        lambda request: request.kind in ("PUT", "PART", "INITIATE", "COMPLETE"),
        Action.REFUSE,
        probability=0.2,
        status=503,
        code="ServiceUnavailable",
        message="no tomes available",
        headers={"Retry-After": "1"},
    )


def b2_unsupported_headers(proxy: FaultProxy) -> None:
    """Tags and checksums are refused, never ignored.

    https://www.backblaze.com/apidocs/s3-copy-object (tagging), for the words
    https://github.com/Intrinsec/s3proxy/issues/34, https://github.com/iterate-ch/cyberduck/issues/16107.
    """
    proxy.add(
        lambda request: any(
            name == "x-amz-tagging" or name.startswith("x-amz-checksum-") for name in request.headers
        ),
        Action.REFUSE,
        status=400,
        code="InvalidArgument",
        message="Unsupported header 'x-amz-tagging' received for this API call.",
    )


STORAGE_CAP = (
    "AccessDenied",
    "Cannot upload files, storage cap exceeded. See the Caps & Alerts page to increase your cap.",
)


def b2_storage_cap(proxy: FaultProxy) -> None:
    """Where a new account has stored its 10 GB, or as much as its owner allowed, nothing can be written.

    https://github.com/restic/restic/issues/3265, https://github.com/restic/restic/issues/3582.
    """
    code, message = STORAGE_CAP
    proxy.add(lambda request: request.method == "PUT", Action.REFUSE, code=code, message=message)


@pytest.mark.long
def test_backblaze_b2(server: SeaweedFS, new_bucket: Callable[..., Bucket], tmp_path: Path) -> None:
    source, target, destination = (new_bucket(name) for name in ("source", "target", "destination"))
    with provider(server, b2_unsupported_headers, b2_too_busy) as proxy:
        environment = all_at(proxy, server, tmp_path, source, target)
        prove_all(environment, source, target, destination, tmp_path)
        assert [status for _, status in proxy.requests].count(503) > 5


@pytest.mark.long
def test_a_cap_that_is_reached_in_mid_run_is_told_in_s3s_words_and_nothing_is_lost(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    """By tigrisfs, as no small request of our own is refused."""
    source.put({"first": b"first"})
    with FaultProxy(server.endpoint) as proxy:
        entry = {"path": target.name, "endpoint": proxy.endpoint}
        environment = settings(server, tmp_path, source.name, {"first": entry}, LEASE_TTL="10")
        run_backup(environment).expect(0)
        source.put({"large": os.urandom(LARGE_BYTES)})
        code, message = STORAGE_CAP
        proxy.add(lambda request: request.body_bytes > 100_000, Action.REFUSE, code=code, message=message)
        result = run_backup(environment).expect(2)
        [told] = [line for line in result.lines if line.startswith("first: target-first (")]
        assert f"{code} (403): {message}" in told
        assert "have its quota or cap raised" in told
        proxy.clear()
        prove_intact(environment, source, target, tmp_path)


# -------------------------------------------------------------------------------------------------------- AWS

REGION = "eu-central-1"
MALFORMED = f"The authorization header is malformed; the region is wrong; expecting '{REGION}'"
DENIED = "with an explicit deny in a resource-based policy"
STYLE = 'The server wants the bucket in its host name: set TARGETS "first"."addressing"=virtual.'


def aws_right_region(proxy: FaultProxy) -> None:
    """A request that is signed for another region than the bucket's is refused, with the right one.

    https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html (AuthorizationHeaderMalformed).
    """
    proxy.add(
        lambda request: signed_for(request) != REGION,
        Action.REFUSE,
        status=400,
        code="AuthorizationHeaderMalformed",
        message=MALFORMED,
        details=f"<Region>{REGION}</Region>",
    )


def aws_object_lock(proxy: FaultProxy) -> None:
    """A bucket with a default retention takes nothing without an MD5 or a checksum of its own, parts neither.

    https://github.com/versity/versitygw/issues/1740, https://github.com/s3tools/s3cmd/issues/1436.
    """

    def has_none(request: Request) -> bool:
        names = {name for name in request.headers if name.startswith(("content-md5", "x-amz-checksum-"))}
        return request.kind in ("PUT", "PART") and not names

    words = (
        "Content-MD5 OR x-amz-checksum- HTTP header is required for Put Object requests with Object Lock"
        " parameters"
    )
    proxy.add(has_none, Action.REFUSE, status=400, code="InvalidRequest", message=words)


def aws_moved(status: int, code: str) -> Rule:
    """The bucket is in another region, and its endpoint is in the answer's body.

    https://docs.aws.amazon.com/AmazonS3/latest/developerguide/UsingRouting.html, for the words
    https://github.com/appoxy/aws/pull/110.
    """

    def rule(proxy: FaultProxy) -> None:
        words = (
            "The bucket you are attempting to access must be addressed using the specified endpoint. Please"
            " send all future requests to this endpoint."
        )
        proxy.add(
            lambda _: True,
            Action.REFUSE,
            status=status,
            code=code,
            message=words,
            details=f"<Endpoint>bucket.s3.{REGION}.amazonaws.com</Endpoint>",
            headers={"x-amz-bucket-region": REGION},
        )

    return rule


def aws_encryption_is_demanded(proxy: FaultProxy) -> None:
    """A bucket policy denies whatever is written without a header that asks for encryption.

    https://github.com/opentofu/opentofu/issues/2970, https://github.com/usdigitalresponse/usdr-gost/pull/4044.
    """
    words = (
        "User: arn:aws:iam::123456789012:user/backup is not authorized to perform: s3:PutObject on resource:"
        f' "arn:aws:s3:::bucket/key" {DENIED}'
    )
    proxy.add(
        lambda request: (
            request.kind in ("PUT", "COPY", "INITIATE")
            and "x-amz-server-side-encryption" not in request.headers
        ),
        Action.REFUSE,
        message=words,
    )


@pytest.mark.long
def test_aws(server: SeaweedFS, new_bucket: Callable[..., Bucket], tmp_path: Path) -> None:
    """The region is found out; TigrisFS sends an MD5 with all that it writes, as we do."""
    source, target, destination = (new_bucket(name) for name in ("source", "target", "destination"))
    with provider(server, aws_right_region, aws_object_lock) as proxy:
        environment = all_at(proxy, server, tmp_path, source, target)
        prove_all(environment, source, target, destination, tmp_path)


# -------------------------------------------------------------------------------- Alibaba OSS and Tencent COS


def oss_wants_the_bucket_in_the_host(proxy: FaultProxy) -> None:
    """Requests by path are refused.

    https://www.alibabacloud.com/help/doc-detail/389025.html (request style), for the words
    https://github.com/peak/s5cmd/issues/518.
    """
    words = "Please use virtual hosted style to access."
    proxy.add(lambda _: True, Action.REFUSE, code="SecondLevelDomainForbidden", message=words)


def cos_wants_the_bucket_in_the_host(proxy: FaultProxy) -> None:
    """Requests by path are refused for buckets made since 2024.

    https://cloud.tencent.com/document/faq/436/102489, and https://github.com/gobackup/gobackup/issues/268.
    """
    words = "The bucket you are attempting to access must be addressed using COS virtual-styled domain."
    proxy.add(lambda _: True, Action.REFUSE, code="PathStyleDomainForbidden", message=words)


# --------------------------------------------------------------------------- What cannot work is told at once

MOVED = (
    "The bucket you are attempting to access must be addressed using the specified endpoint. Please send all"
    f" future requests to this endpoint. bucket.s3.{REGION}.amazonaws.com. Write the endpoint of the bucket's"
    " own region into"
)
TOLD: dict[str, tuple[Rule, dict[str, str], str]] = {
    "B2, a cap": (b2_storage_cap, {}, f"{STORAGE_CAP[0]} (403): {STORAGE_CAP[1]} Make room"),
    "AWS, another region": (
        aws_right_region,
        {"region": "us-west-1"},
        f"AuthorizationHeaderMalformed (400): {MALFORMED}. Set",
    ),
    "AWS, moved for good": (aws_moved(301, "PermanentRedirect"), {}, f"PermanentRedirect (301): {MOVED}"),
    "AWS, moved for now": (aws_moved(307, "TemporaryRedirect"), {}, f"TemporaryRedirect (307): {MOVED}"),
    "AWS, encryption": (aws_encryption_is_demanded, {}, f"{DENIED}. A policy denies that, whatever the"),
    "Alibaba OSS": (
        oss_wants_the_bucket_in_the_host,
        {},
        f"hosted style to access. {STYLE}",
    ),
    "Tencent COS": (cos_wants_the_bucket_in_the_host, {}, f"using COS virtual-styled domain. {STYLE}"),
}


@pytest.mark.parametrize(("rule", "fields", "words"), TOLD.values(), ids=TOLD)
def test_what_a_provider_refuses_is_told_in_one_line_with_its_words_and_a_remedy(
    server: SeaweedFS,
    source: Bucket,
    target: Bucket,
    tmp_path: Path,
    rule: Rule,
    fields: dict[str, str],
    words: str,
) -> None:
    source.put({"key": b"content"})
    with provider(server, rule) as proxy:
        entry = {"path": target.name, "endpoint": proxy.endpoint, **fields}
        environment = settings(server, tmp_path, source.name, {"first": entry})
        result = run_backup(environment).expect(2)
    error = the_error(result)
    assert error.startswith(f"target-first ({target.name} at {proxy.endpoint}): ")
    assert words in error
    assert target.sizes() == {}


# --------------------------------------------------------------------------------------- Google Cloud Storage


def gcs_no_deletion_of_many(proxy: FaultProxy) -> None:
    """Objects are deleted one by one.

    https://cloud.google.com/storage/docs/migrating#methods-comparison, for the words
    https://github.com/minio/mc/issues/4778.
    """
    proxy.add(
        lambda request: request.kind == "DELETES",
        Action.REFUSE,
        status=400,
        code="NotImplemented",
        message="A header or query you provided requested a function that is not implemented.",
        details="<Details>POST ?delete is not implemented for objects.</Details>",
    )


def gcs_no_conditional_writes(proxy: FaultProxy) -> None:
    """If-Match and If-None-Match are for reading; a write ignores them.

    https://cloud.google.com/storage/docs/request-preconditions and
    https://github.com/ClickHouse/ClickHouse/issues/115266.
    """
    proxy.add(lambda request: request.is_write, Action.IGNORE_CONDITIONS)


@pytest.mark.long
def test_google_cloud_storage(server: SeaweedFS, new_bucket: Callable[..., Bucket], tmp_path: Path) -> None:
    """Each run warns that others are not excluded. Keys are encoded in listings where that is told (V2).

    In those of version 1 they are encoded without a word (https://github.com/boto/botocore/issues/3394).
    """
    source, target, destination = (new_bucket(name) for name in ("source", "target", "destination"))
    with provider(server, gcs_no_deletion_of_many, gcs_no_conditional_writes) as proxy:
        environment = all_at(proxy, server, tmp_path, source, target)
        result = prove_all(environment, source, target, destination, tmp_path)
        assert "this S3 server does not enforce conditional writes" in result.output
        assert {
            request.query.get("list-type")
            for request, _ in proxy.requests
            if request.kind == "LIST" and "encoding-type" in request.query and "uploads" not in request.query
        } == {"2"}


# ------------------------------------------------------------------------------------------------------ Storj


PAGE_OBJECTS = 100  # 1,000 at Storj


def storj_order(proxy: FaultProxy) -> None:
    """Listings are in the order of the encrypted keys, part for part, and begin behind a key in that order.

    https://storj.dev/dcs/buckets/object-listings and
    https://storj.dev/dcs/api/s3/s3-compatibility/storj-vs-self-managed-encryption-s3-compatibility-differences.
    The salt stands for a key of the encryption that has borg's lock before its `hints`.
    """
    host, port = proxy.upstream
    client = s3_client(f"http://{host}:{port}", ADMIN)

    def place(key: str) -> list[str]:
        return [part and hashlib.sha256(f"d{part}".encode()).hexdigest() for part in key.split("/")]

    def listing(request: Request) -> str:
        query = request.query
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter") or "\0"
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=request.bucket, Prefix=prefix)
        found: dict[str, dict[str, Any]] = {}
        for entry in (entry for page in pages for entry in page.get("Contents", ())):
            name, cut, _ = entry["Key"][len(prefix) :].partition(delimiter)
            found[prefix + name + cut] = {} if cut else entry
        after = query.get("continuation-token") or query.get("start-after") or query.get("marker")
        keys = sorted((key for key in found if not after or place(key) > place(after)), key=place)
        page = keys[: min(int(query.get("max-keys", 1000)), PAGE_OBJECTS)]
        is_encoded, is_last = "encoding-type" in query, len(page) == len(keys)
        encode = urllib.parse.quote if is_encoded else escape
        words = "<EncodingType>url</EncodingType>" if is_encoded else ""
        words += f"<IsTruncated>{'false' if is_last else 'true'}</IsTruncated>"
        if not is_last:
            words += "".join(f"<{name}>{escape(page[-1])}</{name}>" for name in NEXT_PAGE)
        for key in page:
            words += entry_of(encode(key), found[key])
        return f"<ListBucketResult>{words}</ListBucketResult>"

    proxy.add(
        lambda request: request.kind == "LIST" and "uploads" not in request.query,
        Action.ANSWER,
        answer=listing,
    )


NEXT_PAGE = ("NextContinuationToken", "NextMarker")


def entry_of(name: str, entry: dict[str, Any]) -> str:
    """A listing's entry; one that boto3 told nothing of is a folder."""
    if not entry:
        return f"<CommonPrefixes><Prefix>{name}</Prefix></CommonPrefixes>"
    modified, etag = f"{entry['LastModified']:%Y-%m-%dT%H:%M:%S.000Z}", escape(entry["ETag"])
    facts = f"<LastModified>{modified}</LastModified><ETag>{etag}</ETag><Size>{entry['Size']}</Size>"
    return f"<Contents><Key>{name}</Key>{facts}</Contents>"


def storj_uploads(proxy: FaultProxy) -> None:
    """Uploads in parts are listed by prefixes that end with a slash only.

    https://storj.dev/dcs/api/s3/s3-compatibility (ListMultipartUploads).
    """
    _storj_refuses_prefixes(proxy, lambda request: "uploads" in request.query)


def storj_whole_prefixes(proxy: FaultProxy) -> None:
    """So are objects, in projects that were made since December 2025.

    https://storj.dev/dcs/api/s3/s3-compatibility/storj-vs-self-managed-encryption-s3-compatibility-differences.
    """
    _storj_refuses_prefixes(proxy, lambda _: True)


def _storj_refuses_prefixes(proxy: FaultProxy, where: Callable[[Request], bool]) -> None:
    proxy.add(
        lambda request: (
            request.kind == "LIST"
            and not (request.query.get("prefix") or "/").endswith("/")
            and where(request)
        ),
        Action.REFUSE,
        status=501,
        code="NotImplemented",
        message="A header you provided implies functionality that is not implemented",
    )


@pytest.mark.long
def test_storj(server: SeaweedFS, new_bucket: Callable[..., Bucket], tmp_path: Path) -> None:
    """With more objects in one folder than a page has."""
    source, target, destination = (new_bucket(name) for name in ("source", "target", "destination"))
    source.put({f"many/{number}": b"x" for number in range(2 * PAGE_OBJECTS + 50)})
    with provider(server, storj_uploads, storj_order) as proxy:
        environment = all_at(proxy, server, tmp_path, source, target)
        prove_all(environment, source, target, destination, tmp_path)


def test_what_crashed_runs_left_is_found_whatever_the_order_of_listings(
    server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path
) -> None:
    source.put({"key": b"content"})
    with provider(server, storj_whole_prefixes, storj_order) as proxy:
        environment = all_at(proxy, server, tmp_path, source, target)
        run_backup(environment).expect(0)
        target.put({"lock.exclusive/s3borgbackup-1-0123.4-0": b""})
        run_backup(environment).expect(0)
    assert target.locks() == []


def test_that_storj_lists_no_part_of_a_name_is_told_when_a_bucket_is_restored_there(
    server: SeaweedFS, source: Bucket, target: Bucket, new_bucket: Callable[..., Bucket], tmp_path: Path
) -> None:
    """And nothing is written."""
    destination = new_bucket("destination")
    with provider(server, storj_whole_prefixes, storj_order) as proxy:
        environment = all_at(proxy, server, tmp_path, source, target)
        result = run_backup(environment, "restore", "first", "--to-bucket", destination.name).expect(2)
        where = f"destination ({destination.name} at {proxy.endpoint}): NotImplemented (501): "
    assert the_error(result).startswith(where)
    assert the_error(result).endswith("update the server, or use another one.")
    assert destination.sizes() == {}
