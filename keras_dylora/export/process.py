"""Child processes: run, watched, and ended with the call that runs them."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ERROR_NAME = "error.json"


class ChildError(Exception):
    """An error that ended a child process; `kind` is an exception's name."""

    def __init__(self, kind, message, stderr):
        super().__init__(f"{kind}: {message}" if message else kind)
        self.kind = kind
        self.stderr = stderr


def run(arguments, folder, environment=None, on_line=lambda line: None):
    """Runs Python in a process until it ends; an interruption ends it too.

    The process writes its error into `folder`, which is raised as a
    `ChildError`. `on_line` is called with each line that it prints.
    """
    with (
        tempfile.TemporaryFile("w+", errors="replace") as stderr,
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        try:
            for line in process.stdout:
                on_line(line.rstrip())
            code = process.wait()
        except BaseException:
            process.kill()
            raise
        if code == 0:
            return
        stderr.seek(0)
        written = stderr.read()
    with contextlib.suppress(FileNotFoundError):
        error = json.loads(pathlib.Path(folder, ERROR_NAME).read_text())
        raise ChildError(error["kind"], error["message"], written)
    last = written.strip().rpartition("\n")[2]
    raise ChildError(f"exit code {code}", last, written)
