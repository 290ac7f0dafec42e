"""The workflows in .github: what is pinned, who may write where, and that nothing is published untested."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import backup
from readme import README, TOP

FOLDER = TOP / ".github" / "workflows"
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.yml"))}
WORKFLOWS: dict[str, dict[str, Any]] = {name: yaml.safe_load(text) for name, text in TEXTS.items()}
CI, PUBLISH = WORKFLOWS["ci.yml"], WORKFLOWS["publish.yml"]
EACH = pytest.mark.parametrize("name", WORKFLOWS)

PINNED = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")


def triggers(workflow: dict[Any, Any]) -> dict[str, Any]:
    """What starts a workflow. YAML 1.1 takes its key for `true`."""
    return workflow[True]


def steps(workflow: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The steps of all its jobs."""
    for job in workflow["jobs"].values():
        yield from job.get("steps", ())


def step(workflow: dict[str, Any], action: str) -> dict[str, Any]:
    """The only step that uses an action."""
    (found,) = [entry for entry in steps(workflow) if entry.get("uses", "").startswith(f"{action}@")]
    return found


@EACH
def test_every_action_is_pinned_to_a_commit_and_says_its_version(name: str) -> None:
    used = re.findall(r"\buses: (.*)$", TEXTS[name], re.MULTILINE)
    assert used
    assert [entry for entry in used if not entry.startswith("./") and not PINNED.fullmatch(entry)] == []


def test_an_action_has_one_version_everywhere() -> None:
    pins = {tuple(pin.split("@")) for pin in re.findall(r"uses: (\S+@\S+)", "".join(TEXTS.values()))}
    assert len({action for action, _ in pins}) == len(pins)


def test_the_pins_are_kept_fresh() -> None:
    (update,) = yaml.safe_load((FOLDER.parent / "dependabot.yml").read_text())["updates"]
    assert (update["package-ecosystem"], update["directory"]) == ("github-actions", "/")


@EACH
def test_permissions_are_declared_and_minimal(name: str) -> None:
    workflow = WORKFLOWS[name]
    assert workflow["permissions"] in ({}, {"contents": "read"})
    for job_name, job in workflow["jobs"].items():
        allowed = dict(job.get("permissions", workflow["permissions"]))
        assert allowed.pop("contents") == "read"
        # Only what pushes the image may write, and nothing but packages.
        assert allowed == ({"packages": "write"} if (name, job_name) == ("publish.yml", "image") else {})
    for checkout in steps(workflow):
        if checkout.get("uses", "").startswith("actions/checkout@"):
            assert checkout["with"]["persist-credentials"] is False


@EACH
def test_nothing_runs_for_ever_or_twice_at_once(name: str) -> None:
    assert WORKFLOWS[name]["concurrency"]["group"]
    for job in WORKFLOWS[name]["jobs"].values():
        assert "uses" in job or job["timeout-minutes"] <= 90


@EACH
def test_no_script_has_an_expression_pasted_into_it(name: str) -> None:
    assert [entry["run"] for entry in steps(WORKFLOWS[name]) if "${{" in entry.get("run", "")] == []


def test_pushes_run_what_a_contributor_runs_and_every_night_all_else_runs_too() -> None:
    assert {"push", "pull_request", "schedule", "workflow_call"} == set(triggers(CI))
    runs = {name: job["steps"][-1]["run"] for name, job in CI["jobs"].items()}
    assert runs == {
        "tests": "tests/run",
        "long": "sudo --preserve-env=CI,HOME tests/run long",
        "servers": "sudo --preserve-env=CI,HOME,PATH tests/run servers",
        "container": "tests/run container",
    }
    for name in ("long", "servers"):
        assert CI["jobs"][name]["if"] == "github.event_name == 'schedule' || inputs.ref != ''"
    assert not any("if" in CI["jobs"][name] for name in ("tests", "container"))


def test_the_image_is_tested_on_the_real_python_and_on_the_newest_alpine() -> None:
    container = CI["jobs"]["container"]
    images = container["strategy"]["matrix"]["python-image"]
    dockerfile = (TOP / "Dockerfile").read_text()
    (default,) = re.findall(r"^ARG PYTHON_IMAGE=(.*)$", dockerfile, re.MULTILINE)
    assert images == [default, "alpine:latest"]
    assert container["steps"][-1]["env"] == {"PYTHON_IMAGE": "${{ matrix.python-image }}"}


def test_a_tag_is_published_and_the_newest_one_again_every_week() -> None:
    assert triggers(PUBLISH)["push"] == {"tags": ["v*"]}
    (schedule,) = triggers(PUBLISH)["schedule"]
    assert schedule["cron"].split()[2:] == ["*", "*", "1"]
    assert "every Monday" in README


def test_nothing_is_published_before_it_was_tested() -> None:
    jobs = PUBLISH["jobs"]
    tag = "refs/tags/${{ needs.release.outputs.tag }}"
    assert jobs["tests"]["uses"] == "./.github/workflows/ci.yml"
    assert jobs["tests"]["with"] == {"ref": tag}
    assert set(jobs["image"]["needs"]) == {"release", "tests"}
    assert "if" not in jobs["image"]  # which could let it run although the tests failed
    assert jobs["image"]["steps"][0]["with"]["ref"] == tag
    checkouts = [entry["with"]["ref"] for entry in steps(CI) if "actions/checkout@" in entry.get("uses", "")]
    assert checkouts == ["${{ inputs.ref }}"] * len(CI["jobs"])


def test_the_image_is_built_afresh_for_both_platforms_with_attestations() -> None:
    build = step(PUBLISH, "docker/build-push-action")["with"]
    assert build["platforms"].split(",") == ["linux/amd64", "linux/arm64"]
    assert (build["pull"], build["no-cache"], build["push"]) == (True, True, True)
    assert (build["provenance"], build["sbom"]) == ("mode=max", True)
    assert not {"cache-from", "cache-to"} & set(build)
    labels = {line.partition("=")[0].rpartition(".")[2] for line in build["labels"].splitlines()}
    assert labels == {"created", "revision", "source", "version"}


# -------------------------------------------------------------------------------- Which release is published


def choose(folder: Path, pushed: str) -> dict[str, str]:
    """What the workflow's script says in a repository: `tag` and `latest`. `pushed` is empty on Mondays."""
    (script,) = [entry["run"] for entry in PUBLISH["jobs"]["release"]["steps"] if "run" in entry]
    output = folder / "output"
    output.write_text("")
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
        cwd=folder / "repository",
        env={"PATH": os.environ["PATH"], "PUSHED": pushed, "GITHUB_OUTPUT": str(output)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    assert bool(done.returncode) == ("::error::" in done.stdout), done.stdout + done.stderr
    return {"error": "yes"} if done.returncode else dict(line.split("=") for line in output.open())


def git(folder: Path, *arguments: str) -> None:
    """Run git in a repository of the test's own, with none of the user's settings."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "GIT_CONFIG_NOSYSTEM": "1",
        **{f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    }
    subprocess.run(["git", *arguments], cwd=folder, env=environment, capture_output=True, check=True)


def repository(folder: Path, versions: list[str]) -> None:
    """A repository with a tag for each version."""
    (folder / "repository").mkdir()
    git(folder / "repository", "init", "--quiet")
    for version in ("0", *versions):
        (folder / "repository" / "backup.py").write_text(f'VERSION = "{version}"\n')
        git(folder / "repository", "add", "backup.py")
        git(folder / "repository", "commit", "--quiet", "--message", version)
        if version in versions:
            git(folder / "repository", "tag", f"v{version}")


@pytest.mark.parametrize(
    ("versions", "pushed", "expected"),
    [
        ([], "", {}),
        (["1.0.0"], "v1.0.0", {"tag": "v1.0.0", "latest": "true"}),
        (["1.9.0", "1.10.0"], "", {"tag": "v1.10.0", "latest": "true"}),
        # A fix of an old release, and a candidate of a new one, are not what `latest` means.
        (["1.10.0", "1.9.1"], "v1.9.1", {"tag": "v1.9.1", "latest": "false"}),
        (["1.10.0", "2.0.0-rc1"], "v2.0.0-rc1", {"tag": "v2.0.0-rc1", "latest": "false"}),
        (["1.10.0", "2.0.0-rc1"], "", {"tag": "v1.10.0", "latest": "true"}),
    ],
)
def test_which_release_is_published(
    tmp_path: Path, versions: list[str], pushed: str, expected: dict[str, str]
) -> None:
    repository(tmp_path, versions)
    assert {key: value.strip() for key, value in choose(tmp_path, pushed).items()} == expected


def test_a_tag_that_is_not_the_programs_version_is_refused(tmp_path: Path) -> None:
    repository(tmp_path, ["1.0.0"])
    git(tmp_path / "repository", "tag", "v1.0.1")
    assert choose(tmp_path, "v1.0.1") == {"error": "yes"}


def test_the_programs_version_is_where_the_workflow_looks_for_it() -> None:
    assert f'\nVERSION = "{backup.VERSION}"\n' in (TOP / "backup.py").read_text()
