"""The command line: `devmon COMMAND`."""

from devmon.cli.root import app, main

__all__ = ["app", "main"]
