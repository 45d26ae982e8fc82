"""manifest.json: the content of an export, its makers and its exactness."""

import importlib.metadata
import json

import keras

from keras_dylora import files
from keras_dylora.version import __version__

FORMAT_VERSION = 1
NAME = "manifest.json"


def write(folder, config, plan, verified, metrics, layers):
    """Writes the manifest of the artifacts in a folder.

    Args:
        folder: `pathlib.Path`.
        config: `DyLoRAConfig` of the model.
        plan: `Plan`.
        verified: the result of `verify`, or `None`.
        metrics: dict of rank, as the input `rank`, to its metrics, or `None`.
        layers: dict of path to adapted layer.
    """
    contents = {
        str(path.relative_to(folder)): {
            "bytes": path.stat().st_size,
            "sha256": files.sha256(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    # Find the distribution that has TensorFlow, without importing it.
    distribution = importlib.metadata.packages_distributions()["tensorflow"][0]
    manifest = {
        "format_version": FORMAT_VERSION,
        "format": plan.format,
        "layout": plan.layout,
        "ranks": [x.value for x in plan.ranks],
        "names": {x.name: x.value for x in plan.ranks},
        "adapters": {x.name: x.rank for x in plan.adapters},
        "allocations": {
            x.name: x.ranks(layers) for x in plan.ranks if x.by_layer
        },
        "alpha": config.alpha,
        "scaling": config.scaling,
        "dtype": plan.dtype,
        "signatures": _signatures(plan),
        "bytes": sum(x["bytes"] for x in contents.values()),
        "files": contents,
        "largest_difference": verified,
        "metrics": metrics,
        "versions": {
            "keras_dylora": __version__,
            "keras": keras.__version__,
            "tensorflow": importlib.metadata.version(distribution),
            "backend": keras.backend.backend(),
        },
    }
    (folder / NAME).write_text(json.dumps(manifest, indent=2))


def written(directory):
    """The paths of the files that an export wrote into a directory."""
    path = directory / NAME
    content = files.read_json(path) if path.exists() else {}
    if "keras_dylora" not in content.get("versions", {}):
        return []
    return [NAME, *content.get("files", ())]


def _signatures(plan):
    """The inputs of each signature, as `{name: [dtype, shape]}`.

    The shapes of `rank` and `adapter` are `None`, as they are a scalar or one
    value for each example.
    """
    own = {x.name: [x.dtype, list(x.shape)] for x in plan.inputs.specs}
    prompt = {**own, "end_token_id": ["int32", []]}
    rank = {"rank": ["int32", None]}
    text = {"text": ["string", [None]]}
    if plan.layout == "merged":
        found = {"serve": own}
        found |= {"serve_text": text} if plan.text else {}
        return found | ({"generate": prompt} if plan.generate else {})
    names = [served.name for served in plan.ranks]
    if plan.adapters:
        adapter = {"adapter": ["string", None]}
        own, prompt, text = own | adapter, prompt | adapter, text | adapter
    found = dict.fromkeys(names, own) | {"serve": own | rank}
    if plan.text:
        found["serve_text"] = text | rank
    if plan.generate:
        found |= {f"generate_{name}": prompt for name in names}
        found["generate"] = prompt | rank
    return found
