"""Artefacts of a tiny random Llama by their passes, and their reports, each made once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

VOID = {"meta", "br", "hr", "img", "input", "link"}
ADDRESSES = {"src", "href", "srcset", "action", "data", "poster", "background", "formaction"}


class Page(HTMLParser):
    """A page read strictly: every element closed in order, every id once, nothing fetched."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.wrong: list[str] = []
        self.words: list[str] = []
        self.policies: list[str] = []
        self.feed(source)
        self.close()
        if self.open:
            self.wrong.append(f"never closed: {self.open}")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        names = [name for name, _ in attrs]
        if dict(attrs).get("http-equiv") == "Content-Security-Policy":
            self.policies.append(dict(attrs)["content"] or "")
        if len(set(names)) < len(names):
            self.wrong.append(f"an attribute twice in {tag}: {names}")
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name.startswith("on"):
                self.wrong.append(f"a handler {name} in {tag}")
            if name in ADDRESSES:
                self.links.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"closed out of order: {tag}")

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        """What a reader reads, spaces joined."""
        return " ".join(" ".join(self.words).split())


def read_page(source: str) -> Page:
    """The page, once it has been found lawful."""
    page = Page(source)
    assert not page.wrong, page.wrong
    assert len(set(page.ids)) == len(page.ids), page.ids
    assert not {"script", "iframe", "object", "embed", "base", "link"} & set(page.tags)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links), page.links
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    return page


@pytest.fixture(scope="session")
def lawful() -> Callable[[str], Page]:
    """``lawful(source)`` reads a page strictly."""
    return read_page


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``made(passes)``: the artefact's folder; read only."""
    from tiny_models import make

    import llmc
    from llmc.compiler import api
    from llmc.compiler.ir.graph import Program

    kept: dict[str, Path] = {}
    captured: list[Program] = []
    tokens = torch.randint(3, 90, (4, 24), generator=torch.Generator().manual_seed(0))

    def get(passes: str) -> Path:
        if passes not in kept:
            if not captured:
                captured.append(api.capture(make("llama")))
            done = llmc.compile(
                captured[0].clone(), passes=passes, calibration=tokens, samples=4, length=24
            )
            kept[passes] = tmp_path_factory.mktemp("made") / "result"
            done.save(kept[passes], command=["compile", "model", "--passes", passes])
        return kept[passes]

    return get


@pytest.fixture(scope="session")
def report() -> Callable[..., str]:
    """``report(folder)``: the page that the command would write."""
    from llmc.compiler.cli.report import page_of

    return page_of
