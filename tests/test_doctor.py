"""`check-config` as a doctor: whatever is wrong with a store is named, each with what to do about it."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from faults.proxy import Action, FaultProxy, Request
from helpers import Bucket, run_backup, settings, small_disk, with_target, with_target_secrets
from servers import Identity, SeaweedFS, free_ports
from test_told import Receiver, own_certificate

LISTER = Identity("lister-key", "lister-secret-1a", ("List",))
READER_OF_TARGETS = Identity("target-reader-key", "target-reader-secret-1a", ("Read", "List"))


@dataclass
class Case:
    """A configuration in which something is wrong with the source or with the target."""

    environment: dict[str, str]
    server: SeaweedFS
    proxies: dict[str, FaultProxy]
    folder: Path
    stack: contextlib.ExitStack

    def set(self, store: str, **fields: str) -> None:
        """Sets something of a store, by the name that it has of a target."""
        if store == "source":
            self.environment |= {f"SOURCE_{name.upper()}": text for name, text in fields.items()}
            return
        secrets = {key: text for key, text in fields.items() if key not in ("endpoint", "path")}
        others = {key: text for key, text in fields.items() if key not in secrets}
        changed = with_target(self.environment, "first", **others)
        self.environment = with_target_secrets(changed, "first", **secrets)


def at(endpoint: str) -> Callable[[Case, str], None]:
    """The store is there."""
    return lambda case, store: case.set(store, endpoint=endpoint)


def untrusted(case: Case, store: str) -> None:
    """Its certificate is nobody's."""
    receiver = case.stack.enter_context(Receiver(certificate=own_certificate(case.folder / "own.pem")))
    case.set(store, endpoint=receiver.url("").rstrip("/"))


def wrong_clock(case: Case, store: str) -> None:
    """The server's clock is two hours ahead of ours, and it refuses what is signed by ours."""
    proxy = case.proxies[store]
    proxy.add(lambda request: not request.bucket, Action.OTHER_DATE, seconds=7230)  # Date has whole seconds
    proxy.add(lambda request: bool(request.bucket), Action.REFUSE, code="RequestTimeTooSkewed")


def key_of(identity: Identity) -> Callable[[Case, str], None]:
    """The store is reached with the key of somebody who may do less."""

    def change(case: Case, store: str) -> None:
        if identity not in case.server.identities:
            case.server.add_identity(identity)
        parts = {"access_key_id": identity.access_key_id, "secret_access_key": identity.secret_access_key}
        case.set(store, **parts)

    return change


def rule(
    matches: Callable[[Request], bool], action: Action = Action.REFUSE, **details: object
) -> Callable[[Case, str], None]:
    """What its server does with some requests."""
    return lambda case, store: case.proxies[store].add(matches, action, **details) and None


NOT_IMPLEMENTED = {"status": 501, "code": "NotImplemented"}
# What is wrong; the words in the line of the point that fails, and in the one that says what to do.
FAULTS: dict[str, tuple[Callable[[Case, str], None], str, str]] = {
    "nobody listens": (
        at(f"http://127.0.0.1:{free_ports(1)[0]}"),
        "reach +failed: NoAnswer",
        "Check {endpoint} and the network",
    ),
    "no such host": (at("http://s3.invalid"), "reach +failed: NoAnswer", "Check {endpoint} and the network"),
    "untrusted": (untrusted, "reach +failed: Untrusted", "Check {endpoint}.*SSL_CERT_FILE"),
    "wrong clock": (
        wrong_clock,
        "reach +failed: RequestTimeTooSkewed",
        "the clock here is 2 h.* behind.*set it",
    ),
    "wrong key": (
        lambda case, store: case.set(store, access_key_id="nobody"),
        "credentials +failed: InvalidAccessKeyId",
        "Correct {access_key_id}",
    ),
    "wrong secret": (
        lambda case, store: case.set(store, secret_access_key="wrong"),
        "credentials +failed: SignatureDoesNotMatch",
        "Correct {secret_access_key}",
    ),
    "no bucket": (
        lambda case, store: case.set(store, path="no-such-bucket"),
        "list +failed: NoSuchBucket",
        "Create the bucket or correct {path}",
    ),
    "may only list": (key_of(LISTER), "read, ranges +failed: AccessDenied", "s3:GetObject on"),
    "may only read": (key_of(READER_OF_TARGETS), "write +failed: AccessDenied", "s3:PutObject on"),
    "may not list": (
        rule(lambda request: request.kind == "LIST"),
        "list +failed: AccessDenied",
        "s3:ListBucket on",
    ),
    "may not write": (
        rule(lambda request: request.kind == "PUT"),
        "write +failed: AccessDenied",
        "s3:PutObject on",
    ),
    "may not delete": (
        rule(lambda request: request.kind == "DELETE"),
        "delete +failed: AccessDenied",
        "s3:DeleteObject on",
    ),
    "no multipart": (
        rule(lambda request: request.kind == "INITIATE", **NOT_IMPLEMENTED),
        "multipart +failed: NotImplemented",
        "multipart: .*What is needed does not work there",
    ),
    "no conditions": (
        rule(lambda _: True, Action.IGNORE_CONDITIONS),
        "conditional writes +not known here: see to it",
        "",
    ),
    "conditions are refused": (
        rule(lambda request: "if-none-match" in request.headers, **NOT_IMPLEMENTED),
        "conditional writes +not known here: see to it",
        "",
    ),
    "tags may not be read": (
        rule(lambda request: "tagging" in request.query),
        "tags +objects' tags may not be read",
        "",
    ),
    "no tags": (
        rule(lambda request: "tagging" in request.query, **NOT_IMPLEMENTED),
        "tags +not known here: NotImplemented",
        "",
    ),
    "ranges are ignored": (
        rule(lambda request: "range" in request.headers, Action.IGNORE_RANGE),
        "read, ranges +failed: RangeIgnored",
        "have {endpoint}.*heed them",
    ),
}
PAIRS = [
    ("source: wrong secret", "target: no bucket"),
    ("target: may not delete", "target: no multipart"),
    ("source: tags may not be read", "target: may only read"),
    ("source: may only list", "target: wrong key"),
    ("target: may not list", "target: may not write"),
    ("target: ranges are ignored", "target: no conditions"),
    ("source: no tags", "target: conditions are refused"),
    ("source: ranges are ignored", "target: wrong clock"),
    ("source: nobody listens", "target: untrusted"),
    ("source: no such host", "target: wrong secret"),
    ("source: wrong clock", "target: may not list"),
    ("target: may not write", "target: no multipart"),
    ("source: no bucket", "target: nobody listens"),
]  # fmt: skip

SHORT_AND_LONG = [*PAIRS[:5], *(pytest.param(pair, marks=pytest.mark.long) for pair in PAIRS[5:])]


@pytest.fixture
def case(server: SeaweedFS, source: Bucket, target: Bucket, tmp_path: Path) -> Iterator[Case]:
    """Nothing is wrong yet."""
    source.put({"a": b"object"})
    env = settings(server, tmp_path, source.name, {"first": target.name})
    with contextlib.ExitStack() as stack:
        proxies = {name: stack.enter_context(FaultProxy(server.endpoint)) for name in ("source", "target")}
        made = Case(env, server, proxies, tmp_path, stack)
        for name, proxy in proxies.items():
            made.set(name, endpoint=proxy.endpoint)
        yield made


def place(store: str, key: str) -> str:
    """What a user has to correct, as a pattern."""
    if store == "source":
        return f"SOURCE_{key.upper()}"
    return f'TARGET\\w+ "first"."{key}"'


def named(output: str, wrong: Sequence[str]) -> None:
    """Each of these has its line in the table, below its store, and one line that says what to do."""
    table = output.partition("target-first")
    for store, _, fault in (each.partition(": ") for each in wrong):
        point, remedy = FAULTS[fault][1:]
        rows = table[0] if store == "source" else table[2]
        assert re.search(rf"^(target-first)? +{point}", rows, re.M), f"{store}: {fault}\n{output}"
        for key in ("endpoint", "path", "access_key_id", "secret_access_key"):
            remedy = remedy.replace(f"{{{key}}}", place(store, key))
        name = "source" if store == "source" else "target-first"
        lines = [line for line in output.splitlines() if "error: " in line and f": {name} (" in line]
        assert not remedy or re.search(remedy, "\n".join(lines)), f"{store}: {fault}\n{output}"


@pytest.mark.parametrize("wrong", SHORT_AND_LONG, ids=map(" + ".join, PAIRS))
def test_any_two_faults_are_both_named_and_nothing_stays(
    case: Case, source: Bucket, target: Bucket, wrong: Sequence[str]
) -> None:
    for each in wrong:
        store, _, fault = each.partition(": ")
        FAULTS[fault][0](case, store)
    is_usable = not any(FAULTS[each.partition(": ")[2]][2] for each in wrong)
    result = run_backup(case.environment, "check-config").expect(0 if is_usable else 2)
    named(result.output, wrong)
    assert source.sizes() == {"a": 6}
    left = target.sizes()
    assert not left or ("target: may not delete" in wrong and next(iter(left)) in result.output)
    assert not target.client.list_multipart_uploads(Bucket=target.name).get("Uploads")


def test_what_a_slow_compression_costs_is_measured_on_the_sources_own_data(
    server: SeaweedFS, source: Bucket, target: Bucket, new_bucket: Callable[[str], Bucket], tmp_path: Path
) -> None:
    lines = "".join(f"{number * 7919 % 99991} of what compresses well\n" for number in range(60_000)).encode()
    source.put({f"{part}": lines[part:] for part in range(3)})
    env = settings(server, tmp_path, source.name, {"first": target.name, "second": new_bucket("second").name})
    env = with_target(env, "first", compression="lzma,9")
    output = run_backup(env, "check-config").expect(0).output
    [row] = re.findall(r"^ +compression +(.*)$", output.partition("target-second")[0], re.M)
    words = re.fullmatch(
        r"lzma,9 archives ([\d.]+) (k|M)B/s and leaves (\d+) %, "
        r"zstd,3 archives ([\d.]+) MB/s and leaves (\d+) % \(first 4 MB\)",
        row,
    )
    assert words, row
    slow = float(words[1]) * (1 if words[2] == "M" else 0.001)
    assert slow < float(words[4])
    assert 0 < int(words[3]) < int(words[5]) < 50
    assert "compression" not in output.partition("target-second")[2], "lz4 costs nothing"
    assert not target.sizes()
    assert not [*(tmp_path / "tmp").iterdir()]
    broken = run_backup(with_target(env, "second", path="no-such-bucket"), "check-config").expect(2)
    assert "zstd,3" not in broken.output
    with small_disk(tmp_path / "tmp"):  # which a run has no need of
        unmeasured = run_backup(env, "check-config").expect(0)
    assert re.search("^ +compression +not measured: .*No space left on device", unmeasured.output, re.M)
