"""The `code2lora` command: parse, call one function of a room below, render.

Nothing here computes; nothing below here prints, exits or asks the terminal. Commands import the
rooms they need when they run, so that `status` and `--help` never wait for torch.
"""

from __future__ import annotations

import gc
from typing import NoReturn

_GC_THRESHOLD = 50_000


def main() -> NoReturn:
    """Run the command line of this process."""
    # Importing makes many objects and hardly any garbage; looking for it so often takes 5 %.
    gc.set_threshold(_GC_THRESHOLD)
    from code2lora.cli.app import cli

    cli.main()
