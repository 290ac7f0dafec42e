"""The README's code blocks, for tests that do what it says: so the two cannot drift apart."""

import re
from collections.abc import Iterator
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
README = (TOP / "README.md").read_text(encoding="utf-8")

FENCE = re.compile(r" *```(\w*)")
HEADING = re.compile(r"(#+) (.+)")


def _lines(heading: str) -> Iterator[tuple[str, str | None]]:
    """The lines below a heading, smaller headings included, each with the language of its code block."""
    inside: str | None = None
    level = 0
    for line in README.splitlines():
        found = HEADING.fullmatch(line)
        if found and inside is None:
            if level and len(found[1]) <= level:
                return
            if found[2] == heading:
                level = len(found[1])
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
