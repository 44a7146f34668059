"""What the site does beyond MkDocs: pages of the repository's root, and links that leave docs/."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
FROM_ROOT = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
"""Page of the site -> file beside docs/."""

LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>[^)\s]+)\)")


def on_files(files: Files, *, config: Any) -> Files:
    """The changelog and the page for contributors are read where everybody looks for them: in the root."""
    for page, source in FROM_ROOT.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """A link to a file of the repository that is no page, such as a recipe, becomes its path."""
    home = PurePosixPath(FROM_ROOT.get(page.file.src_uri, f"docs/{page.file.src_uri}")).parent

    def kept(link: re.Match[str]) -> str:
        target, hash_, anchor = link["target"].partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            return link[0]
        place = normpath(home / target)
        if place.startswith("docs/"):  # seen from the root, `docs/x.md` is the page `x.md`
            return link[0] if home.parts[:1] == ("docs",) else f"[{link['text']}]({place[5:]}{hash_}{anchor})"
        if place in FROM_ROOT.values():
            up = "../" * (len(home.parts) - 1)
            return f"[{link['text']}]({up}{next(to for to, at in FROM_ROOT.items() if at == place)}{hash_}{anchor})"
        if not (ROOT / place).exists():
            return link[0]  # MkDocs says that it leads nowhere
        return link["text"] if link["text"].strip("`/") == place else f"{link['text']} (`{place}`)"

    return LINK.sub(kept, markdown)


ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):(?=<code>)")


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name what they speak of as ``:class:`Name```, for editors; a reader sees the name."""
    return ROLE.sub("", html)
