"""Configuration: all mistakes at once, each with its variable and what to write instead."""

import json
from argparse import ArgumentTypeError
from contextlib import nullcontext
from pathlib import Path

import pytest
from borg.archiver import Archiver  # before borg.compress, which needs the package to be loaded
from borg.compress import CompressionSpec
from borg.crypto.key import key_argument_names

import backup
from loading import load_settings

SECRETS = ("source-secret-value", "target-secret-value", "passphrase-value")

FIRST = {"endpoint": "https://s3.example.com", "path": "backups:first"}
FIRST_SECRETS = {"access_key_id": "AK2", "secret_access_key": SECRETS[1], "borg_passphrase": SECRETS[2]}


def environ(**changes: str | None) -> dict[str, str]:
    """A good environment with some variables changed; None takes one away."""
    values: dict[str, str | None] = {
        "SOURCE_ENDPOINT": "https://s3.example.com",
        "SOURCE_PATH": "bucket:prefix",
        "SOURCE_ACCESS_KEY_ID": "AK1",
        "SOURCE_SECRET_ACCESS_KEY": SECRETS[0],
        "TARGETS": json.dumps({"first": FIRST}),
        "TARGET_SECRETS": json.dumps({"first": FIRST_SECRETS}),
        **changes,
    }
    return {name: value for name, value in values.items() if value is not None}


def with_target(**changes: object) -> dict[str, str]:
    """A good environment with some fields of the target changed; None takes one away."""
    fields = {key: value for key, value in {**FIRST, **changes}.items() if value is not None}
    return environ(TARGETS=json.dumps({"first": fields}))


def with_secret(**changes: object) -> dict[str, str]:
    """The same for its secrets."""
    fields = {key: value for key, value in {**FIRST_SECRETS, **changes}.items() if value is not None}
    return environ(TARGET_SECRETS=json.dumps({"first": fields}))


def with_targets(**paths: str) -> dict[str, str]:
    """A good environment with these targets, each `endpoint|path`."""
    places = {name: place.split("|") for name, place in paths.items()}
    targets = {name: {"endpoint": endpoint, "path": path} for name, (endpoint, path) in places.items()}
    return environ(
        TARGETS=json.dumps(targets), TARGET_SECRETS=json.dumps(dict.fromkeys(targets, FIRST_SECRETS))
    )


def mistakes_of(environment: dict[str, str]) -> tuple[str, ...]:
    """What is reported for an environment; empty where it is good."""
    try:
        load_settings(environment)
    except backup.ConfigurationError as error:
        return error.mistakes
    return ()


S3 = "https://s3.example.com"

MISTAKES = {
    "no source endpoint": (environ(SOURCE_ENDPOINT=None), "SOURCE_ENDPOINT", "write the S3 server's URL"),
    "empty source endpoint": (environ(SOURCE_ENDPOINT=""), "SOURCE_ENDPOINT", "is missing"),
    "no source path": (environ(SOURCE_PATH=None), "SOURCE_PATH", "<bucket>"),
    "no source key": (environ(SOURCE_ACCESS_KEY_ID=None), "SOURCE_ACCESS_KEY_ID", "is missing"),
    "no source secret": (environ(SOURCE_SECRET_ACCESS_KEY=None), "SOURCE_SECRET_ACCESS_KEY", "is missing"),
    "endpoint without scheme": (environ(SOURCE_ENDPOINT="s3.example.com"), "SOURCE_ENDPOINT", "http(s) URL"),
    "ftp": (environ(SOURCE_ENDPOINT="ftp://s3.example.com"), "SOURCE_ENDPOINT", "http(s) URL"),
    "port that is none": (environ(SOURCE_ENDPOINT="http://s3:99999"), "SOURCE_ENDPOINT", "http(s) URL"),
    "endpoint with bucket": (environ(SOURCE_ENDPOINT=f"{S3}/bucket"), "SOURCE_ENDPOINT", "the path"),
    "endpoint with query": (environ(SOURCE_ENDPOINT=f"{S3}?a=b"), "SOURCE_ENDPOINT", "query"),
    "endpoint with key": (environ(SOURCE_ENDPOINT="https://a:b@s3.example.com"), "SOURCE_ENDPOINT", "keys"),
    "endpoint in another script": (
        environ(SOURCE_ENDPOINT="http://s3.exämple.com"),
        "SOURCE_ENDPOINT",
        "URL",
    ),
    "host that is none": (environ(SOURCE_ENDPOINT="http://s3..com"), "SOURCE_ENDPOINT", "http(s) URL"),
    "bare IPv6": (environ(SOURCE_ENDPOINT="http://::1"), "SOURCE_ENDPOINT", "in brackets"),
    "longer bare IPv6": (with_target(endpoint="https://2001:db8::1"), '"first"."endpoint"', "in brackets"),
    "key with a line end": (environ(SOURCE_ACCESS_KEY_ID="AK1\n"), "SOURCE_ACCESS_KEY_ID", "line end"),
    "secret with a line end": (
        with_secret(secret_access_key=f"{SECRETS[1]}\n"),
        'TARGET_SECRETS "first"."secret_access_key"',
        "line end",
    ),
    "secret after a blank": (
        environ(SOURCE_SECRET_ACCESS_KEY=f" {SECRETS[0]}"),
        "SOURCE_SECRET_ACCESS_KEY",
        "blank",
    ),
    "key in another script": (with_secret(access_key_id="AKĀ"), '"first"."access_key_id"', "printable ASCII"),
    "region with a blank": (environ(SOURCE_REGION="eu north"), "SOURCE_REGION", "blank"),
    "key to restore with": (
        environ(RESTORE_ACCESS_KEY_ID="a\n", RESTORE_SECRET_ACCESS_KEY="b"),
        "RESTORE_ACCESS_KEY_ID",
        "line end",
    ),
    "NUL": (with_secret(borg_passphrase=f"{SECRETS[2]}\0"), '"first"."borg_passphrase"', "NUL"),
    "half a surrogate pair": (with_target(path="bucket:\ud800"), 'TARGETS "first"."path"', "UTF-8"),
    "bytes that are not UTF-8": (environ(SOURCE_PATH="bucket:\udcff"), "SOURCE_PATH", "UTF-8"),
    "slash for colon": (environ(SOURCE_PATH="bucket/prefix"), "SOURCE_PATH", "did you mean 'bucket:prefix'?"),
    "bucket with space": (environ(SOURCE_PATH="my bucket"), "SOURCE_PATH", "is not a bucket name"),
    "prefix with dots": (environ(SOURCE_PATH="bucket:a/../b"), "SOURCE_PATH", "no folder can be named"),
    "prefix with empty part": (environ(SOURCE_PATH="bucket:a//b"), "SOURCE_PATH", "no folder can be named"),
    "cold class": (with_target(storage_class="DEEP_ARCHIVE"), '"first"."storage_class"', "read at once"),
    "Glacier": (with_target(storage_class="GLACIER"), '"first"."storage_class"', "GLACIER_IR"),
    "cold class to restore": (environ(RESTORE_STORAGE_CLASS="GLACIER"), "RESTORE_STORAGE_CLASS", "at once"),
    "unknown encryption by the server": (with_target(sse="kms"), '"first"."sse"', "aws:kms:<key id>"),
    "addressing": (environ(SOURCE_ADDRESSING="host"), "SOURCE_ADDRESSING", "path or virtual"),
    "virtual with dots": (
        environ(SOURCE_ADDRESSING="virtual", SOURCE_PATH="a.b"),
        "SOURCE_ADDRESSING",
        "write path",
    ),
    "virtual with an address": (
        with_target(addressing="virtual", endpoint="http://10.0.0.1:80"),
        '"first"."addressing"',
        "write path",
    ),
    "EXCLUDE that is no JSON": (environ(EXCLUDE="*.tmp"), "EXCLUDE", 'such as ["*.tmp"'),
    "EXCLUDE that is no list": (environ(EXCLUDE='{"a": 1}'), "EXCLUDE", "a JSON list"),
    "EXCLUDE with a number": (environ(EXCLUDE='["a", 1]'), "EXCLUDE", "a JSON list"),
    "EXCLUDE with nothing": (environ(EXCLUDE='[""]'), "EXCLUDE", "a JSON list"),
    "no targets": (environ(TARGETS=None), "TARGETS", "is missing"),
    "no secrets at all": (environ(TARGET_SECRETS=None), "TARGET_SECRETS", "is missing"),
    "JSON that is none": (environ(TARGETS='{"first": {]}'), "TARGETS", "at character 12"),
    "single quotes": (environ(TARGETS="'" + json.dumps({"first": FIRST}) + "'"), "TARGETS", "outer quotes"),
    "double quotes": (environ(TARGETS='"{"first": {}}"'), "TARGETS", "outer quotes"),
    "quoted secrets": (environ(TARGET_SECRETS="'{}'"), "TARGET_SECRETS", "outer quotes"),
    "a list": (environ(TARGETS="[]"), "TARGETS", "JSON object"),
    "no target in it": (environ(TARGETS="{}"), "TARGETS", "one member for each target"),
    "target that is text": (environ(TARGETS='{"first": "bucket"}'), 'TARGETS "first"', "write an object"),
    "target twice": (
        environ(TARGETS='{"first": {"path": "a"}, "first": {"path": "b"}}'),
        "TARGETS",
        '"first" is there twice',
    ),
    "key twice": (
        environ(TARGETS='{"first": {"path": "a", "path": "b"}}'),
        "TARGETS",
        '"path" is there twice',
    ),
    "typo in prune": (with_target(prun="--keep-daily=7"), 'TARGETS "first"', "did you mean prune?"),
    "unknown secret": (
        with_secret(borg_passphrse="x"),
        'TARGET_SECRETS "first"',
        "did you mean borg_passphrase?",
    ),
    "no target endpoint": (with_target(endpoint=None), 'TARGETS "first"."endpoint"', "is missing"),
    "no target path": (with_target(path=None), 'TARGETS "first"."path"', "is missing"),
    "number for text": (with_target(path=7), 'TARGETS "first"."path"', "JSON string"),
    "no target key": (
        with_secret(access_key_id=None),
        'TARGET_SECRETS "first"."access_key_id"',
        "is missing",
    ),
    "no target secret": (with_secret(secret_access_key=""), '"first"."secret_access_key"', "is missing"),
    "no passphrase": (with_secret(borg_passphrase=None), '"first"."borg_passphrase"', "openssl rand"),
    "empty passphrase": (with_secret(borg_passphrase=""), '"first"."borg_passphrase"', "is missing"),
    "line end in it": (with_secret(borg_passphrase="x\n"), '"first"."borg_passphrase"', "line end"),
    "no secrets for it": (environ(TARGET_SECRETS='{"x": {}}'), 'TARGET_SECRETS "first"', "is missing"),
    "secrets without target": (
        environ(TARGET_SECRETS=json.dumps({"first": FIRST_SECRETS, "second": FIRST_SECRETS})),
        'TARGET_SECRETS "second"',
        "no such target",
    ),
    "unknown encryption": (
        with_target(encryption="repokey-blake"),
        '"first"."encryption"',
        "write repokey-blake2 or repokey or",
    ),
    "unknown compression": (with_target(compression="gzip"), '"first"."compression"', "zstd[,1-22]"),
    "compression level": (with_target(compression="zstd,23"), '"first"."compression"', "zstd[,1-22]"),
    "compact that is text": (with_target(compact="yes"), '"first"."compact"', "percent"),
    "compact over 100": (with_target(compact=101), '"first"."compact"', "0 to 100"),
    "name with slash": (with_targets(**{"a/b": f"{S3}|x"}), 'TARGETS "a/b"', "cannot be a mount point"),
    "empty name": (with_targets(**{"": f"{S3}|x"}), 'TARGETS ""', "cannot be a mount point"),
    "long name": (with_targets(**{"n" * 250: f"{S3}|x"}), "TARGETS", "cannot be a mount point"),
    "name with placeholder": (with_targets(**{"{now}": f"{S3}|x"}), "TARGETS", "cannot be a mount point"),
    "one repository twice": (with_targets(a=f"{S3}|x:r", b=f"{S3}|x:r/"), 'TARGETS "b"."path"', "overlaps"),
    "repository in another": (with_targets(a=f"{S3}|x:r", b=f"{S3}|x:r/s"), '"b"."path"', "overlaps"),
    "target in the source": (
        with_target(path="bucket:prefix/backup"),
        '"first"."path"',
        "overlaps SOURCE_PATH",
    ),
    "source in the target": (with_target(path="bucket"), '"first"."path"', "overlaps SOURCE_PATH"),
    "same server, other spelling": (
        with_targets(a="https://S3.example.com:443/|bucket:prefix"),
        '"a"."path"',
        "overlaps SOURCE_PATH",
    ),
    "empty label": (environ(BACKUP_LABEL=" "), "BACKUP_LABEL", "letters, digits"),
    "label with slash": (environ(BACKUP_LABEL="a/b"), "BACKUP_LABEL", "letters, digits"),
    "label with pattern": (environ(BACKUP_LABEL="a*"), "BACKUP_LABEL", "letters, digits"),
    "label with placeholder": (environ(BACKUP_LABEL="{hostname}"), "BACKUP_LABEL", "letters, digits"),
    "label with year": (environ(BACKUP_LABEL="backup-2026"), "BACKUP_LABEL", "no '-' before four digits"),
    "label with year inside": (environ(BACKUP_LABEL="a-2026-b"), "BACKUP_LABEL", "no '-' before four digits"),
    "log level": (environ(LOG_LEVEL="loud"), "LOG_LEVEL", "info or debug"),
    "lease lifetime too short": (environ(LEASE_TTL="5"), "LEASE_TTL", "from 10 to 3600"),
    "lease lifetime with a unit": (environ(LEASE_TTL="60s"), "LEASE_TTL", "whole number"),
    "lease wait": (environ(LEASE_WAIT="-1"), "LEASE_WAIT", "from 0 to"),
    "stall timeout": (environ(STALL_TIMEOUT="1"), "STALL_TIMEOUT", "from 5 to"),
    "audit": (environ(AUDIT="yes"), "AUDIT", "on or off"),
    "memory limit": (environ(MEMORY_LIMIT_MB="255"), "MEMORY_LIMIT_MB", "from 256 to"),
    "relative folder": (environ(DATA_DIR="data"), "DATA_DIR", "absolute"),
    "file that is not there": (
        environ(SOURCE_PATH=None, SOURCE_PATH_FILE="/nonexistent/path"),
        "SOURCE_PATH_FILE",
        "No such file",
    ),
    "value and file": (environ(SOURCE_PATH_FILE="/nonexistent/path"), "SOURCE_PATH", "keep one"),
}


@pytest.mark.parametrize(("environment", "place", "remedy"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_with_its_place_and_its_remedy(
    environment: dict[str, str], place: str, remedy: str
) -> None:
    mistakes = mistakes_of(environment)
    assert any(mistake.startswith(place) or place in mistake.split(": ")[0] for mistake in mistakes), mistakes
    assert any(place in mistake and remedy in mistake for mistake in mistakes), mistakes


@pytest.mark.parametrize("environment", [row[0] for row in MISTAKES.values()], ids=MISTAKES)
def test_no_secret_is_in_a_message(environment: dict[str, str]) -> None:
    assert not [mistake for mistake in mistakes_of(environment) for secret in SECRETS if secret in mistake]


def test_all_mistakes_come_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """One mistake a line, exit code 78, and nothing was touched: the data folder is not even made."""
    environment = {
        **environ(SOURCE_ENDPOINT=None, SOURCE_PATH="a b", BACKUP_LABEL="x/y"),
        "TARGETS": json.dumps({"first": {**FIRST, "compression": "gzip", "prune": "--keep-daily=x"}}),
        "DATA_DIR": str(tmp_path / "data"),
        "PATH": "",
    }
    assert len(mistakes_of(environment)) == 5
    assert backup.main(["run"], environment) == backup.EXIT_CONFIGURATION == 78
    assert len(capsys.readouterr().err.splitlines()) == 5
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "environment",
    [
        environ(SOURCE_PATH=None, SOURCE_PATH_FILE="/nonexistent/path"),
        environ(TARGETS=None, TARGETS_FILE="/nonexistent/targets"),
        environ(RESTORE_SECRET_ACCESS_KEY="x", RESTORE_ACCESS_KEY_ID_FILE="/nonexistent/id"),
        environ(SOURCE_PATH="a b"),
        environ(TARGETS="{"),
        environ(TARGETS='{"first": "bucket"}'),
        with_target(path=7),
        with_target(endpoint="s3.example.com"),
        with_secret(borg_passphrase="x\0"),
        with_secret(borg_passphrase=7),
    ],
)
def test_what_is_wrong_is_not_told_once_more_as_missing(environment: dict[str, str]) -> None:
    assert len(mistakes_of(environment)) == 1


@pytest.mark.parametrize("left", [(), ("SOURCE_ENDPOINT", "SOURCE_PATH"), ("SOURCE_ACCESS_KEY_ID",)])
def test_what_needs_no_source_needs_no_settings_of_it(left: tuple[str, ...]) -> None:
    """Not even a whole one; what is given has to be right all the same."""
    environment = {
        name: value for name, value in environ().items() if not name.startswith("SOURCE_") or name in left
    }
    load_settings(environment, needs_source=False)
    assert len(mistakes_of(environment)) == 4 - len(left)
    with pytest.raises(backup.ConfigurationError, match="SOURCE_PATH"):
        load_settings({**environment, "SOURCE_PATH": "a b"}, needs_source=False)


def test_defaults() -> None:
    settings = load_settings(environ())
    target = settings.targets[0]
    assert (settings.label, settings.data_dir, settings.debug) == ("backup", Path("/data"), False)
    assert (target.encryption, target.must_match, target.compression) == (
        "repokey-blake2",
        False,
        "auto,zstd,22",
    )
    assert (target.prune, target.compact_percent, target.store.region) == ((), 10, None)
    assert [str(settings.mount_point(store)) for store in settings.stores] == [
        "/data/source",
        "/data/target-first",
    ]


@pytest.mark.parametrize(
    ("path", "bucket", "prefix"),
    [("b", "b", ""), ("b:", "b", ""), ("b:p", "b", "p"), ("b:/p/q/", "b", "p/q"), ("b:ü +%", "b", "ü +%")],
)
def test_paths(path: str, bucket: str, prefix: str) -> None:
    source = load_settings(environ(SOURCE_PATH=path)).source
    assert (source.bucket, source.prefix) == (bucket, prefix)


@pytest.mark.parametrize(("value", "percent"), [(True, 10), (False, None), (0, 0), (25, 25), (100, 100)])
def test_compact(value: object, percent: int | None) -> None:
    assert load_settings(with_target(compact=value)).targets[0].compact_percent == percent


def test_a_value_from_a_file_loses_its_line_end(tmp_path: Path) -> None:
    """Docker and Kubernetes secrets are files, and editors end them with a line end."""
    path = tmp_path / "secret"
    path.write_text(f"{SECRETS[0]}\n", encoding="utf-8")
    environment = environ(SOURCE_SECRET_ACCESS_KEY=None, SOURCE_SECRET_ACCESS_KEY_FILE=str(path))
    assert load_settings(environment).source.secret_access_key == SECRETS[0]


def test_a_traceback_shows_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever an exception that nobody foresaw quotes, and which is printed for each defect."""
    secrets = (*SECRETS, "AK1", "AK2", "https://hc-ping.com/uuid")
    console = backup.Console(False)
    configuration = backup.Configuration(environ(HEALTHCHECK_URL="https://hc-ping.com/uuid"))
    configuration.settings()
    console.secrets = configuration.secrets
    try:
        raise ValueError(f"Invalid header value {' '.join(secrets)!r} Credential=AK9/eu, Signature=abc123")
    except ValueError as error:
        console.defect("run", error)
    told = capsys.readouterr().err
    assert "Invalid header value" in told
    assert "Traceback" in told
    assert not [secret for secret in (*secrets, "AK9", "abc123") if secret in told]


def test_secrets_are_not_in_a_representation() -> None:
    """What a traceback or a debugger might print."""
    text = repr(load_settings(environ()))
    assert not [secret for secret in SECRETS if secret in text]


def test_mode_none_needs_no_passphrase() -> None:
    environment = {
        **with_secret(borg_passphrase=None),
        "TARGETS": json.dumps({"first": {**FIRST, "encryption": "none"}}),
    }
    assert mistakes_of(environment) == ()


def test_two_repositories_side_by_side_are_fine() -> None:
    assert mistakes_of(with_targets(a=f"{S3}|x:r", b=f"{S3}|x:rs", c="https://other.example.com|x:r")) == ()


def test_the_encryption_modes_are_borgs() -> None:
    assert sorted(backup.ENCRYPTION_MODES) == sorted(key_argument_names())


@pytest.mark.parametrize(
    "specification",
    [
        "none",
        "lz4",
        "zstd",
        "zstd,0",
        "zstd,1",
        "zstd,22",
        "zstd,23",
        "zstd,-1",
        "zstd,3,4",
        "zstd,1.5",
        "zlib",
        "zlib,0",
        "zlib,9",
        "zlib,10",
        "lzma",
        "lzma,9",
        "lzma,10",
        "auto",
        "auto,none",
        "auto,lz4",
        "auto,zstd,22",
        "auto,zstd,23",
        "auto,auto,lz4",
        "auto,obfuscate,1,lz4",
        "obfuscate,1,none",
        "obfuscate,6,none",
        "obfuscate,110,auto,zstd,3",
        "obfuscate,123,lz4",
        "obfuscate,250,zstd,3",
        "obfuscate,lz4",
        "obfuscate,1",
        "gzip",
        "ZSTD",
        "auto,zlib,x",
    ],
)
def test_compression_is_judged_as_borg_judges_it(specification: str) -> None:
    """`lz4,1`, where borg ignores the level, is the one thing that is refused here only."""
    try:
        CompressionSpec(specification).compressor  # noqa: B018
        accepted = True
    except (ValueError, Exception):  # argparse.ArgumentTypeError is no ValueError
        accepted = False
    with nullcontext() if accepted else pytest.raises(ArgumentTypeError, match=r"."):
        backup.TARGET["compression"](specification)


PRUNE_OPTIONS = [
    "--keep-daily=7 --keep-weekly=4 --keep-monthly=6",
    "--keep-daily 7",
    "-d7 -w 4 -m=6 -y 1 -H 3",
    "--keep-within=2d",
    "--keep-within 0d",
    "--keep-within=2",
    "--keep-last=3 --list --stats -v",
    "--keep-secondly=3",
    "--keep-minutely=-1",
    "--keep-13weekly=4",
    "--keep-3monthly=4",
    "--keep-daily=x",
    "--keep-daily",
    "--keep-fortnightly=2",
    "--keep-daily=7 --save-space --force -c 600",
]


@pytest.mark.parametrize("options", PRUNE_OPTIONS)
def test_prune_is_judged_as_borg_judges_it(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = options.replace("-m=6", "-m 6").split() if "-m=6" in options else options.split()
    try:
        Archiver().parse_args(["prune", *words, "/repository"])
        accepted = True
    except SystemExit:
        accepted = False
    capsys.readouterr()
    with nullcontext() if accepted else pytest.raises(ArgumentTypeError, match=r"."):
        backup.TARGET["prune"](" ".join(words))


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ("--keep-daily=0", "keeps nothing"),
        ("--list", "keeps nothing"),
        ("--keep-daily=7 --dry-run", "leave `prune` out"),
        ("--keep-daily=7 -n", "leave `prune` out"),
        ("--keep-daily=7 -a 'other-*'", "BACKUP_LABEL"),
        ("--keep-daily=7 --glob-archives=*", "BACKUP_LABEL"),
        ("--keep-daily=7 --prefix=x", "BACKUP_LABEL"),
        ("--keep-daily=7 other-repository", "BACKUP_LABEL"),
        ("--keep-daily='7", "write such as --keep-daily=7"),
        ("--keep-13weekly=1 --keep-3monthly=1", "exclude each other"),
    ],
)
def test_prune_options_that_borg_takes_but_nobody_means(options: str, remedy: str) -> None:
    mistakes = mistakes_of(with_target(prune=options))
    assert len(mistakes) == 1
    assert '"first"."prune"' in mistakes[0]
    assert remedy in mistakes[0]
