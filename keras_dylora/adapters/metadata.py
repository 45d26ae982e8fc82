"""The JSON file of an adapter: its configuration, model, ranks and SHA-256."""

import hashlib
import json

from keras_dylora import files
from keras_dylora.adapters.identity import Identity
from keras_dylora.config import DyLoRAConfig

FORMAT_VERSION = 3  # of files with tuned cuts; all others have version 2


def write(path, weights, adapter):
    """Writes the parts of `AdapterWeights` that aren't tensors."""
    content = {
        "format_version": FORMAT_VERSION if adapter.cuts else 2,
        "config": adapter.config.get_config(),
        "model": adapter.identity.get_config(),
        "sha256": files.sha256(weights),
    }
    if len(set(adapter.ranks.values())) > 1:
        content["ranks"] = adapter.ranks
    content["sha256_of_this"] = _sha256(content)
    path.write_text(json.dumps(content, indent=2))


def read(path, weights, writer, advice=""):
    """Reads the `DyLoRAConfig`, the `Identity` and the ranks of an adapter.

    The identity is `None` in files of format 1. The ranks are `None` if all
    layers have the rank of the config. Raises a `ValueError` if a file is
    damaged or from a newer format. `writer` is the name of the function that
    writes such files. `advice` says what to do if the weights have changed.
    """
    content = files.read_json(path)
    identity = None
    try:
        version, expected = content["format_version"], content["sha256"]
        if version > FORMAT_VERSION:
            raise ValueError(
                f"The adapter must be of format version {FORMAT_VERSION} or "
                "older; a newer keras_dylora wrote it. Received: "
                f"format_version={version}"
            )
        if version > 1:
            mine = content.pop("sha256_of_this")
            if mine != _sha256(content):
                raise ValueError(
                    f"{path.name} must be as `{writer}` wrote it; it is "
                    f"damaged or changed. Received: {str(path)!r}"
                )
            identity = Identity.from_config(content["model"])
        config = DyLoRAConfig.from_config(content["config"])
        ranks = content.get("ranks")
    except (AttributeError, KeyError, TypeError) as error:
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
    return config, identity, ranks


def _sha256(content):
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
