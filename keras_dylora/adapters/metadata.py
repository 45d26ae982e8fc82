"""The JSON beside an adapter's weights: configuration, format, SHA-256."""

import json

from keras_dylora import files
from keras_dylora.config import DyLoRAConfig

FORMAT_VERSION = 1


def write(path, weights, config):
    """Writes what `read` returns and checks.

    Args:
        path: path of the JSON file.
        weights: path of the file that it describes, already written.
        config: `DyLoRAConfig` of the adapter.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "config": config.get_config(),
        "sha256": files.sha256(weights),
    }
    path.write_text(json.dumps(content, indent=2))


def read(path, weights, writer, advice=""):
    """The `DyLoRAConfig` of an adapter whose weights are as they were written.

    Args:
        path: path of an existing JSON file.
        weights: path of the file that it describes.
        writer: str. The function that writes such files, for the message.
        advice: str. The way out where the weights are others.

    Raises:
        ValueError: if the file is damaged or from a newer format, or the
            weights aren't those that it names.
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
