"""Directories that appear whole or not at all, and what is read of them."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile


@contextlib.contextmanager
def new_directory(directory, overwrite, marker):
    """Writes a directory beside its final place, then renames it.

    Args:
        directory: str or path. The final place.
        overwrite: bool. Whether an existing directory may be replaced.
        marker: str. Name of the file that tells a directory of ours; only
            such a one, or an empty one, is ever replaced.

    Yields:
        A `pathlib.Path` to write into. An error or an interruption leaves
        nothing of it behind.

    Raises:
        ValueError: if the directory exists and may not be replaced, or is the
            working directory or above it.
        OSError: if it can't be written.
    """
    final = pathlib.Path(directory).resolve()
    if pathlib.Path.cwd().is_relative_to(final):
        raise ValueError(
            "The directory is renamed into its place, which can't be the "
            f"working directory or one above. Received: {str(directory)!r}"
        )
    if final.exists():
        ours = final.is_dir() and (
            (final / marker).exists() or not any(final.iterdir())
        )
        if not ours:
            raise ValueError(
                "The target must be new, empty or one that keras_dylora "
                f"wrote. Received: {str(final)!r}, which holds no {marker}"
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


def sha256(path):
    """The SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path):
    """The object in a JSON file, or a `ValueError` that names the file."""
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
