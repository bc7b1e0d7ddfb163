"""`python -m devmon.live RUN PAGE.html [SECONDS]`: write the live page of a run; with SECONDS it loads itself again.

`devmon.callbacks.Monitor(live=...)` starts this beside the training, so that making a page shares nothing with it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main(run: str, page: str, seconds: str = "") -> None:
    """Make the page at the lowest priority; it appears whole or not at all."""
    if hasattr(os, "nice"):
        os.nice(19)
    from devmon.files import write_whole
    from devmon.live.page import live_page

    write_whole(Path(page), live_page(run, int(seconds) if seconds else None).encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
