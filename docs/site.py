"""Hooks of `make docs`: the first page from README.md, the page of settings, and what pages link to outside of docs/."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from ficpd.experiments.reference import settings_page

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[([^][]*)\]\(((?!https?:|mailto:)[^)#\s]+)(#[^)\s]*)?\)")
"""Text, place in the repository, and heading."""


def on_files(files: Files, config: Any) -> Files:
    """Adds the files of the repository that pages link to, at the same path."""
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text(encoding="utf-8")))
    files.append(File.generated(config, "settings.md", content=settings_page()))
    todo = [file.src_uri for file in files if file.src_uri.endswith(".md")]
    for page in todo:
        file = files.get_file_from_path(page)
        assert file is not None
        for _, link, _ in LINK.findall(file.content_string):
            source, path = _target(page, link)
            if files.get_file_from_path(path) is None and source.is_file():
                files.append(File.generated(config, path, content=source.read_bytes()))
                todo += [path] * path.endswith(".md")
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Points links at the site's own paths. A folder is named, and not linked."""

    def at_site(match: re.Match[str]) -> str:
        text, link, heading = match.groups()
        source, path = _target(page.file.src_uri, link)
        if files.get_file_from_path(path) is None:
            return text if source.is_dir() else match[0]  # mkdocs names a link that leads nowhere
        return f"[{text}]({posixpath.relpath(path, posixpath.dirname(page.file.src_uri) or '.')}{heading or ''})"

    return LINK.sub(at_site, markdown)


def _target(page: str, link: str) -> tuple[Path, str]:
    """Returns the file that a page's link means, and its path at the site, where docs/ and README.md are at the top."""
    inside = "README.md" if page == "index.md" else page if (ROOT / page).exists() else f"docs/{page}"
    path = posixpath.normpath(posixpath.join(posixpath.dirname(inside), link))
    return ROOT / path, "index.md" if path == "README.md" else path.removeprefix("docs/")
