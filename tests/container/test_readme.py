"""What the README tells a person to type, typed."""

import json
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

import backup
from benchmark_contenders import count_traffic
from container_site import PROMPT, Site, Terminal
from docker_client import BaseImages, Docker
from helpers import PASSPHRASE, Bucket, Repository, Result, sample_objects, tree, wait_until
from readme import README, TOP, code_block, code_blocks, shell_line, table
from servers import WRITER, SeaweedFS
from test_exact import KEPT_BY_SEAWEEDFS, every_thing, prove_that_it_comes_back

PHOTOS = sample_objects(5, 40, prefix="photos/")
OBJECTS = {**sample_objects(6, 60), **PHOTOS}
SAMPLE_ARCHIVE = "my-bucket-2025-01-31T03:00:00"
# What people of S3BorgBackup have in their crontabs.
OLD_COMMAND = (
    "docker run --rm --env-file .env --device /dev/fuse:/dev/fuse --cap-add SYS_ADMIN"
    " --security-opt apparmor:unconfined s3borgbackup"
)


@dataclass(frozen=True)
class Place:
    """A configured site, and the buckets behind it."""

    site: Site
    source: Bucket
    first: Bucket
    second: Bucket

    def newest(self, folder: Path) -> dict[str, bytes]:
        """The objects in the first target's newest archive."""
        repository = Repository.download(self.first, folder / "copy")
        repository.check()
        return repository.contents(repository.archives()[-1], Path("/data/source"), folder / "extracted")


@pytest.fixture
def place(site: Site, source: Bucket, new_bucket: Callable[..., Bucket]) -> Place:
    """A source with objects, and two targets: a bucket and a prefix."""
    source.put(OBJECTS)
    found = Place(site, source, new_bucket("first"), new_bucket("second"))
    configure(found)
    return found


def configure(place: Place, **more: str) -> None:
    """Fills in .env."""
    targets = {
        "first": {"path": place.first.name, "prune": "--keep-daily=7"},
        "second": {"path": f"{place.second.name}:borg/my-bucket", "encryption": "repokey"},
    }
    place.site.configure(place.source, targets, BACKUP_LABEL="my-bucket", **more)


# ---------------------------------------------------------------------------------------------- One-shot runs


def test_the_quick_start_checks_and_backs_up_to_two_buckets(place: Place, tmp_path: Path) -> None:
    check = shell_line("Quick start", "docker run --rm --env-file")
    assert check.endswith("check-config")
    output = place.site.shell(check).expect(0).output
    assert (output.count("reach "), output.count("ok, holds "), "failed" in output) == (3, 2, False)
    result = place.site.shell(shell_line("Quick start", "s3bb run")).expect(0)
    assert result.output.count("everything is uploaded") == 2
    assert place.newest(tmp_path) == OBJECTS
    assert place.site.run(arguments=["run", "second"]).expect(0).output.count("everything is uploaded") == 1


def test_the_command_of_s3borgbackup_works_as_it_is(place: Place) -> None:
    """Without volumes, and again in a new container."""
    for _ in range(2):
        assert place.site.shell(OLD_COMMAND).expect(0).output.count("everything is uploaded") == 2


@pytest.fixture
def counting_server(tmp_path: Path) -> Iterator[SeaweedFS]:
    """A server of the test's own that counts requests."""
    with SeaweedFS(tmp_path / "seaweedfs", has_metrics=True) as running:
        yield running


def test_with_the_cache_volume_the_second_run_reads_nothing_again(
    docker: Docker, image: str, counting_server: SeaweedFS, tmp_path: Path
) -> None:
    source, target = (Bucket(counting_server, name).create() for name in ("source", "target"))
    source.put(OBJECTS)
    written = time.monotonic()
    wait_until(
        lambda: time.monotonic() - written > backup.RACE_SECONDS + 1, 10, "they are not the newest any more"
    )

    def objects_read(site: Site) -> int:
        """By one run; the preflight's first byte is one."""
        before = count_traffic(counting_server.metrics())
        site.run().expect(0)
        return (count_traffic(counting_server.metrics()) - before)[source.name, "GET"]

    with Site.opened(docker, image, counting_server, tmp_path / "person") as site:
        site.configure(source, {"first": target.name})
        assert objects_read(site) >= len(OBJECTS) - 1, "the empty object need not be read"
        assert objects_read(site) <= 3
        site.docker("volume", "rm", f"{site.name}-cache")
        assert objects_read(site) >= len(OBJECTS) - 1


# Docker takes each as it stands.
AWKWARD_PREFIX = 'a b/#hash/$HOME and ${X}/it\'s "quoted"/Straße 日本'
AWKWARD_PASSPHRASE = "  '$PATH' #\"1\" %s \\n ä€ `id` "


@pytest.mark.parametrize("way", ["docker", "compose"])
def test_awkward_values_arrive_as_they_stand(place: Place, tmp_path: Path, way: str) -> None:
    """Blanks, `#`, `$`, quotes, backslashes and other than ASCII, by docker run and by Compose."""
    place.source.put({f"{AWKWARD_PREFIX}/object": b"content"})
    configure(place, SOURCE_PATH=f"{place.source.name}:{AWKWARD_PREFIX}")
    fields = {
        "endpoint": place.site.server.endpoint,
        "path": f"{place.first.name}:{AWKWARD_PREFIX}",
        "compression": "lz4",
    }
    place.site.edit({"TARGETS": json.dumps({"first": fields}, ensure_ascii=False)})
    secrets = {
        "access_key_id": WRITER.access_key_id,
        "secret_access_key": WRITER.secret_access_key,
        "borg_passphrase": AWKWARD_PASSPHRASE,
    }
    place.site.edit({"TARGET_SECRETS": json.dumps({"first": secrets}, ensure_ascii=False)})
    run = place.site.run if way == "docker" else composed(place.site)
    run().expect(0)
    repository = Repository.download(
        place.first, tmp_path / "copy", prefix=AWKWARD_PREFIX, passphrase=AWKWARD_PASSPHRASE
    )
    assert repository.contents(repository.archives()[0], Path("/data/source"), tmp_path / "extracted") == {
        "object": b"content"
    }


def composed(site: Site) -> Callable[[], Result]:
    """Writes compose.yaml as the README has it; returns what runs the README's command for it."""
    document = code_block("Docker Compose", "yaml").replace("s3borgbackup", site.name)
    (site.folder / "compose.yaml").write_text(document)
    # The S3 server of the tests is on the loopback.
    service = yaml.safe_load(document)["services"]
    override = {"services": {name: {"network_mode": "host"} for name in service}}
    (site.folder / "compose.override.yaml").write_text(yaml.safe_dump(override))
    command = re.search(r"`(docker compose run [^`]+)` makes a backup", README)
    assert command
    return lambda: site.shell(f"{command[1]}; code=$?; docker compose down; exit $code")


@pytest.mark.long
def test_compose_makes_a_backup_and_keeps_the_volumes(place: Place, tmp_path: Path) -> None:
    run = composed(place.site)
    run().expect(0)
    assert place.newest(tmp_path) == OBJECTS
    volumes = place.site.docker("volume", "ls", "--quiet", "--filter", f"name={place.site.name}").split()
    assert sorted(volumes) == [f"{place.site.name}-cache", f"{place.site.name}-config"]
    # They are those of `docker run`: nothing has to be made anew.
    assert "cache of this repository is not there" not in place.site.run().expect(0).output


# ---------------------------------------------------------------------------------------------------- By hand

SHELL = "s3bb ash"
assert f"`{SHELL}` gives a shell" in README
# Into the bucket, without `restore`: paths in the archive begin with data/source.
INTO_THE_BUCKET = f"""\
backup.py mount target-first
backup.py mount source --read-write
cd /
borg extract --list /data/target-first::{SAMPLE_ARCHIVE} data/source/photos
backup.py umount source
backup.py umount target-first
"""


def commands(block: str) -> list[str]:
    """The lines of a code block without the comments behind them."""
    return [re.sub(r"\s+# .*", "", line) for line in block.splitlines()]


def type_all(terminal: Terminal, block: str, **replaced: str) -> dict[str, str]:
    """Types a block line by line; what each line printed. The passphrase is typed where it is read."""
    outputs = {}
    for line in commands(block):
        typed = line
        for old, new in replaced.items():
            typed = typed.replace(old, new)
        outputs[line] = terminal.type(typed, [PASSPHRASE] if line.startswith("read -rs") else [])
    return outputs


def test_a_person_backs_up_mounts_checks_lists_and_extracts_in_a_shell(place: Place) -> None:
    block = code_block("Manual mode", "shell", "read -rs")
    with place.site.terminal(SHELL) as terminal:
        assert "everything is uploaded" in terminal.type("backup.py")
        terminal.type("backup.py check-config")
        terminal.type("backup.py mount source")
        assert "plain.txt" in terminal.type("ls /data/source")
        terminal.type("backup.py umount source")
        archive = Repository.download(place.first, place.site.folder / "copy").archives()[0]
        outputs = type_all(terminal, block, **{SAMPLE_ARCHIVE: archive})
        terminal.type("ls /data")
    assert "my-bucket-" in outputs["borg list /data/target-first"]
    assert "no problems found" in outputs["borg check -v /data/target-first"]
    assert "everything is uploaded" in outputs["backup.py umount target-first"]
    assert tree(place.site.folder / "restored/data/source") == PHOTOS
    assert place.first.locks() == []


def test_the_shell_is_a_whole_one_and_what_is_left_mounted_is_unmounted(place: Place) -> None:
    """Below PID 1 it must still be the terminal's: for Ctrl-C, Ctrl-Z and `fg`."""
    place.site.run(arguments=["run", "first"]).expect(0)
    with place.site.terminal(SHELL) as terminal:
        # It says when it has been continued, and so is in the foreground: before that Ctrl-C is the shell's.
        job = "trap 'echo it goes on' CONT; echo it runs; while :; do sleep 1; done"
        terminal.child.sendline(f'sh -c "{job}"')
        terminal.child.expect(r"it runs\r\n")
        terminal.child.sendcontrol("z")
        terminal.child.expect("Stopped")
        terminal.child.expect(PROMPT)
        terminal.child.sendline("fg")
        terminal.child.expect(r"it goes on\r\n")
        terminal.child.sendcontrol("c")
        terminal.child.expect(PROMPT)
        assert "130" in terminal.type("echo $?")
        terminal.type("yes | head -n 1")
        terminal.type("backup.py mount target-first")
        terminal.type("echo by hand > target-first/file")
    assert "[target-first] is unmounted, everything is uploaded" in terminal.child.before
    assert place.first.get("file") == b"by hand\n"
    assert ".s3borgbackup-lease" not in place.first.sizes()


def test_borgs_own_commands_work_with_borgs_own_names(place: Place) -> None:
    for content in (b"1", b"2"):
        place.source.put({"photos/changed": content})
        place.site.run(arguments=["run", "first"]).expect(0)
    older, newer = Repository.download(place.first, place.site.folder / "copy").archives()
    names = {"my-bucket-2025-01-30T03:00:00": older, SAMPLE_ARCHIVE: newer}
    outputs = {}
    for line in code_block("Commands", "shell", "s3bb borg").splitlines():
        typed = re.sub("|".join(names), lambda found: names[found[0]], line)
        outputs[line.split()[3]] = place.site.shell(typed).expect(0).output
    assert outputs.keys() == {"list", "diff", "delete"}
    assert "data/source/photos/changed" in outputs["list"]
    listed = [line for line in outputs["list"].splitlines() if "data/source/" in line]
    assert all("data/source/photos/" in line for line in listed)
    assert "data/source/photos/changed" in outputs["diff"]
    assert Repository.download(place.first, place.site.folder / "after").archives() == [newer]


def test_a_good_backup_passes_every_check(place: Place) -> None:
    place.site.run(arguments=["run", "first"]).expect(0)
    commands = [row[0].strip("`") for row in table("Is this backup good?", "command")]
    assert {command.split()[1] for command in commands} == {"check", "verify"}
    for command in commands:
        place.site.shell(command).expect(0)


def test_a_key_is_exported_and_imported_again(place: Place) -> None:
    """Only the key goes to standard output; runs ask for the export until then."""
    assert "its key was never exported" in place.site.run(arguments=["run", "first"]).expect(0).output
    export, put_back = code_block("Keys and passphrases", "shell").splitlines()
    place.site.shell(export).expect(0)
    key = (place.site.folder / "first.key").read_text()
    assert key.startswith("BORG_KEY ")
    assert "never exported" not in place.site.run(arguments=["run", "first"]).expect(0).output
    place.site.shell(put_back).expect(0)
    assert "my-bucket-" in place.site.run(arguments=["list", "first"]).expect(0).output


def test_an_exported_key_opens_a_repository_whose_config_volume_is_lost(place: Place) -> None:
    target = {"path": place.first.name, "encryption": "keyfile-blake2"}
    place.site.configure(place.source, {"first": target}, BACKUP_LABEL="my-bucket")
    place.site.run().expect(0)
    export, put_back = code_block("Keys and passphrases", "shell").splitlines()
    place.site.shell(export).expect(0)
    place.site.docker("volume", "rm", f"{place.site.name}-config")
    assert "mount the volume" in place.site.run(arguments=["list"]).expect(2).output
    place.site.shell(put_back).expect(0)
    assert "my-bucket-" in place.site.run(arguments=["list"]).expect(0).output


def test_an_archive_or_a_part_of_it_is_restored_with_one_command(
    place: Place, new_bucket: Callable[..., Bucket]
) -> None:
    keys = {"ACCESS_KEY_ID": WRITER.access_key_id, "SECRET_ACCESS_KEY": WRITER.secret_access_key}
    configure(place, **{f"RESTORE_{name}": value for name, value in keys.items()})
    one = {"2025/a.txt": b"one"}
    place.source.put(one)
    place.site.run(arguments=["run", "first"]).expect(0)
    to_folder, to_bucket = code_block("Restoring", "shell", "photos").splitlines()
    place.site.shell(to_folder).expect(0)
    assert tree(place.site.folder / "restored") == {**OBJECTS, **one}
    rescued = new_bucket("rescued")
    place.site.shell(to_bucket.replace("my-bucket:", f"{rescued.name}:")).expect(0)
    assert rescued.contents() == {f"rescued/{key}": body for key, body in {**PHOTOS, **one}.items()}


def test_a_folder_is_restored_into_the_bucket(place: Place) -> None:
    """To where it was; what came later stays."""
    place.site.run(arguments=["run", "first"]).expect(0)
    archive = Repository.download(place.first, place.site.folder / "copy").archives()[0]
    later = {"later/than that": b"stays"}
    place.source.clear()
    place.source.put(later)
    keys = {"ACCESS_KEY_ID": WRITER.access_key_id, "SECRET_ACCESS_KEY": WRITER.secret_access_key}
    place.site.edit({f"SOURCE_{name}": value for name, value in keys.items()})
    with place.site.terminal(SHELL) as terminal:
        terminal.type(f"export BORG_PASSPHRASE={shlex.quote(PASSPHRASE)}")
        type_all(terminal, INTO_THE_BUCKET, **{SAMPLE_ARCHIVE: archive})
    assert place.source.contents() == {**PHOTOS, **later}


def test_the_bucket_comes_back_with_every_key_header_and_tag(
    place: Place, new_bucket: Callable[..., Bucket]
) -> None:
    keys = {"ACCESS_KEY_ID": WRITER.access_key_id, "SECRET_ACCESS_KEY": WRITER.secret_access_key}
    destination = {f"RESTORE_{name}": value for name, value in keys.items()}
    place.source.clear()
    place.site.configure(place.source, {"first": place.first.name}, **destination)

    def run(*arguments: str) -> Result:
        return place.site.run(arguments=arguments)

    things = every_thing(KEPT_BY_SEAWEEDFS, {})
    prove_that_it_comes_back(run, place.source, new_bucket("restored"), things)


# ---------------------------------------------------------------------------------------------- The worst day


def test_the_disaster_drill_step_by_step(
    place: Place,
    docker: Docker,
    bases: BaseImages,
    image: str,
    new_bucket: Callable[..., Bucket],
    tmp_path: Path,
) -> None:
    """A new machine with nothing but .env; the source is gone. The blocks run as they stand, in one shell."""
    place.site.run(arguments=["run", "first"]).expect(0)
    place.source.clear()
    rescued = new_bucket("source-rescued")
    arguments = bases.build_arguments
    with Site.opened(docker, image, place.site.server, tmp_path / "new machine", arguments) as site:
        for name in ("Dockerfile", ".dockerignore", "backup.py"):
            shutil.copy(TOP / name, site.folder)
        shutil.copy(place.site.folder / ".env", site.folder)
        site.edit(
            {
                "RESTORE_ENDPOINT": place.site.server.endpoint,
                "RESTORE_ACCESS_KEY_ID": WRITER.access_key_id,
                "RESTORE_SECRET_ACCESS_KEY": WRITER.secret_access_key,
            }
        )
        script = "\n".join(["set -e -o pipefail", *code_blocks("Disaster drill", "shell")])
        result = site.shell(script.replace("--to-bucket rescued", f"--to-bucket {rescued.name}"), 280).expect(
            0
        )
        assert rescued.contents() == OBJECTS, result.output
        assert tree(site.folder / "restored") == OBJECTS
        site.edit({"SOURCE_PATH": rescued.name})
        assert site.run(arguments=["run", "first"]).expect(0)


# ---------------------------------------------------------------------------------------------- Little things


def test_other_programs_and_the_help_need_no_configuration(site: Site) -> None:
    assert "check-config" in site.shell("docker run --rm s3borgbackup --help").expect(0).output
    assert site.shell("docker run --rm s3borgbackup borg --version").expect(0).output.startswith("borg 1.")
    assert site.shell("docker run --rm s3borgbackup ash -c 'exit 7'").expect(7).output == ""


def test_without_a_configuration_all_that_is_missing_is_named(site: Site) -> None:
    output = site.shell("docker run --rm s3borgbackup").expect(78).output
    for name in ("SOURCE_ENDPOINT", "SOURCE_PATH", "TARGETS", "TARGET_SECRETS"):
        assert f"{name}: is missing" in output
