"""The commands that README and docs print."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "projects").glob("*/README.md"))]


def commands_of(page: Path) -> list[str]:
    """The commands of a page's bash blocks, lines put together, comments left out."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                found.append(shlex.join(words))
    return found


COMMANDS = [(page, command) for page in PAGES for command in commands_of(page)]
