# SPDX-License-Identifier: Apache-2.0
"""Every Python snippet of the documentation runs, in the order of its page; those marked `no-run` are left out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```python(?P<marks>[^\n]*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)


def snippets(page: Path) -> list[tuple[int, str]]:
    """Return line number and code of each snippet that is meant to run."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start("code")), match["code"])
        for match in FENCE.finditer(text)
        if "no-run" not in match["marks"].split()
    ]


PAGES = [
    page.relative_to(ROOT).as_posix()
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
    if "_build" not in page.parts and snippets(page)
]


@pytest.mark.parametrize("name", PAGES)
def test_snippets_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a snippet of the page, copied as it stands, does not run after those above it."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "snippet"}
    for line, code in snippets(ROOT / name):
        padding = "\n" * line  # tracebacks then name the line of the page
        exec(compile(padding + code, str(ROOT / name), "exec"), namespace)


def test_the_pages_that_teach_have_snippets() -> None:
    """Fails if the search for snippets finds none where they are known to be, and so tests nothing."""
    assert {"README.md", "docs/quickstart.md", "docs/adding.md", "docs/writing_a_plugin.md"} <= set(PAGES)
