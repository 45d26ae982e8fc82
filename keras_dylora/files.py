"""Files that appear whole or not at all, and how they are read."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile


@contextlib.contextmanager
def new_directory(directory, overwrite, written):
    """Writes a directory beside its final place, then renames it.

    Yields the path to write into. After an error or an interruption, nothing of
    it is left. `written` is a function that takes the existing directory and
    returns the paths within it that keras_dylora wrote. A directory with
    anything else in it is never replaced: there is a `ValueError`.
    """
    final = pathlib.Path(directory).resolve()
    if pathlib.Path.cwd().is_relative_to(final):
        raise ValueError(
            "The directory is renamed into its place, which can't be the "
            f"working directory or one above. Received: {str(directory)!r}"
        )
    if final.exists():
        if not final.is_dir():
            raise ValueError(
                "The target must be a directory. "
                f"Received: {str(final)!r}, which is a file"
            )
        held = {
            x.relative_to(final) for x in final.rglob("*") if not x.is_dir()
        }
        others = held - {pathlib.Path(path) for path in written(final)}
        if others:
            raise ValueError(
                "The target must be new, empty or hold nothing but what "
                "keras_dylora wrote, all of which is replaced. "
                f"Received: {str(final)!r}, which holds {str(min(others))!r}"
            )
        if not overwrite and any(final.iterdir()):
            raise ValueError(
                "The directory exists; pass `overwrite=True` to replace it. "
                f"Received: {str(final)!r}"
            )
    final.parent.mkdir(parents=True, exist_ok=True)
    parent = tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent)
    try:
        fresh = pathlib.Path(parent, "new")
        fresh.mkdir()
        yield fresh
        old = pathlib.Path(parent, "old")
        try:
            if final.exists():
                os.replace(final, old)
            os.replace(fresh, final)
        except BaseException:
            if old.exists() and not final.exists():
                os.replace(old, final)
            raise
    finally:
        shutil.rmtree(parent, ignore_errors=True)


@contextlib.contextmanager
def new_file(path):
    """Writes a file beside its place, then renames it.

    Yields the path to write to, which has the same ending. An error leaves
    nothing there, and a process that is killed leaves no half-written file.
    """
    final = pathlib.Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    beside = final.with_name(f".partial-{os.getpid()}-{final.name}")
    try:
        yield beside
        os.replace(beside, final)
    finally:
        beside.unlink(missing_ok=True)


def together(marker, *others):
    """For `new_directory`: files that are ours if the first one is there."""

    def written(directory):
        return [marker, *others] if (directory / marker).exists() else []

    return written


def sha256(path):
    """The SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path):
    """Returns the object in a JSON file, or raises a `ValueError`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path.name} must be a JSON file. "
            f"Received: {str(path)!r} ({error})"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path.name} must hold a JSON object. Received: {str(path)!r}, "
            f"a {type(content).__name__}"
        )
    return content
