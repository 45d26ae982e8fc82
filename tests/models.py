"""Small models and data for the tests."""

import keras
import keras_hub
import numpy as np

import keras_dylora as kd
from keras_dylora.layers.tuned import TunedCut

VOCABULARY = 97


def randomize(model, seed=0, scale=0.3):
    """Gives every weight a NumPy-made value: the same on every backend."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        value = rng.normal(size=weight.shape) * scale
        weight.assign(value.astype("float32"))
    return model


def randomize_adapters(model, seed=1, scale=0.2):
    """Gives the up projections values: at zero, every rank is the base."""
    rng = np.random.default_rng(seed)
    for layer in model.dylora_layers:
        for weight in (layer.down, layer.up):
            value = rng.normal(size=weight.shape) * scale
            weight.assign(value.astype("float32"))
    return model


def allocation(model, ranks):
    """A rank for each adapted layer, in order; 1 for those that are left."""
    paths = model._dylora.layers
    by_path = dict(zip(paths, ranks, strict=False))
    return kd.RankAllocation.of(model, {p: by_path.get(p, 1) for p in paths})


def with_tuned_cuts(model, *ranks, seed=7):
    """Gives a model cuts of values that no tuning would find."""
    rng, cuts = np.random.default_rng(seed), []
    layers, high = model._dylora.layers, model.dylora_config.rank
    for each in ranks:
        by_path = (
            each if hasattr(each, "items") else dict.fromkeys(layers, each)
        )
        left, right = (
            {p: rng.normal(size=(high, b)) for p, b in by_path.items()}
            for _ in range(2)
        )
        cuts.append(
            TunedCut(
                {p: x.astype("float32") for p, x in left.items()},
                {p: x.T.astype("float32") for p, x in right.items()},
            )
        )
    model._dylora.set_tuned_cuts(cuts)
    return model


def mlp(
    frozen=False, rank=4, seed=0, options=None, model=kd.DyLoRAModel, **kwargs
):
    """A functional model of two adapted layers and a trained head.

    `options` are the model's, `kwargs` its layers'.
    """
    inputs = keras.Input((10,))
    common = {"rank": rank, "alpha": 8, "frozen": frozen, **kwargs}
    x = kd.DyLoRADense(12, "tanh", name="first", **common)(inputs)
    x = kd.DyLoRADense(6, name="second", **common)(x)
    outputs = keras.layers.Dense(3, name="head")(x)
    return model(inputs, outputs, seed=seed, **options or {})


class BuiltLate(kd.DyLoRAModel):
    """A model that makes its layer late: on TensorFlow in its first step."""

    def build(self, input_shape):
        self.dense = kd.DyLoRADense(3, rank=3)
        self.dense.build(input_shape)

    def call(self, inputs):
        return self.dense(inputs)


def mlp_data(size=64, seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(size, 10)).astype("float32"),
        rng.normal(size=(size, 3)).astype("float32"),
    )


def roberta_backbone(dropout=0.0, **kwargs):
    return keras_hub.models.RobertaBackbone(
        **{
            "vocabulary_size": VOCABULARY,
            "num_layers": 2,
            "num_heads": 2,
            "hidden_dim": 16,
            "intermediate_dim": 24,
            "max_sequence_length": 12,
            "dropout": dropout,
            **kwargs,
        }
    )


def roberta_classifier(dropout=0.0, preprocessor=None, **kwargs):
    return keras_hub.models.RobertaTextClassifier(
        roberta_backbone(dropout, **kwargs),
        num_classes=2,
        dropout=dropout,
        preprocessor=preprocessor,
    )


def gpt2(dropout=0.0, preprocessor=None):
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=VOCABULARY,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=24,
        max_sequence_length=16,
        dropout=dropout,
    )
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor=preprocessor)


def tokens(size=32, length=8, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, length + 1, size)
    mask = np.arange(length) < lengths[:, None]
    ids = rng.integers(1, VOCABULARY, (size, length)) * mask
    return {"token_ids": ids.astype("int32"), "padding_mask": mask}


def labels(size=32, seed=1):
    return np.random.default_rng(seed).integers(0, 2, size).astype("int32")


def classification_loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def enabled(**arguments):
    model = randomize(roberta_classifier(), scale=0.1)
    kd.enable_dylora(model, rank=4, verbose=0, **arguments)
    return randomize_adapters(model)


def progressive_mlp(steps, **options):
    options = {"full_rank_steps": steps, **options}
    return randomize(mlp(scaling="constant", options=options))
