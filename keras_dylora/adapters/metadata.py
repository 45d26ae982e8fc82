"""The JSON beside an adapter's weights: configuration, format, SHA-256."""

import json

from keras_dylora import files
from keras_dylora.config import DyLoRAConfig

FORMAT_VERSION = 1


def write(path, weights, config):
    """Writes the `DyLoRAConfig` beside a file of weights that is written."""
    content = {
        "format_version": FORMAT_VERSION,
        "config": config.get_config(),
        "sha256": files.sha256(weights),
    }
    path.write_text(json.dumps(content, indent=2))


def read(path, weights, writer, advice=""):
    """The `DyLoRAConfig` of an adapter whose weights are as they were written.

    Raises a `ValueError` if the file is damaged or from a newer format, or if
    the weights aren't those that it names. The message names the function that
    writes such files, and the way out where the weights are others.
    """
    content = files.read_json(path)
    try:
        version, expected = content["format_version"], content["sha256"]
        if version > FORMAT_VERSION:
            raise ValueError(
                f"The adapter must be of format version {FORMAT_VERSION} or "
                "older; a newer keras_dylora wrote it. Received: "
                f"format_version={version}"
            )
        config = DyLoRAConfig.from_config(content["config"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path.name} must be one that `{writer}` wrote. "
            f"Received: {str(path)!r} ({error!r})"
        ) from error
    received = files.sha256(weights)
    if received != expected:
        raise ValueError(
            f"{weights.name} must have the SHA-256 that {path.name} names; the "
            f"file is damaged, changed or from another adapter. {advice}"
            f"Received: {received} instead of {expected}"
        )
    return config
