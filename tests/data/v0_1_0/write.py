"""How keras_dylora 0.1.0 wrote the files beside this script.

Run from the root of a clone of 0.1.0, on TensorFlow, then on JAX and torch:
`KERAS_BACKEND=tensorflow python -m tests.data.v0_1_0.write`.
Each model file has an `.npz` with inputs, its outputs at every rank, its
place in the rank sequence and the ranks that it draws next.
"""

import pathlib

import keras
import numpy as np

import keras_dylora as kd
from tests.models import (
    classification_loss,
    gpt2,
    labels,
    mlp_data,
    randomize,
    randomize_adapters,
    roberta_classifier,
    tokens,
)

FOLDER = pathlib.Path(__file__).parent
NEXT = 6  # steps of training that a file is followed by


def trained(model, x, y, loss, optimizer, steps, **kwargs):
    kd.enable_dylora(model, rank=4, seed=7, **kwargs)
    randomize_adapters(model)
    return fitted(model, x, y, loss, optimizer, steps)


def fitted(model, x, y, loss, optimizer, steps):
    model.compile(optimizer, loss)
    for _ in range(steps):
        model.train_on_batch(x, y)
    model.set_rank(3)
    return model


def classifier(**kwargs):
    return trained(
        randomize(roberta_classifier(num_layers=1)),
        tokens(4),
        labels(4),
        classification_loss(),
        keras.optimizers.AdamW(1e-3),
        5,
        **kwargs,
    )


def hand_built():
    """Layers of its own, a distribution, two seeds of dropout, frozen."""
    inputs = keras.Input((10,))
    common = {"rank": 4, "alpha": 8, "min_rank": 2, "frozen": True}
    x = kd.DyLoRADense(12, "tanh", dropout=0.5, name="first", **common)(inputs)
    x = keras.layers.Dropout(0.5, name="drop")(x)
    x = kd.DyLoRADense(6, name="second", **common)(x)
    x = keras.layers.BatchNormalization(name="norm")(x)
    model = kd.DyLoRAModel(
        inputs,
        keras.layers.Dense(3, name="head")(x),
        rank_distribution=kd.Categorical({2: 1, 3: 2, 4: 1}),
        seed=3,
    )
    randomize_adapters(randomize(model))
    model.get_layer("norm").moving_variance.assign(np.full(6, 2.0))
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    return fitted(model, *mlp_data(4), "mse", optimizer, 5)


def nested():
    """A model of its own within another, each with a seed of dropout."""
    inner_inputs = keras.Input((10,))
    x = kd.DyLoRADense(12, rank=4, dropout=0.5, name="first")(inner_inputs)
    inner = kd.DyLoRAModel(inner_inputs, x, name="inner")
    inputs = keras.Input((10,))
    x = keras.layers.Dropout(0.5, name="drop")(inner(inputs))
    outputs = kd.DyLoRADense(3, rank=4, name="second")(x)
    model = randomize(kd.DyLoRAModel(inputs, outputs, seed=3))
    return fitted(model, *mlp_data(4), "mse", "sgd", 5)


def models():
    """Name to model, inputs and targets."""
    backend = keras.backend.backend()
    if backend != "tensorflow":
        yield f"hand_built_{backend}", hand_built(), *mlp_data(4)
        return
    x, y = tokens(4), labels(4)
    yield "sampled", classifier(rank_distribution="geometric"), x, y
    yield "frozen", classifier(frozen=True), x, y
    yield "summed", classifier(objective="summed"), x, y
    # Two of three micro-batches of an update are in.
    accumulating = trained(
        randomize(gpt2()),
        x,
        x["token_ids"],
        classification_loss(),
        keras.optimizers.AdamW(1e-3, gradient_accumulation_steps=3),
        5,
        frozen=True,
        target_layers="all-linear",
    )
    yield "accumulating", accumulating, x, x["token_ids"]
    quantized = classifier()
    quantized.quantize("int8")
    yield "quantized", quantized, x, y
    yield "hand_built", hand_built(), *mlp_data(4)
    yield "nested", nested(), *mlp_data(4)


def outputs(model, x):
    found = {}
    for rank in range(model.dylora_config.rank + 1):
        with model.rank_scope(rank):
            found[f"rank_{rank}"] = model.predict(x, verbose=0)
    return found


def main():
    for name, model, x, y in models():
        model.save(FOLDER / f"{name}.keras")
        if name == "frozen":
            model.save_weights(FOLDER / "frozen.weights.h5")
        expected = outputs(model, x)
        drawn = int(keras.ops.convert_to_numpy(model._ranks_drawn))
        logs = [
            model.train_on_batch(x, y, return_dict=True) for _ in range(NEXT)
        ]
        after = np.concatenate(
            [
                np.ravel(keras.ops.convert_to_numpy(v.value))
                for layer in model.dylora_layers
                for v in (layer.down, layer.up)
            ]
        )
        np.savez_compressed(
            FOLDER / f"{name}.npz",
            drawn=drawn,
            next_ranks=[int(x.get("rank", 0)) for x in logs],
            adapters_after=after,
            **expected,
        )
        if name in ("sampled", "hand_built"):
            kd.save_adapter(model, FOLDER / f"{name}_adapter", rank=2)
            np.savez_compressed(
                FOLDER / f"{name}_adapter.npz", **outputs(model, x)
            )
        if name in ("sampled", "accumulating"):
            kd.to_peft(model, FOLDER / f"{name}_peft", rank=2)
            np.savez_compressed(
                FOLDER / f"{name}_peft.npz", **outputs(model, x)
            )


if __name__ == "__main__":
    main()
