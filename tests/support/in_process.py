"""A program of ours run as `python -m MODULE WORDS` runs it, but here: a process of its own imports for seconds."""

from __future__ import annotations

import contextlib
import io
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from unittest.mock import patch


def program(module: str, *words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What it printed and its exit status. An exception that would end a process with a traceback is raised."""
    command = [module, *map(str, words)]
    out, error = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(cwd or Path.cwd()))
        stack.enter_context(patch.object(sys, "argv", command[:]))
        stack.enter_context(patch.object(sys, "excepthook", sys.excepthook))  # typer puts its own
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(error))
        stack.enter_context(warnings.catch_warnings(record=True))  # a process goes on after a warning
        warnings.simplefilter("default")
        code: object = None
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
    status = code if isinstance(code, int) else int(code is not None)
    return subprocess.CompletedProcess(command, status, out.getvalue(), error.getvalue())
