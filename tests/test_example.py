"""example.env works as it stands, and together with the README it tells of everything that can be set."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

import backup
from loading import load_settings

TOP = Path(__file__).resolve().parent.parent
EXAMPLE = (TOP / "example.env").read_text(encoding="utf-8")
README = (TOP / "README.md").read_text(encoding="utf-8")

# `#NAME=value`: an optional setting, commented out. Comments for people begin with `# `.
OPTIONAL_SETTING = re.compile(r"^#(?=[A-Z_]+=)", re.MULTILINE)


def docker_env_file(text: str) -> dict[str, str]:
    """What `docker run --env-file` makes of a file.

    A comment is a line that begins with `#`, blanks before it aside; a value is all that follows the first
    `=`, quotes and blanks included.
    """
    environment = {}
    for line in text.split("\n"):
        stripped = line.removesuffix("\r").lstrip(" \t")
        if stripped and not stripped.startswith("#"):
            name, separator, value = stripped.partition("=")
            assert separator, f"Docker would look for {name!r} in its own environment"
            assert re.fullmatch(r"[^\s]+", name), f"Docker would refuse the name {name!r}"
            environment[name] = value
    return environment


def mentioned(words: Iterable[str], text: str) -> set[str]:
    """Those of `words` that `text` has as whole words."""
    return {word for word in words if re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text)}


def explained(words: Iterable[str]) -> set[str]:
    """Those of `words` that have a row in one of the README's tables."""
    first_cells = "\n".join(re.findall(r"^\| ([^|]*) \|", README, re.MULTILINE))
    return {word for word in words if f"`{word}`" in first_cells}


def accepted(environment: Mapping[str, str]) -> backup.Settings:
    """The settings of an environment; fails with all mistakes that the program finds."""
    try:
        return load_settings(environment)
    except backup.ConfigurationError as error:
        pytest.fail("\n".join(error.mistakes))


def with_shards(targets: str) -> str:
    """TARGETS as SHARD wants it."""
    return re.sub(r'"path": "([^":]+):?([^"]*)"', r'"path": "\1:\2/{shard}"', targets)


def test_the_example_is_accepted_as_it_stands() -> None:
    settings = accepted(docker_env_file(EXAMPLE))
    assert [target.name for target in settings.targets] == ["first", "second"]


def test_the_optional_settings_are_accepted_too_and_are_the_defaults() -> None:
    plain = docker_env_file(EXAMPLE)
    everything = docker_env_file(OPTIONAL_SETTING.sub("", EXAMPLE))
    assert set(everything) == set(backup.VARIABLES)
    with_all = accepted(everything | {"TARGETS": with_shards(everything["TARGETS"])})
    assert with_all.source.region == "eu-central-1"
    assert (with_all.data_dir, with_all.debug) == (accepted(plain).data_dir, accepted(plain).debug)


def test_the_example_has_every_variable_and_no_other() -> None:
    assert mentioned(backup.VARIABLES, EXAMPLE) == set(backup.VARIABLES)
    assert set(docker_env_file(EXAMPLE)) <= set(backup.VARIABLES)


def test_the_example_has_every_key_of_a_target() -> None:
    keys = {*backup.TARGET_KEYS, *backup.SECRET_KEYS}
    assert mentioned(keys, EXAMPLE) == keys


def test_the_readme_explains_every_variable() -> None:
    assert explained(backup.VARIABLES) == set(backup.VARIABLES)


def test_the_readme_explains_every_key_of_a_target() -> None:
    keys = {*backup.TARGET_KEYS, *backup.SECRET_KEYS}
    assert explained(keys) == keys


def test_the_readme_names_the_defaults_and_every_encryption_mode() -> None:
    words = {
        backup.TARGET["encryption"].default,
        backup.TARGET["compression"].default,
        backup.VARIABLES["BACKUP_LABEL"].default,
        backup.DEFAULT_DATA_DIR,
    }
    words.update(backup.ENCRYPTION_MODES)
    assert {word for word in words if f"`{word}`" in README} == words


def test_the_readme_knows_every_command_and_the_flags_that_a_mount_takes() -> None:
    assert mentioned(backup.COMMANDS, README) == set(backup.COMMANDS)
    flags = re.findall(r"--[a-z-]+ \S+[^\s.]", backup.FUSE_HELP)
    assert len(flags) == 3
    assert [flag for flag in flags if flag not in README] == []
