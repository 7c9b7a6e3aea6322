"""Write docs/reference/cli.md from the commands' own help; `--check` only compares."""

from __future__ import annotations

import sys
from pathlib import Path

from code2lora.cli.app import cli
from code2lora.cli.reference import render_reference

PAGE = Path(__file__).parent / "reference" / "cli.md"


def main(arguments: list[str]) -> int:
    """Return 0 when the page is (now) what the commands say, 1 when `--check` finds it is not."""
    page = render_reference(cli)
    if arguments == ["--check"]:
        if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page:
            return 0
        print(f"{PAGE} is out of date: run `python docs/generate_reference.py`", file=sys.stderr)
        return 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
