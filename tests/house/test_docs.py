"""Pages that are made from the code match the code; `make golden` rewrites them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from llmc.spec.pages import PAGES, passes_table, table


def between(text: str, name: str, body: str | None = None) -> str:
    """The part between the markers of ``name``, or the text with ``body`` put in its place."""
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    assert text.count(begin) == text.count(end) == 1, f"expected one pair of {name} markers"
    head, rest = text.split(begin)
    old, tail = rest.split(end)
    return old if body is None else head + begin + body + end + tail


def test_markers_replace_only_their_part() -> None:
    """The part between markers is read and replaced; the rest stays."""
    page = "a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb\n"
    assert between(page, "x") == "old\n"
    assert between(page, "x", "new\n") == page.replace("old", "new")
    with pytest.raises(AssertionError, match="one pair of y markers"):
        between(page, "y")


def test_figures_have_their_markers(repo: Path) -> None:
    """The part of the page of figures that is filled from measurements is there."""
    page = (repo / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert between(page, "figures").strip()


@pytest.mark.parametrize("page", PAGES)
def test_generated_page_is_fresh(
    repo: Path, same_as_file: Callable[[str, Path], None], page: str
) -> None:
    """Each generated page is what the code makes now."""
    same_as_file(PAGES[page](), repo / page)


def test_table_of_passes_is_fresh(repo: Path, same_as_file: Callable[[str, Path], None]) -> None:
    """The README's table of passes is what the passes say of themselves."""
    path = repo / "README.md"
    same_as_file(between(path.read_text(encoding="utf-8"), "passes", passes_table()), path)


def test_table_escapes_bars() -> None:
    """A bar inside a cell does not make a column."""
    assert table(("a",), [("x|y\nz",)]).splitlines()[2] == "| x\\|y z |"


PROSE = ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "examples/pylm/README.md")


@pytest.mark.parametrize("page", PROSE)
def test_links_between_files_lead_somewhere(repo: Path, page: str) -> None:
    """Every relative link of a page names a file that exists."""
    path = repo / page
    targets = re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8"))
    dead = [t for t in targets if "://" not in t and not (path.parent / t).exists()]
    assert not dead, dead


def test_make_help_lists_every_target(repo: Path) -> None:
    """Each public target of the Makefile carries the sentence that `make help` prints."""
    makefile = (repo / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    for target in phony.group(1).split():
        assert re.search(rf"^{target}:.*## \w", makefile, re.MULTILINE), target


def test_same_as_file_catches_a_stale_page(
    repo: Path, same_as_file: Callable[[str, Path], None], update_golden: bool
) -> None:
    """The harness of generated pages fails on a page that differs, naming the page."""
    if update_golden:
        pytest.skip("rewriting, not comparing")
    with pytest.raises(pytest.fail.Exception, match=r"LICENSE is stale"):
        same_as_file("not the license\n", repo / "LICENSE")
