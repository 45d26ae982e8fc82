"""Results of runs: one JSON line each, so that none is run twice."""

import json
import os
import pathlib
import warnings


class Results:
    """A file of finished runs, each found again by its key.

    A line that isn't a run (a crash in the middle of a write, an edit by
    hand) is skipped with a warning, so that run alone is run again.

    Args:
        path: file of JSON lines. It needn't exist.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self._runs = {}
        if not self.path.exists():
            return
        lines = self.path.read_text().splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                run = json.loads(line)
                self._runs[_name(run["key"])] = run["result"]
            except (ValueError, TypeError, KeyError):
                warnings.warn(
                    f"Line {number} of {self.path} must be a JSON object "
                    f"with `key` and `result`, and is skipped. "
                    f"Received: {line[:60]!r}",
                    stacklevel=2,
                )

    def get(self, key):
        """The result of the run with exactly this key, or `None`."""
        return self._runs.get(_name(key))

    def add(self, key, result):
        """Appends a finished run."""
        line = json.dumps({"key": key, "result": result}) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            # A line that was cut short must not swallow this one.
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = "\n" + line
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self._runs[_name(key)] = json.loads(line)["result"]


def _name(key):
    return json.dumps(key, sort_keys=True)
