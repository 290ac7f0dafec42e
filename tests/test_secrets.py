"""Secrets reach only who needs them: no command line, no output, no child that could do without."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from helpers import (
    PASSPHRASE,
    POLL_SECONDS,
    Backup,
    Bucket,
    command_line,
    descendants,
    environment_of,
    run_backup,
    sample_objects,
    settings,
    with_target,
    with_target_secrets,
)
from servers import READER, WRITER, Identity, SeaweedFS

pytestmark = pytest.mark.usefixtures("needs_fuse")

SECOND_PASSPHRASE = "another pass:phrase, with \"quotes\" and 'ticks'"
PASSPHRASES = (PASSPHRASE, SECOND_PASSPHRASE)
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@pytest.fixture(scope="module")
def second_writer(server: SeaweedFS) -> Identity:
    """Who writes to the second target, so that the two targets' keys can be told apart."""
    return server.add_identity(Identity("second-writer-key", "second-writer-secret-77d2", WRITER.actions))


Sample = tuple[str, Mapping[str, str]]


def watch(backup: Backup, seen: dict[int, Sample]) -> None:
    """Notes command line and environment of every descendant until backup.py has ended.

    What is noted for a process is the last that was seen: just after the fork it is still a copy of us.
    """
    while backup.process.poll() is None:
        for pid in descendants(backup.pid):
            line = command_line(pid)
            if line and str(backup.process.args[1]) not in line:
                seen[pid] = (line, environment_of(pid))
        time.sleep(POLL_SECONDS / 4)


def two_targets(
    server: SeaweedFS, new_bucket: Callable[..., Bucket], folder: Path, second_writer: Identity
) -> dict[str, str]:
    """A configuration whose three stores have different keys, and whose two repositories have passphrases."""
    source = new_bucket("source")
    source.put(sample_objects(2, 40))
    environment = settings(
        server,
        folder,
        source.name,
        {name: {"path": new_bucket(name).name, "prune": "--keep-last=1"} for name in ("first", "second")},
        LOG_LEVEL="debug",
    )
    return with_target_secrets(
        environment,
        "second",
        access_key_id=second_writer.access_key_id,
        secret_access_key=second_writer.secret_access_key,
        borg_passphrase=SECOND_PASSPHRASE,
    )


def secrets_of(*identities: Identity) -> set[str]:
    """What must not be seen of these."""
    return {identity.secret_access_key for identity in identities}


def test_each_process_of_a_run_sees_the_secrets_that_it_needs_and_no_others(
    server: SeaweedFS, new_bucket: Callable[..., Bucket], tmp_path: Path, second_writer: Identity
) -> None:
    """No secret in any command line; tigrisfs sees its own store's keys only, borg none and no passphrase.

    Only the source is mounted read-only, whatever its key may do. Nothing secret is printed either, even
    where LOG_LEVEL=debug prints most.
    """
    environment = two_targets(server, new_bucket, tmp_path, second_writer)
    seen: dict[int, Sample] = {}
    with Backup(environment) as backup:
        watch(backup, seen)
        result = backup.wait().expect(0)

    all_secrets = {*secrets_of(READER, WRITER, second_writer), *PASSPHRASES}
    own_keys = {"source": READER, "target-first": WRITER, "target-second": second_writer}
    mounts = {
        Path(line.split()[-1]).name: variables
        for line, variables in seen.values()
        if line.startswith("tigrisfs ")
    }
    borgs = {line: variables for line, variables in seen.values() if " --log-json " in line}
    assert mounts.keys() == own_keys.keys()
    read_only = {line.split()[-1] for line, _ in seen.values() if " -o ro " in line}
    assert read_only == {f"{environment['DATA_DIR']}/source"}
    for command in (" init ", " create ", " prune ", " compact "):
        assert any(command in line for line in borgs), f"no borg{command}was seen"

    for line, _ in seen.values():
        assert not [secret for secret in all_secrets if secret in line], line
    for name, variables in mounts.items():
        keys = own_keys[name]
        assert tuple(variables[name] for name in CREDENTIALS) == (keys.access_key_id, keys.secret_access_key)
        assert_none_of(all_secrets - {keys.secret_access_key}, variables)
    for variables in borgs.values():
        assert_none_of(all_secrets, variables)
        assert not [name for name in variables if name.startswith(("AWS_", "SOURCE_", "TARGET"))]
        assert "BORG_PASSPHRASE" not in variables
    assert not [secret for secret in all_secrets if secret in result.output]


def assert_none_of(secrets: set[str], variables: Mapping[str, str]) -> None:
    """No variable holds one of the secrets."""
    found = {name for name, value in variables.items() for secret in secrets if secret in value}
    assert not found, f"secrets in {found}"


@pytest.mark.long
def test_nothing_secret_is_printed_when_things_go_wrong(
    server: SeaweedFS, new_bucket: Callable[..., Bucket], tmp_path: Path, second_writer: Identity
) -> None:
    """Refused keys, a wrong passphrase, and a configuration with mistakes: the errors quote no secret."""
    environment = two_targets(server, new_bucket, tmp_path, second_writer)
    run_backup(environment, "run", "first").expect(0)
    wrong = with_target_secrets(environment, "first", borg_passphrase="the-wrong-passphrase")
    wrong = with_target_secrets(wrong, "second", secret_access_key="the-wrong-secret")
    broken_json = {**environment, "TARGET_SECRETS": environment["TARGET_SECRETS"][:-1]}
    outputs = [
        run_backup(wrong).expect(2).output,
        run_backup(with_target(environment, "first", endpoint="nonsense")).expect(78).output,
        run_backup(broken_json).expect(78).output,
        run_backup({**environment, "SOURCE_SECRET_ACCESS_KEY": "the-wrong-secret"}).expect(2).output,
    ]
    all_secrets = {
        *secrets_of(READER, WRITER, second_writer),
        *PASSPHRASES,
        "the-wrong-passphrase",
        "the-wrong-secret",
    }
    for output in outputs:
        assert not [secret for secret in all_secrets if secret in output], output
