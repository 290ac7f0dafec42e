"""Requests are signed as AWS specifies: its published examples; odd keys and queries as botocore signs."""

import functools
import hashlib
import random
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

import backup
from servers import Identity, s3_client

EXAMPLE_KEY_ID = "AKIAIOSFODNN7EXAMPLE"
EXAMPLE_SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
EXAMPLE_DATE = datetime(2013, 5, 24, tzinfo=UTC)
EMPTY_HASH = hashlib.sha256(b"").hexdigest()

# "Examples: Signature Calculations" in "Signature Calculations for the Authorization Header: Transferring
# Payload in a Single Chunk" of the Amazon S3 API reference: request, canonical request's hash, signature.
PUBLISHED_EXAMPLES = {
    "GET object": (
        ("GET", "/test.txt", [], {"Range": "bytes=0-9"}, b""),
        "7344ae5b7ee6c3e7e6b0fe0640412a37625d1fbfff95c48bbb2dc43964946972",
        "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
    ),
    "PUT object": (
        (
            "PUT",
            "/test$file.text",
            [],
            {"Date": "Fri, 24 May 2013 00:00:00 GMT", "x-amz-storage-class": "REDUCED_REDUNDANCY"},
            b"Welcome to Amazon S3.",
        ),
        "9e0e90d9c76de8fa5b200d8c849cd5b8dc7a3be3951ddb7f6a76b4158342019d",
        "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd",
    ),
    "GET bucket lifecycle": (
        ("GET", "/", [("lifecycle", "")], {}, b""),
        "9766c798316ff2757b517bc739a67f6213b4ab36dd5da2f94eaebf79c77395ca",
        "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543",
    ),
    "GET bucket (list objects)": (
        ("GET", "/", [("max-keys", "2"), ("prefix", "J")], {}, b""),
        "df57d21db20da04d7fa30298dd4488ba3a2b47ca3a489c74750e0f1e7df1b9b7",
        "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7",
    ),
}

Query = Sequence[tuple[str, str]]


@pytest.mark.parametrize(
    ("request_parts", "canonical_hash", "signature"),
    PUBLISHED_EXAMPLES.values(),
    ids=PUBLISHED_EXAMPLES.keys(),
)
def test_published_examples_of_s3(
    request_parts: tuple[str, str, Query, Mapping[str, str], bytes], canonical_hash: str, signature: str
) -> None:
    method, path, query, own_headers, body = request_parts
    payload_hash = hashlib.sha256(body).hexdigest()
    headers = {
        "Host": "examplebucket.s3.amazonaws.com",
        **own_headers,
        "x-amz-content-sha256": payload_hash,
        "x-amz-date": "20130524T000000Z",
    }
    canonical = backup.canonical_request(method, path, query, headers, payload_hash)
    assert hashlib.sha256(canonical.encode()).hexdigest() == canonical_hash
    value = backup.authorization(canonical, EXAMPLE_KEY_ID, EXAMPLE_SECRET, EXAMPLE_DATE, "us-east-1")
    assert fields_of(value) == {
        "Credential": f"{EXAMPLE_KEY_ID}/20130524/us-east-1/s3/aws4_request",
        "SignedHeaders": ";".join(sorted(name.lower() for name in headers)),
        "Signature": signature,
    }


def fields_of(authorization: str) -> dict[str, str]:
    """The named parts of an Authorization header; clients differ in the blanks between them."""
    algorithm, _, rest = authorization.partition(" ")
    assert algorithm == "AWS4-HMAC-SHA256"
    return dict(part.split("=", 1) for part in re.split(r",\s*", rest))


class Captured(Exception):
    """Carries a request of boto3 away at the moment when it would be sent."""

    def __init__(self, request: Any) -> None:
        super().__init__(request)
        self.request = request


@functools.cache
def unsent_client() -> Any:
    """A boto3 client that signs everything and sends nothing."""

    def capture(request: Any, **_: Any) -> None:
        raise Captured(request)

    client = s3_client("http://s3.test:9000", Identity(EXAMPLE_KEY_ID, EXAMPLE_SECRET, ()))
    client.meta.events.register("before-send.s3", capture)
    return client


def signed_by_boto3(operation: str, **parameters: Any) -> Any:
    """The request that boto3 would send, signed."""
    with pytest.raises(Captured) as captured:
        getattr(unsent_client(), operation)(**parameters)
    return captured.value.request


def text(value: str | bytes) -> str:
    """A header's value as text: botocore keeps some as bytes."""
    return value.decode() if isinstance(value, bytes) else value


def assert_signed_alike(request: Any, path: str, query: Query) -> None:
    """backup.py gives this captured request the same URL and the same signature, from the decoded parts."""
    headers = {name.lower(): text(value) for name, value in request.headers.items()}
    expected = fields_of(headers["authorization"])
    url = urllib.parse.urlsplit(request.url)
    signed = {
        name: url.netloc if name == "host" else headers[name] for name in expected["SignedHeaders"].split(";")
    }
    payload_hash = headers["x-amz-content-sha256"]
    when = datetime.strptime(headers["x-amz-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    canonical = backup.canonical_request(request.method, path, query, signed, payload_hash)
    assert canonical.split("\n")[1] == url.path
    value = backup.authorization(canonical, EXAMPLE_KEY_ID, EXAMPLE_SECRET, when, "us-east-1")
    assert fields_of(value) == expected


ODD_KEYS = (
    "plain.txt",
    "with space",
    "a+b",
    "a%20b",
    "100%",
    "%",
    "~tilde-_.!*'()",
    "Straße/日本語/🗄",
    "e\u0301",
    "new\nline",
    "tab\tand\rreturn",
    "double//slash",
    "///",
    "trailing/",
    "./dot/../dots",
    "#hash?query=1&x=y",
    "a=b;c:d@e,f$g",
    '<&>"\\^`{|}',
    "\x7f\x01",
    "x" * 200,
)


@pytest.mark.parametrize("key", ODD_KEYS)
def test_odd_keys_are_signed_as_boto3_signs_them(key: str) -> None:
    assert_signed_alike(signed_by_boto3("get_object", Bucket="bucket", Key=key), f"/bucket/{key}", [])
    assert_signed_alike(
        signed_by_boto3("put_object", Bucket="bucket", Key=key, Body=b"content", IfNoneMatch="*"),
        f"/bucket/{key}",
        [],
    )


@pytest.mark.parametrize("text", [*ODD_KEYS, "", "prefix/"])
def test_odd_prefixes_in_listings_are_signed_as_boto3_signs_them(text: str) -> None:
    query = [("list-type", "2"), ("prefix", text), ("start-after", text), ("encoding-type", "url")]
    request = signed_by_boto3("list_objects_v2", Bucket="bucket", Prefix=text, StartAfter=text)
    assert_signed_alike(request, "/bucket", query)


@pytest.mark.parametrize(
    "query",
    [
        [("location", "")],
        [("b", "2"), ("a", "1")],
        [("a", "=&+ %/~"), ("+&= %", "x")],
        [("prefix", "日本/ü"), ("delimiter", "/")],
        [("partNumber", "1"), ("uploadId", "x==")],
        [("Upper", "1"), ("lower", "2"), ("_", "3")],
        # Sorted by name first: "a" comes before "a-b", though "a-b=" comes before "a=".
        [("a-b", "1"), ("a", "2"), ("a.b", "3"), ("a1", "4")],
    ],
)
def test_odd_queries_are_encoded_and_sorted_as_botocore_does(query: Query) -> None:
    request = AWSRequest("GET", "http://s3.test/bucket", params=dict(query))
    signer = S3SigV4Auth(Credentials(EXAMPLE_KEY_ID, EXAMPLE_SECRET), "s3", "us-east-1")
    canonical = backup.canonical_request("GET", "/bucket", query, {"host": "s3.test"}, EMPTY_HASH)
    assert canonical.split("\n")[2] == signer.canonical_query_string(request)


def test_header_names_are_lowered_and_sorted_and_values_trimmed() -> None:
    headers = {"X-Amz-Date": " 20130524T000000Z ", "Host": "s3.test", "If-Match": '  "a   b"  '}
    canonical = backup.canonical_request("PUT", "/", [], headers, EMPTY_HASH)
    assert canonical == (
        'PUT\n/\n\nhost:s3.test\nif-match:"a b"\nx-amz-date:20130524T000000Z\n\n'
        f"host;if-match;x-amz-date\n{EMPTY_HASH}"
    )


def test_nothing_is_encoded_twice_or_not_at_all() -> None:
    chance = random.Random(1)
    for _ in range(500):
        path = "/" + "".join(chance.choices('ab/.~-_%+ 25=&?#\n"äß日🗄', k=chance.randrange(30)))
        canonical = backup.canonical_request("GET", path, [(path, path)], {"host": "s3.test"}, EMPTY_HASH)
        encoded_path, encoded_query = canonical.split("\n")[1:3]
        assert re.fullmatch(r"([A-Za-z0-9\-._~/]|%[0-9A-F]{2})+", encoded_path)
        assert re.fullmatch(
            r"([A-Za-z0-9\-._~]|%[0-9A-F]{2})+=([A-Za-z0-9\-._~]|%[0-9A-F]{2})+", encoded_query
        )
        assert urllib.parse.unquote(encoded_path) == path
        assert [urllib.parse.unquote(part) for part in encoded_query.split("=")] == [path, path]
