"""What happens to containers: stopped and killed, short of memory and rights, two at once."""

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from container_site import Container, Site
from docker_client import Docker
from helpers import Bucket, Repository, mounts_below, sample_objects, wait_until
from servers import SeaweedFS

OBJECTS = sample_objects(9, 40)
LARGE_BYTES = 40_000_000
SLOW = "lzma,9"  # half a minute for LARGE_BYTES, so that there is time to stop it
DOCKER_STOP_SECONDS = 10  # then it kills
MEGABYTE = 1_000_000


@dataclass
class Place:
    """A configured site, and the buckets behind it."""

    site: Site
    source: Bucket
    target: Bucket

    def configure(self, **fields: str | int) -> None:
        """Writes .env; `fields` are of the target."""
        target = {"path": self.target.name, "prune": "--keep-last=3", **fields}
        self.site.configure(self.source, {"first": target}, LEASE_TTL="10", LOG_LEVEL="debug")

    def slow(self) -> None:
        """Makes a run take long: an object in the source that takes long to archive."""
        self.source.put({"large": os.urandom(LARGE_BYTES)})
        self.configure(compression=SLOW)

    def quick(self) -> None:
        """The opposite."""
        self.source.delete("large")
        self.configure()

    def prove_intact(self, *options: str) -> None:
        """The next run succeeds unaided, and what it archived is what is in the source."""
        self.quick()
        self.site.run(*options).expect(0)
        folder = self.site.folder / f"proof-{time.monotonic_ns()}"
        repository = Repository.download(self.target, folder / "copy")
        repository.check()
        newest = repository.contents(repository.archives()[-1], Path("/data/source"), folder / "extracted")
        assert newest == self.source.contents()
        assert self.target.locks() == []


@pytest.fixture
def place(site: Site, source: Bucket, target: Bucket) -> Place:
    """A source with objects, and a target."""
    source.put(OBJECTS)
    made = Place(site, source, target)
    made.configure()
    return made


@pytest.fixture
def host_folder(place: Place) -> Iterator[Path]:
    """A folder of the host for /data, in which it sees what the container mounts.

    Only there can a container leave a mount behind: its own are gone with it.
    """
    folder = place.site.folder / "data"
    folder.mkdir()
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "--make-shared", folder], check=True)
    yield folder
    for mount_point in mounts_below(folder):
        subprocess.run(["umount", "--lazy", mount_point], check=False)


# ------------------------------------------------------------------------------------------------------- Ends


def stop(container: Container) -> float:
    """`docker stop` with its usual grace; how long it took."""
    start = time.monotonic()
    container.docker("stop", container.name)
    return time.monotonic() - start


def assert_stopped_cleanly(place: Place, container: Container, seconds: float, folder: Path) -> None:
    """In time, with 143, no lock in the bucket, no mount on the host."""
    container.wait().expect(128 + signal.SIGTERM)
    assert seconds < DOCKER_STOP_SECONDS, container.output
    assert place.target.locks() == []
    assert mounts_below(folder) == [folder]
    assert not any(line.startswith("Traceback") for line in container.output.splitlines()), container.output


def test_docker_stop_in_each_phase_of_a_first_run(place: Place, host_folder: Path) -> None:
    """The next run succeeds after each of them."""
    propagated = ("--volume", f"{host_folder}:/data:rshared")
    for phase in ("backup of", "[source] ", "a new repository is made", "borg init", "borg create"):
        place.target.clear()
        place.slow()
        container = place.site.start(*propagated)
        container.wait_for_line(phase)
        assert_stopped_cleanly(place, container, stop(container), host_folder)
    place.prove_intact(*propagated)
    assert mounts_below(host_folder) == [host_folder]


@pytest.mark.long
def test_docker_stop_in_each_phase_of_a_later_run(place: Place, host_folder: Path) -> None:
    """In the middle of a large object, while it prunes and compacts, and while it uploads."""
    propagated = ("--volume", f"{host_folder}:/data:rshared")
    place.site.run(*propagated).expect(0)
    place.slow()
    container = place.site.start(*propagated)
    container.wait_for_line("borg create")
    wait_until(place.target.locks, 30, "borg has its lock in the bucket")
    assert_stopped_cleanly(place, container, stop(container), host_folder)
    place.quick()
    for phase in ("borg prune", "borg compact", "compaction freed"):
        place.source.put({"changes": os.urandom(MEGABYTE)})
        container = place.site.start(*propagated)
        container.wait_for_line(phase)
        seconds = stop(container)
        if container.wait().exit_code:  # 0: it was at its end
            assert_stopped_cleanly(place, container, seconds, host_folder)
    place.prove_intact(*propagated)


def test_docker_stop_of_a_shell_unmounts_what_it_has_mounted(place: Place) -> None:
    """A shell that talks to a person ignores SIGTERM, so that Docker would kill it after its grace."""
    container = place.site.start("--interactive", "--tty", arguments=["ash"])
    docker = place.site.docker
    docker("exec", container.name, "backup.py", "mount", "target-first")
    docker("exec", container.name, "sh", "-c", "echo by hand >/data/target-first/file")
    assert stop(container) < DOCKER_STOP_SECONDS, container.output
    assert "[target-first] is unmounted, everything is uploaded" in container.output
    assert place.target.contents() == {"file": b"by hand\n"}, "and the lease is given back"


def test_after_docker_kill_the_next_run_needs_nobody(place: Place, host_folder: Path) -> None:
    """It removes the lock, takes over the lease, and unmounts what is dead."""
    propagated = ("--volume", f"{host_folder}:/data:rshared")
    place.site.run(*propagated).expect(0)
    place.slow()
    container = place.site.start(*propagated)
    wait_until(place.target.locks, 60, "borg has its lock in the bucket")
    container.docker("kill", container.name)
    container.wait().expect(128 + signal.SIGKILL)
    assert len(mounts_below(host_folder)) == 3, "two dead mounts"
    place.prove_intact(*propagated)
    assert mounts_below(host_folder) == [host_folder]


def test_two_containers_at_once_from_one_env_file(place: Place) -> None:
    """One works; the other says so and ends with 75. They have the same process ids and volumes."""
    place.site.run().expect(0)
    place.slow()
    container = place.site.start()
    wait_until(place.target.locks, 60, "the first one works")
    busy = place.site.run().expect(75)
    assert "another run works on this repository: a backup on " in busy.output
    assert container.is_running
    stop(container)
    place.prove_intact()


# ----------------------------------------------------------------------------------------------- Surroundings


class SeaweedFSContainer(SeaweedFS):
    """SeaweedFS in a container; a `with` block starts and removes that."""

    def __init__(self, docker: Docker, image: str, directory: Path) -> None:
        """`image` is any that runs a static program."""
        super().__init__(directory)
        self._docker, self._image = docker, image
        self.container = f"s3borgbackup-test-seaweedfs-{uuid.uuid4().hex[:8]}"

    def command(self) -> Sequence[str | Path]:
        program, *arguments = super().command()
        weed = subprocess.run(
            ["which", str(program)], capture_output=True, text=True, check=True
        ).stdout.strip()
        volumes = (
            "--volume",
            f"{os.path.realpath(weed)}:/weed:ro",
            "--volume",
            f"{self.directory}:{self.directory}",
        )
        settings = [word for pair in super().environment().items() for word in ("--env", "=".join(pair))]
        named = ("--name", self.container, "--network", "host", "--workdir", self.directory)
        return (
            "docker",
            "run",
            *named,
            *volumes,
            *settings,
            "--entrypoint",
            "/weed",
            self._image,
            *arguments,
        )

    def environment(self) -> dict[str, str]:
        return dict(self._docker.environment)

    def stop(self) -> None:
        if self.process:
            self._docker.succeeds("rm", "--force", self.container)
        super().stop()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_s3_server_is_restarted_in_mid_run(docker: Docker, image: str, tmp_path: Path) -> None:
    """The run waits for it and ends well."""
    with SeaweedFSContainer(docker, image, tmp_path / "seaweedfs") as server:
        source, target = (Bucket(server, name).create() for name in ("source", "target"))
        source.put({**OBJECTS, "large": os.urandom(LARGE_BYTES // 4)})
        with Site.opened(docker, image, server, tmp_path / "person") as site:
            place = Place(site, source, target)
            place.configure(compression=SLOW)
            container = site.start()
            wait_until(target.locks, 60, "borg works")
            docker("restart", "--time", "0", server.container)
            container.wait(400).expect(0)  # on a busy machine SeaweedFS takes long to be whole again
            wait_until(server.answers, 30, "the server is back")
            place.prove_intact()


@pytest.mark.long
def test_256_mb_are_enough_for_a_source_that_is_far_larger(place: Place) -> None:
    """One object and all together are larger than the memory, and so is what is pruned and compacted."""
    place.configure(prune="--keep-last=1", compact=0)
    place.source.put({"large": os.urandom(300 * MEGABYTE)})
    for _ in range(2):
        place.source.put({f"folder/{number}": os.urandom(2 * MEGABYTE) for number in range(60)})
        container = place.site.start("--memory", "256m", "--memory-swap", "256m")
        container.wait(240).expect(0)
        assert container.inspect("{{.State.OOMKilled}}") == "false"
    assert sum(place.target.sizes().values()) < 430 * MEGABYTE, "what was pruned is gone"


def test_too_little_memory_is_told(place: Place) -> None:
    output = place.site.run("--memory", "200m").expect(2).output
    assert (
        "there are only 209 MB of memory. Give the container 256 MB or more (docker run --memory)" in output
    )


@pytest.mark.parametrize(
    ("left_out", "reason"),
    [
        ("--device /dev/fuse:/dev/fuse", "/dev/fuse is missing"),
        ("--cap-add SYS_ADMIN", "not permitted"),
    ],
)
def test_a_missing_right_is_named_with_the_flag_that_gives_it(
    place: Place, left_out: str, reason: str
) -> None:
    output = place.site.run_without(left_out).expect(2).output
    assert "cannot be mounted" in output
    assert reason in output
    assert left_out in output


def test_without_a_network_the_endpoint_is_named(place: Place) -> None:
    start = time.monotonic()
    output = place.site.run("--network", "none").expect(2).output
    assert time.monotonic() - start < 30
    assert f"source ({place.source.name} at {place.site.server.endpoint}): NoAnswer" in output
    assert "Check SOURCE_ENDPOINT and the network" in output


@pytest.mark.parametrize("path", ["/cache", "/config", "/data"])
def test_a_volume_that_is_read_only_is_told(place: Place, path: str) -> None:
    usual = "-v s3borgbackup-cache:/cache -v s3borgbackup-config:/config"
    read_only = f"{place.site.folder}/bin:{path}:ro"
    output = place.site.run_without(usual, "--volume", read_only).expect(2).output
    assert path in output
    assert "Read-only file system" in output


CLOCK = Path(__file__).with_name("clock.c")


@pytest.fixture
def wrong_clock(tmp_path: Path) -> Path:
    """A library that puts the clock of whatever loads it an hour ahead; it needs no C library of its own."""
    library = tmp_path / "clock.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-nostdlib", "-O2", "-o", library, CLOCK], check=True)
    return library


def test_a_wrong_clock_is_named(place: Place, wrong_clock: Path) -> None:
    """The container has its machine's, so that here the program is shown another one."""
    loaded = ("--volume", f"{wrong_clock}:/clock.so:ro", "--env", "LD_PRELOAD=/clock.so")
    output = place.site.run(*loaded).expect(2).output
    assert "RequestTimeTooSkewed" in output
    assert "The clock of this machine is wrong: set it." in output
