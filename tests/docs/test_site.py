"""The site builds strictly and without a network; its pages need nothing from elsewhere, and no link is dead."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock
from urllib.parse import unquote, urlsplit

import pytest

import adalora

from .pages import DOCS, ROOT

LOADED = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "embed": "src",
}
"""Elements that make a browser load something, and the attribute that says what."""

LINKED = {"stylesheet", "icon", "preload", "modulepreload", "manifest", "preconnect", "dns-prefetch", "prefetch"}
"""Relations of a ``link`` for which a browser turns to the address."""


class Page(HTMLParser):
    """What one page loads, links to, and can be linked at."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.classes: set[str] = set()
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self.classes |= set(given.get("class", "").split())
        if tag in LOADED and LOADED[tag] in given:
            self.loads.append(given[LOADED[tag]])
        if tag == "link" and set(given.get("rel", "").split()) & LINKED:
            self.loads.append(given["href"])
        self.loads += [part.split()[0] for part in given.get("srcset", "").split(",") if part.strip()]
        self.loads += re.findall(r"url\(['\"]?([^'\")]+)", given.get("style", ""))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])

    def handle_data(self, data: str) -> None:
        self.text += data


def refuse(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("the site is built without a network")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the site; building it is strict, and sockets are blocked."""
    config = pytest.importorskip("mkdocs.config", reason="mkdocs is not installed: pip install 'adalora[docs]'")
    build = pytest.importorskip("mkdocs.commands.build")
    folder = tmp_path_factory.mktemp("site")
    with (
        mock.patch.dict(os.environ, {"NO_MKDOCS_2_WARNING": "1"}),
        mock.patch.object(socket.socket, "connect", refuse),
        mock.patch.object(socket, "getaddrinfo", refuse),
    ):
        settings = config.load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder))
        settings.plugins.on_startup(command="build", dirty=False)
        build.build(settings)
        settings.plugins.on_shutdown()
    yield folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    """Every page but the one for addresses that are none, whose links depend on where the site is."""
    return {path: Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}


def test_every_source_is_a_page(site: Path) -> None:
    expected = {path.relative_to(DOCS).with_suffix(".html") for path in DOCS.rglob("*.md")}
    missing = {str(path) for path in expected if not (site / path).is_file()}
    assert missing == set()
    assert (site / "changelog.html").is_file() and (site / "contributing.html").is_file()
    assert not list(site.rglob("*.py"))


def test_no_page_loads_anything_from_another_host(site: Path, pages: dict[Path, Page]) -> None:
    foreign = {
        f"{path.relative_to(site)}: {load}"
        for path, page in pages.items()
        for load in page.loads
        if urlsplit(load).netloc or not (path.parent / unquote(urlsplit(load).path)).resolve().is_file()
    }
    assert foreign == set()
    for sheet in site.rglob("*.css"):
        found = re.findall(r"(?:@import\s+|url\()['\"]?((?:https?:)?//[^'\")\s]+)", sheet.read_text(encoding="utf-8"))
        assert found == [], sheet
    # the theme's script fetches these from elsewhere where a page has them
    assert not {"mermaid", "arithmatex"} & {name for page in pages.values() for name in page.classes}


def test_links_and_anchors_within_the_site_hold(site: Path, pages: dict[Path, Page]) -> None:
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            found = target.is_file() and (
                not parts.fragment or target not in pages or unquote(parts.fragment) in pages[target].anchors
            )
            if not found:
                dead.append(f"{path.relative_to(site)}: {link}")
    assert dead == []


def test_links_of_the_repository_hold() -> None:
    """As a reader of the files meets them, before any site is built."""
    dead = []
    for page in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]:
        prose = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", prose):
            parts = urlsplit(link)
            if not parts.scheme and parts.path and not (page.parent / parts.path).exists():
                dead.append(f"{page.relative_to(ROOT)}: {link}")
    assert dead == []


def test_the_reference_has_every_public_name(site: Path, pages: dict[Path, Page]) -> None:
    page = pages[site / "reference" / "python.html"]
    assert {f"adalora.{name}" for name in adalora.__all__} <= page.anchors, "a name is missing in reference/python.md"
    assert "Parameters:" in page.text and "Raises:" in page.text and "Returns:" in page.text
    assert not re.search(r"\b(Args:|:class:`|:func:`|:meth:`)", page.text), "a docstring's mark-up shows"


def test_errors_of_the_command_line_are_explained() -> None:
    """Each error that the package defines is a row of the page, with the exit code that ``adalora`` ends with."""
    page = (DOCS / "reference" / "errors.md").read_text(encoding="utf-8")
    sources = [path.read_text(encoding="utf-8") for path in Path(adalora.__file__).parent.rglob("*.py")]
    defined = [found for text in sources for found in re.findall(r"^class (\w+Error)\((.*?)\):", text, re.MULTILINE)]
    assert len(defined) >= 8
    for name, bases in defined:
        if name != "AdaLoraError":
            code = 1 if "RuntimeError" in bases else 2
            row = next((line for line in page.splitlines() if line.startswith("|") and f"`{name}`" in line), "")
            assert row.endswith(f"| {code} |"), f"{name}, exit code {code}, is not in docs/reference/errors.md"
