"""The README's code blocks, for tests that do what it says: so the two cannot drift apart."""

import re
from collections.abc import Iterator
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
README = (TOP / "README.md").read_text(encoding="utf-8")

FENCE = re.compile(r" *```(\w*)")
HEADING = re.compile(r"(?P<level>#+) (?P<title>.+)|<details><summary>(?P<folded>.+)</summary>")
FOLDED_LEVEL = 7  # below all that `#` can make


def _lines(heading: str) -> Iterator[tuple[str, str | None]]:
    """The lines below a heading, smaller headings included, each with the language of its code block.

    What is folded has its summary as a heading.
    """
    inside: str | None = None
    level = 0
    for line in README.splitlines():
        found = HEADING.fullmatch(line) if inside is None else None
        if found:
            this_level = len(found["level"]) if found["level"] else FOLDED_LEVEL
            if level and this_level <= level:
                return
            if heading in (found["title"], found["folded"]):
                level = this_level
        if line == "</details>" and level == FOLDED_LEVEL:
            return
        fence = FENCE.match(line)
        if fence:
            inside = fence[1] if inside is None else None
        if level:
            yield line, None if fence else inside
    assert level, f"the README has no heading {heading!r}"


def code_blocks(heading: str, language: str) -> list[str]:
    """The code blocks of one language below a heading, without their indentation; at least one."""
    blocks: list[list[str]] = [[]]
    for line, inside in _lines(heading):
        if inside == language:
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    found = [_dedented(block) for block in blocks if block]
    assert found, f"the README has no {language} below {heading!r}"
    return found


def _dedented(lines: list[str]) -> str:
    indentation = len(lines[0]) - len(lines[0].lstrip(" "))
    return "".join(line[indentation:] + "\n" for line in lines)


def code_block(heading: str, language: str, text: str = "") -> str:
    """The one code block of a language below a heading that contains `text`."""
    found = [block for block in code_blocks(heading, language) if text in block]
    assert len(found) == 1, f"below {heading!r}, {len(found)} blocks of {language} have {text!r}"
    return found[0]


def shell_line(heading: str, beginning: str) -> str:
    """The one line that begins so in the shell blocks below a heading, without the comment behind it."""
    lines = "".join(code_blocks(heading, "shell")).splitlines()
    (line,) = [line for line in lines if line.startswith(beginning)]
    return re.sub(r"\s+# .*", "", line)


def table(heading: str, head: str) -> list[list[str]]:
    """The rows of the table below a heading that has `head` in its first line, without its two head lines."""
    lines = [line for line, _ in _lines(heading)]
    start = next(number for number, line in enumerate(lines) if line.startswith("|") and f" {head} |" in line)
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


# The function that stands for the long command, and that command: without a terminal, and without arguments.
S3BB = code_block("Quick start", "shell", "s3bb() {").partition("\n}\n")[0] + "\n}\n"
ONE_SHOT = "docker run" + S3BB.partition("docker run")[2].partition(' "$@"')[0].replace(" -i $tty", "", 1)
