"""What the README has below "Scheduling" works as it stands, as far as that can be seen without a cluster."""

import configparser
import copy
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

import backup
from helpers import (
    skip_or_fail,
    wait_until,
)
from readme import ONE_SHOT, README, S3BB, TOP, code_block, code_blocks
from test_example import accepted, docker_env_file, with_shards

DOCKERFILE = (TOP / "Dockerfile").read_text(encoding="utf-8")
SCRIPT = "/usr/local/bin/s3-backup"
LARGE = "Kubernetes: a bucket that is too large for one machine"
STOP_SECONDS = 900  # what the Quick start grants after a stop signal


def shellcheck(script: str, shell: str) -> None:
    """Fail with what ShellCheck says, if anything."""
    done = subprocess.run(
        ["shellcheck", "--shell", shell, "-"], input=script, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def executable(path: Path, text: str) -> Path:
    """Write a script that can be run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


def replaced(text: str, replacements: Mapping[str, Path | str]) -> str:
    """`text` with other paths; each one to be replaced must be there."""
    for old in replacements:
        assert old in text
    # In one go: a new path may hold an old one.
    return re.sub("|".join(map(re.escape, replacements)), lambda found: str(replacements[found[0]]), text)


CRON_RANGES = (range(60), range(24), range(1, 32), range(1, 13), range(8))


def check_schedule(schedule: str) -> None:
    """Fail unless it is a crontab's five fields of numbers, ranges or `*`, all in their bounds."""
    fields = schedule.split()
    assert len(fields) == len(CRON_RANGES), schedule
    for value, allowed in zip(fields, CRON_RANGES, strict=True):
        for part in value.split(","):
            assert re.fullmatch(r"(\*|\d+(-\d+)?)(/\d+)?", part), schedule
            numbers = [int(number) for number in re.findall(r"\d+", part.partition("/")[0])]
            assert [number for number in numbers if number not in allowed] == [], schedule


# ------------------------------------------------------------------------------------------------------- cron


def docker_run(block: str) -> list[str]:
    """The words of the `docker run` command in a shell block, without an `exec` before it."""
    lines = block.replace("\\\n", " ").splitlines()
    (command,) = [words for line in lines if "docker" in (words := shlex.split(line, comments=True))]
    return command[command.index("docker") :]


def test_the_script_is_clean_shell_and_runs_the_quick_starts_command() -> None:
    """But for the folder that `restore` writes to."""
    script = code_block("cron", "sh")
    shellcheck(script, "sh")
    quick_start = docker_run(ONE_SHOT)
    folder = quick_start.index("$PWD/restored:/restored")
    assert docker_run(script) == [*quick_start[: folder - 1], *quick_start[folder + 1 :]]
    assert quick_start[quick_start.index("--stop-timeout") + 1] == str(STOP_SECONDS)


DOCKER = """\
#!/bin/sh
printf '%s\\n' "$@"
"""


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_the_function_passes_its_arguments_on_and_asks_for_no_terminal_where_there_is_none(
    tmp_path: Path, shell: str
) -> None:
    executable(tmp_path / "bin" / "docker", DOCKER)
    folder = tmp_path / "a folder"
    folder.mkdir()
    done = subprocess.run(
        [shell, "-euc", f"{S3BB}s3bb restore first 'two words' --to /restored | cat"],
        cwd=folder,
        env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.splitlines()
    assert words[:4] == ["run", "--rm", "-i", "--env-file"]
    assert f"{folder}/restored:/restored" in words
    assert words[words.index("s3borgbackup") :] == [
        "s3borgbackup", "restore", "first", "two words", "--to", "/restored",
    ]  # fmt: skip


def crontab() -> tuple[str, str]:
    """Schedule and command of the crontab's only line."""
    (line,) = code_block("cron", "crontab").splitlines()
    found = re.fullmatch(r"((?:\S+ ){5})(.*)", line)
    assert found
    return found[1], found[2]


def test_the_crontab_is_valid() -> None:
    schedule, command = crontab()
    check_schedule(schedule)
    assert "%" not in command, "cron takes it for a line end"
    shellcheck(f"{command}\n", "sh")


@dataclass
class CronJob:
    """The crontab's command, with a script of ours in the place of the backup."""

    folder: Path
    script: str

    def __post_init__(self) -> None:
        """Write the script."""
        self.starts = self.folder / "starts"
        executable(self.folder / "s3-backup", f"#!/bin/sh\necho >>{self.starts}\n{self.script}\n")

    def start(self) -> subprocess.Popen[str]:
        """Run the line, as cron does."""
        command = replaced(
            crontab()[1],
            {
                "/run/lock/s3-backup": self.folder / "lock",
                SCRIPT: self.folder / "s3-backup",
                "/var/log/s3-backup.log": self.folder / "log",
            },
        )
        return subprocess.Popen(
            ["/bin/sh", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    @property
    def count(self) -> int:
        """How often the script was started."""
        return len(self.starts.read_text().splitlines()) if self.starts.exists() else 0


def test_a_cron_job_that_still_runs_is_not_started_again(tmp_path: Path) -> None:
    go_on = tmp_path / "go-on"
    job = CronJob(tmp_path, f"while ! [ -e {go_on} ]; do sleep 0.05; done")
    first = job.start()
    wait_until(lambda: job.count, 10, "the first run is at work")
    assert job.start().communicate(timeout=10)[0].startswith("s3-backup ended with 75: ")
    assert job.count == 1
    go_on.touch()
    assert first.communicate(timeout=10)[0] == ""
    assert job.start().communicate(timeout=10)[0] == ""
    assert job.count == 2


def test_cron_mails_the_exit_code_and_logs_the_output(tmp_path: Path) -> None:
    job = CronJob(tmp_path, "echo something failed >&2; exit 2")
    assert job.start().communicate(timeout=10)[0] == f"s3-backup ended with 2: see {tmp_path / 'log'}\n"
    assert (tmp_path / "log").read_text() == "something failed\n"


# ---------------------------------------------------------------------------------------------------- systemd


def units() -> dict[str, str]:
    """The README's systemd units by their file names, which stand before each."""
    names = re.findall(r"`/etc/systemd/system/([^`]+)`:\n", README)
    return dict(zip(names, code_blocks("systemd", "ini"), strict=True))


def unit(suffix: str) -> configparser.ConfigParser:
    """The settings of the service or the timer."""
    (text,) = [text for name, text in units().items() if name.endswith(suffix)]
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # systemd's keys have capitals
    parser.read_string(text)
    return parser


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        skip_or_fail("systemd-analyze is not on the PATH")
    script = executable(tmp_path / "s3-backup", "#!/bin/sh\n")
    for name, text in units().items():
        (tmp_path / name).write_text(text.replace(SCRIPT, str(script)))
    # Docker need not be installed here. systemd looks for other units beside those that it verifies.
    (tmp_path / "docker.service").write_text("[Service]\nExecStart=/bin/true\n")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(tmp_path / name for name in units())],
        capture_output=True,
        text=True,
        check=False,
    )
    # What it does not know it ignores, with a message.
    assert (done.returncode, done.stderr) == (0, "")


def test_the_service_runs_the_script_for_as_long_as_it_takes() -> None:
    service = unit(".service")["Service"]
    assert (service["Type"], service["ExecStart"]) == ("oneshot", SCRIPT)
    assert service["TimeoutStartSec"] == "infinity"
    assert service["TimeoutStopSec"] == f"{STOP_SECONDS // 60}min"
    assert service["SuccessExitStatus"] == str(backup.EXIT_BUSY)


def test_the_timer_belongs_to_the_service_and_makes_up_for_what_it_missed() -> None:
    timer = unit(".timer")
    assert "Unit" not in timer["Timer"]  # so it starts the service of its own name
    assert [Path(name).stem for name in units()] == ["s3borgbackup"] * 2
    assert timer["Timer"]["Persistent"] == "true"
    assert timer["Timer"]["RandomizedDelaySec"]
    assert timer["Install"]["WantedBy"] == "timers.target"
    assert f"systemctl enable --now {next(name for name in units() if 'timer' in name)}" in README


# ------------------------------------------------------------------------------------------------- Kubernetes


def manifests(block: str) -> dict[str, dict[str, Any]]:
    """The objects in a block of YAML by their kinds."""
    documents = list(yaml.safe_load_all(block))
    kinds = {document["kind"]: document for document in documents}
    assert len(kinds) == len(documents)
    return kinds


def merged(base: Any, changes: Any) -> Any:
    """What `kubectl patch` makes of a manifest: parts of a list are known by their names, mounts by paths."""
    if isinstance(base, dict):
        both = {key: merged(base[key], value) for key, value in changes.items() if key in base}
        return {**base, **changes, **both}
    if isinstance(base, list):
        name = "mountPath" if "mountPath" in base[0] else "name"
        kept = {part[name]: part for part in base}
        changed = {part[name]: merged(kept.get(part[name]), part) for part in changes}
        return list({**kept, **changed}.values())
    return changes


def with_a_pod_for_each_part(nightly: Mapping[str, Any]) -> dict[str, Any]:
    """The nightly backup's manifests with the changes that the README tells."""
    assert "take out `backoffLimit`" in README.replace("\n", " ")
    assert "give the claim `ReadWriteMany`" in README.replace("\n", " ")
    kinds = copy.deepcopy(dict(nightly))
    del job(kinds)["backoffLimit"]
    kinds["CronJob"] = merged(kinds["CronJob"], yaml.safe_load(code_block(LARGE, "yaml")))
    kinds["PersistentVolumeClaim"]["spec"]["accessModes"] = ["ReadWriteMany"]
    return kinds


def job(kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The Job that a CronJob starts."""
    return kinds["CronJob"]["spec"]["jobTemplate"]["spec"]


def pod(kinds: Mapping[str, Any]) -> dict[str, Any]:
    """What its pods are."""
    return job(kinds)["template"]["spec"]


def container(kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The only container of a pod."""
    (only,) = pod(kinds)["containers"]
    return only


def by_name(entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Kubernetes's lists of named things as a mapping."""
    assert len({entry["name"] for entry in entries}) == len(entries)
    return {entry["name"]: entry for entry in entries}


NIGHTLY = manifests(code_block("Kubernetes", "yaml", "PersistentVolumeClaim"))
SHARDS = with_a_pod_for_each_part(NIGHTLY)
BOTH = pytest.mark.parametrize("kinds", [NIGHTLY, SHARDS], ids=["nightly", "shards"])


@dataclass(frozen=True)
class Created:
    """What the README's `kubectl create` commands make of `example.env`: kind and name → keys and values."""

    objects: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def secret(self) -> dict[str, str]:
        """The Secret."""
        return self.objects["secret s3borgbackup"]

    @property
    def config_map(self) -> dict[str, str]:
        """The ConfigMap."""
        return self.objects["configmap s3borgbackup"]


# Keeps what it is given, in a file that is called after the kind and the name.
KUBECTL = """\
#!/bin/sh
case $* in
"create secret generic s3borgbackup --from-env-file=/dev/stdin") cat >"$OUT/secret s3borgbackup" ;;
"create configmap s3borgbackup --from-env-file=/dev/stdin") cat >"$OUT/configmap s3borgbackup" ;;
*) exit 1 ;;
esac
"""


def create(folder: Path, text: str) -> Created:
    """The README's commands are run on such an .env; kubectl only takes down what it gets."""
    executable(folder / "bin" / "kubectl", KUBECTL)
    (folder / "out").mkdir()
    (folder / ".env").write_text(text)
    subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code_block("Kubernetes", "shell", "secret generic")],
        cwd=folder,
        env={"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "OUT": str(folder / "out")},
        check=True,
    )
    # kubectl reads such a file as Docker does (its env_file.go).
    return Created({path.name: docker_env_file(path.read_text()) for path in (folder / "out").iterdir()})


@pytest.fixture
def created(tmp_path: Path) -> Created:
    """From the example. Docker takes a line that begins with a blank, too."""
    text = (TOP / "example.env").read_text()
    return create(tmp_path, text.replace("\nTARGET_SECRETS=", "\n TARGET_SECRETS="))


# Of the example, with `{shard}` in the path of every target, as the README says.
EXAMPLE = docker_env_file((TOP / "example.env").read_text())
CREATED_SHARDS = Created(
    {
        "secret s3borgbackup": {"TARGET_SECRETS": EXAMPLE["TARGET_SECRETS"]},
        "configmap s3borgbackup": {**EXAMPLE, "TARGETS": with_shards(EXAMPLE["TARGETS"])},
    }
)
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def environment_of_pod(kinds: Mapping[str, Any], created: Created, index: int = 0) -> dict[str, str]:
    """What a pod gives the program. A value knows the variables before it: Kubernetes adds its own last."""
    sources = [{"configMapRef": {"name": "s3borgbackup"}}, {"secretRef": {"name": "s3borgbackup"}}]
    assert container(kinds)["envFrom"] == sources
    own: dict[str, str] = {}
    for entry in container(kinds).get("env", []):
        if "value" not in entry:
            assert entry["valueFrom"] == {"fieldRef": {"fieldPath": INDEX}}
        value = entry.get("value", str(index))
        own[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda found: own.get(found[1], found[0]), value)
    return {**created.config_map, **created.secret, **own}


@BOTH
@pytest.mark.parametrize("version", ["1.33", kubernetes_validate.latest_version()])
def test_kubernetes_knows_every_field(kinds: Mapping[str, Any], version: str) -> None:
    for document in kinds.values():
        kubernetes_validate.validate(document, version, strict=True)


@BOTH
def test_the_cron_job_never_runs_twice_at_once_nor_again_and_again(kinds: Mapping[str, Any]) -> None:
    spec = kinds["CronJob"]["spec"]
    check_schedule(spec["schedule"])
    assert spec["concurrencyPolicy"] == "Forbid"
    assert pod(kinds)["restartPolicy"] == "Never"
    assert pod(kinds)["terminationGracePeriodSeconds"] == STOP_SECONDS


def test_a_run_that_failed_waits_for_the_next_night_and_ends_no_other() -> None:
    assert job(NIGHTLY)["backoffLimit"] == 0
    assert job(SHARDS)["backoffLimitPerIndex"] == 0
    assert "backoffLimit" not in job(SHARDS)
    assert "maxFailedIndexes" not in job(SHARDS)


@BOTH
def test_the_secrets_come_from_the_secret_and_nothing_else_does(
    kinds: Mapping[str, Any], created: Created
) -> None:
    assert set(created.secret) == {"SOURCE_ACCESS_KEY_ID", "SOURCE_SECRET_ACCESS_KEY", "TARGET_SECRETS"}
    assert set(created.config_map) == set(docker_env_file((TOP / "example.env").read_text())) - set(
        created.secret
    )
    own = {entry["name"] for entry in container(kinds).get("env", [])}
    assert own & set(backup.VARIABLES) <= {"SHARD"}


def test_no_secret_that_can_be_set_becomes_public(tmp_path: Path) -> None:
    text = re.sub(r"^#(?=[A-Z_]+=)", "", (TOP / "example.env").read_text(), flags=re.MULTILINE)
    found = create(tmp_path, text)
    secret = {name for name in docker_env_file(text) if re.search("ACCESS_KEY|SECRET|_URL$", name)}
    assert len(secret) == 7
    assert set(found.secret) == secret
    assert not secret & set(found.config_map)


def test_the_program_accepts_what_a_pod_gives_it(created: Created) -> None:
    given = accepted(environment_of_pod(NIGHTLY, created))
    assert given == accepted(docker_env_file((TOP / "example.env").read_text()))


@BOTH
def test_a_pod_may_mount_and_write_where_it_has_to_and_nowhere_else(kinds: Mapping[str, Any]) -> None:
    context = container(kinds)["securityContext"]
    assert context == {"privileged": True, "readOnlyRootFilesystem": True}
    assert pod(kinds)["automountServiceAccountToken"] is False
    mounts = {mount["mountPath"]: mount for mount in container(kinds)["volumeMounts"]}
    volumes = by_name(pod(kinds)["volumes"])
    assert {mount["name"] for mount in mounts.values()} == set(volumes)
    written = json.loads(re.findall(r"^VOLUME (.*)$", DOCKERFILE, re.MULTILINE)[0])
    assert backup.DEFAULT_DATA_DIR in written
    for path in set(written) - {backup.DEFAULT_DATA_DIR}:  # there, nothing is kept
        claim = volumes[mounts[path]["name"]]["persistentVolumeClaim"]["claimName"]
        assert claim == kinds["PersistentVolumeClaim"]["metadata"]["name"]
    assert f"WORKDIR {backup.DEFAULT_DATA_DIR}" in DOCKERFILE
    for path in (backup.DEFAULT_DATA_DIR, "/tmp"):
        assert "emptyDir" in volumes[mounts[path]["name"]]
    # Two that share a volume do not see each other's files.
    places = [(mount["name"], mount.get("subPath")) for mount in mounts.values()]
    assert len(set(places)) == len(places)


BYTES = {"Gi": 1024**3, "G": 10**9, "Mi": 1024**2, "M": 10**6}


@BOTH
def test_a_pod_has_the_memory_that_the_program_needs(kinds: Mapping[str, Any]) -> None:
    resources = container(kinds)["resources"]
    assert resources["requests"]["memory"] == resources["limits"]["memory"]
    number, suffix = re.fullmatch(r"(\d+)(\w+)", resources["limits"]["memory"]).groups()
    assert int(number) * BYTES[suffix] // 10**6 >= backup.MEMORY_MB[0]


# ---------------------------------------------------------------------------- A pod for each part of a bucket


def test_each_part_has_a_pod() -> None:
    count = job(SHARDS)["completions"]
    assert job(SHARDS)["completionMode"] == "Indexed"
    assert job(SHARDS)["parallelism"] < count
    assert SHARDS["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]
    parts = [accepted(environment_of_pod(SHARDS, CREATED_SHARDS, index)).shard for index in range(count)]
    assert sorted(part.number for part in parts) == list(range(1, count + 1))
    assert {part.count for part in parts} == {count}


def test_each_part_goes_to_a_repository_of_its_own() -> None:
    places = [accepted(environment_of_pod(SHARDS, CREATED_SHARDS, index)).targets for index in range(16)]
    assert len({target.store.location for targets in places for target in targets}) == 16 * 2


# ----------------------------------------------------------------------------------------------------- fly.io

# Of flyctl's reference, those that take a value.
FLY_FLAGS = {
    "apps create": {"--org"},
    "secrets import": {"--app"},
    "volumes create": {"--app", "--region", "--size", "--count", "--snapshot-retention"},
    "machine run": {"--app", "--region", "--schedule", "--restart", "--vm-memory", "--volume", "--env"},
}


def test_flyctl_knows_every_flag() -> None:
    block = code_block("fly.io", "shell").replace("\\\n", " ")
    for line in block.splitlines():
        program, *words = shlex.split(line)
        assert program == "fly"
        flags = {word for word in words if word.startswith("--")}
        assert flags <= FLY_FLAGS[" ".join(words[:2])], line
    assert "--restart no" in block  # the default for a scheduled machine repeats a run that failed
