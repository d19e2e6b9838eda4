"""The documents: short enough, links that lead somewhere, commands that exist, a message map that is true."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from house.message_map import message_map, written

from golem.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"```\w*\n(.*?)```|(?<!`)`([^`\n]+)`(?!`)", re.DOTALL)
PATH = re.compile(r"`((?:docs|golem|actors|protocol|tests|benchmarks|examples)/[\w./-]*)`")
TARGET = re.compile(r"\bmake ([a-z]+)\b")


def test_the_readme_is_a_leaflet() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 8 * 1024


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for link in LINK.findall(text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for path in PATH.findall(text):
        assert (ROOT / path).exists(), path


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of each `golem ...` line of a page, without what the shell takes."""
    for block, inline in CODE.findall(page.read_text()):
        for line in (block or inline).splitlines():
            line = re.sub(r"^(\w+=\S+ +)+", "", line.partition(" #")[0].strip())
            line = re.split(r" [&|<>]|\)$|…", line.rpartition("$(")[2])[0].rstrip("&).")
            if re.match(r"(golem|yagna) ", line):
                yield shlex.split(line)[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    for words in commands(page):
        command: click.Command = main
        context = click.Context(command)
        rest = iter(words)
        for word in rest:
            known = [one for one in command.params if isinstance(one, click.Option)]
            options = {name: one for one in known for name in (*one.opts, *one.secondary_opts)}
            if word == "--":
                break  # the rest is a command for the guest
            if word.startswith("-"):
                assert word in options or word in ("--help", "-h"), (words, word)
                if word in options and not options[word].is_flag:
                    next(rest, None)
            elif isinstance(command, click.Group):
                found = command.get_command(context, word)
                assert found is not None, (words, word)
                command = found


def test_targets_exist() -> None:
    made = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for block, inline in CODE.findall(page.read_text()):
            assert set(TARGET.findall(block or inline)) <= made, page


def test_the_message_map_is_true() -> None:
    assert written()[1] == message_map(), "write it anew: tests/house/message_map.py --write"


def test_files_that_docstrings_name_are_there() -> None:
    """By their path in the repository, or beside the file that names them."""
    lost = []
    for room in ("golem", "actors", "protocol", "tests", "benchmarks"):
        for path in (ROOT / room).rglob("*.py"):
            named = re.findall(r"`([\w/]+\.py)`", path.read_text())
            lost += [
                f"{path.relative_to(ROOT)}: {name}"
                for name in named
                if not any((at / name).exists() for at in (ROOT, path.parent))
            ]
    assert not lost
