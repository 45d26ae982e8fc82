"""enable_dylora and disable_dylora: upgrade a live model, and undo that."""

import dataclasses
import warnings
from typing import Any

import keras

from keras_dylora import training
from keras_dylora.config import AdapterArguments, DyLoRAConfig
from keras_dylora.hints import meant
from keras_dylora.layers.low_rank import LowRankAdapter
from keras_dylora.layers.tokens import NAME
from keras_dylora.layers.tree import Tree
from keras_dylora.live.adaptation import Adaptation
from keras_dylora.live.live_class import to_dylora_class, to_original_class
from keras_dylora.live.model import DyLoRAModel, Model, adaptation_of
from keras_dylora.live.sizes import announcement
from keras_dylora.live.spec import Spec
from keras_dylora.live.targets import find_targets, listing

# Names of PEFT and Keras, and what they are called here.
OTHER_NAMES = {
    "r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "target_layers",
    "modules_to_save": "trainable_layers",
}


def _warn_of_quantized(tree, trained):
    quantized = [
        p for p in trained if tree.every[p].quantization_mode is not None
    ]
    if quantized:
        warnings.warn(
            "No gradient reaches a quantized kernel, so the layers that are "
            "trained in full should be float: quantize the model after it is "
            "enabled, or its backbone alone. "
            f"Received: quantized layers {listing(quantized)}",
            stacklevel=3,
        )


def enable_dylora(
    model: Model,
    config: DyLoRAConfig | None = None,
    verbose: int = 1,
    backbone: keras.Model | None = None,
    **overrides: Any,
) -> Model:
    """Upgrades a built Keras or KerasHub model to DyLoRA, in place.

    Each target layer gets an adapter, and no base weight is copied. The
    backbone is frozen, and the task head stays trainable. The model stays the
    same object and keeps its class, and becomes a `DyLoRAModel` too.

    Args:
        model: a built `keras.Model`, such as a
            `keras_hub.models.RobertaTextClassifier`.
        config: `DyLoRAConfig`. Defaults to `None`, a config of default values.
        verbose: `0` or `1`. Whether to print a line on what was adapted, what
            is trained and what was left out. Defaults to `1`.
        backbone: `keras.Model`. The pretrained part, for a functional model
            that was built from the inputs and outputs of that part. All layers
            outside of it are trained in full. Defaults to `None`:
            `model.backbone`, or the KerasHub backbones within the model.
        **overrides: fields of `DyLoRAConfig`, which take precedence.

    Returns:
        `model` itself. Compile it again to choose the optimizer. A model that
        was compiled before keeps its settings and gets a new optimizer state.

    Raises:
        TypeError: if `model` isn't a `keras.Model` or a field is unknown.
        ValueError: if the model isn't built or was enabled before, if no layer
            matches, if a pattern of `rank_pattern` has no layer of its own, if
            a matched layer can't be adapted, or if the model calls none of the
            matched layers. The model is unchanged then.

    Warns:
        UserWarning: if the model never calls a matched layer, which is then
            left out; or if the last layer stays frozen because no backbone is
            known and `trainable_layers` isn't set.

    Example:

    ```python
    clf = keras_hub.models.RobertaTextClassifier.from_preset(
        "roberta_base_en", num_classes=2
    )
    keras_dylora.enable_dylora(clf, rank=8, alpha=16)
    clf.compile(keras.optimizers.AdamW(4e-4), loss="...")
    clf.fit(texts, labels)
    ```

    Reference: [Valipour et al., 2022](https://arxiv.org/abs/2210.07558)
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            "`model` must be a `keras.Model`. "
            f"Received: model={model!r} (of type {type(model).__name__})"
        )
    if config is not None and not isinstance(config, DyLoRAConfig):
        raise TypeError(
            "`config` must be a `DyLoRAConfig`. "
            f"Received: config={config!r} (of type {type(config).__name__})"
        )
    unknown = [
        name
        for name in overrides
        if name not in DyLoRAConfig.__dataclass_fields__
    ]
    if unknown:
        fields = list(DyLoRAConfig.__dataclass_fields__)
        others = [OTHER_NAMES[name] for name in unknown if name in OTHER_NAMES]
        hint = (
            f", which are {others} here"
            if others
            else meant(unknown[0], fields)
        )
        raise TypeError(
            f"The arguments must be fields of `DyLoRAConfig`: {fields}. "
            f"Received: {unknown}{hint}"
        )
    config = dataclasses.replace(config or DyLoRAConfig(), **overrides)
    if not model.built:
        raise ValueError(
            "A model must be built before it is enabled: call it on data "
            f"once. Received: {model.name}, which isn't built"
        )
    tree = Tree(model)
    nested = [
        path
        for path, layer in tree.layers.items()
        if isinstance(layer, (LowRankAdapter, DyLoRAModel))
    ]
    if isinstance(model, DyLoRAModel) or nested:
        raise ValueError(
            "A model can be enabled once. Call `disable_dylora` first. "
            f"Received: {model.name}, with adapters at {listing(nested)}"
        )
    targets = find_targets(tree, config, backbone)
    line = upgrade(tree, config, targets)
    if verbose:
        print(line)
    return model


def upgrade(tree, config, targets):
    """Upgrades a model as its `Targets` say; returns a line about it."""
    model = tree.model
    _warn_of_quantized(tree, targets.trained)
    arguments = {
        path: AdapterArguments.of(config).at_most(targets.max_ranks[path])
        for path in targets.adapted
    }
    weights = [v for each in targets.trained.values() for v in each]
    spec = Spec.of(tree, arguments, weights, targets.trained)
    tokens = targets.tokens
    if tokens:
        config = dataclasses.replace(config, trainable_tokens=tokens.tokens)
        spec = spec.with_weight(tokens.path, NAME)
    adaptation = Adaptation(tree, config, spec, tokens)
    try:
        adaptation.apply(tree)
        adaptation.keep_head(tree)
        to_dylora_class(model, adaptation, DyLoRAModel)
        return announcement(tree, targets)
    except BaseException:
        to_original_class(model)
        adaptation.undo()
        raise


def disable_dylora(model: Model, restore_head: bool = False) -> Model:
    """Removes the adapters. The base weights are as they were before.

    Layers that were trained in full, such as a task head, keep their trained
    values unless `restore_head` is set. To keep what the adapters learned, use
    `merge`.

    Args:
        model: a model that `enable_dylora` returned.
        restore_head: bool. Whether the layers that were trained in full get
            back the values that they had before enabling. The model then
            computes what it did before. Defaults to `False`.

    Returns:
        `model` itself, with its original class.

    Raises:
        ValueError: if the model wasn't enabled; or if `restore_head` is set and
            the model was loaded from a file, which doesn't hold these values.

    Example:

    ```python
    keras_dylora.enable_dylora(clf, rank=8)
    keras_dylora.disable_dylora(clf)
    ```
    """
    adaptation = adaptation_of(model)
    if not adaptation.upgraded:
        raise ValueError(
            "The model must come from `enable_dylora`. Received: "
            f"{model.name}, which was built from DyLoRA layers"
        )
    training.write_back(model)
    if restore_head:
        adaptation.restore_head(Tree(model))
    to_original_class(model)
    adaptation.undo()
    return model
