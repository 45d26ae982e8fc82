"""How keras_dylora wrote the files beside this script, before `Spec`.

These files hold what files of 0.1.0 don't: several adapters, trained layers
with statistics, layers frozen by a flag, a progressive run, allocations. Run
from the root of a clone of the commit a0a85a2, on TensorFlow:
`KERAS_BACKEND=tensorflow python -m tests.data.before_spec.write`.
Each file has an `.npz` with its outputs at every rank, by the adapter's name.
"""

import pathlib

import keras
import numpy as np

import keras_dylora as kd
from tests.models import (
    allocation,
    classification_loss,
    gpt2,
    labels,
    mlp,
    mlp_data,
    randomize,
    randomize_adapters,
    roberta_classifier,
    tokens,
)

FOLDER = pathlib.Path(__file__).parent


def network():
    """A plain functional model with statistics in base and head."""
    inputs = keras.Input((10,))
    x = keras.layers.Dense(12, "tanh", name="first")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Dense(6, name="second")(x)
    head = keras.Sequential(
        [keras.layers.Dense(5, "relu"), keras.layers.BatchNormalization()],
        name="head",
    )
    outputs = keras.layers.Dense(3, name="last")(head(x))
    return positive(randomize(keras.Model(inputs, outputs)))


def positive(model):
    """Gives moving variances values that a variance can have."""
    for weight in model.weights:
        if "variance" in weight.path:
            weight.assign(np.abs(keras.ops.convert_to_numpy(weight)) + 0.5)
    return model


def enabled(model, x, y, loss, seed=7, steps=3, **kwargs):
    kd.enable_dylora(model, rank=4, seed=seed, verbose=0, **kwargs)
    randomize_adapters(model, seed)
    model.compile(keras.optimizers.Adam(1e-3), loss)
    for _ in range(steps):
        model.train_on_batch(x, y)
    return model


def in_head(**kwargs):
    return enabled(
        network(),
        *mlp_data(8),
        "mse",
        target_layers=["first", "second"],
        trainable_layers=["head", "last"],
        **kwargs,
    )


def several():
    """Two adapters beside the live one, of which one has a lower rank."""
    model = in_head()
    kd.save_adapter(model, FOLDER / "cut_adapter", rank=2)
    model.add_adapter("second")
    randomize_adapters(model, 3)
    model.train_on_batch(*mlp_data(8))
    kd.load_adapter(model, FOLDER / "cut_adapter", name="cut")
    model.set_adapter("second")
    model.set_rank(3)
    return model


def frozen_by_flag():
    model = in_head()
    model.get_layer("last").trainable = False
    return model


def progressive(steps):
    """A classifier of which the order is before or still to come."""
    config = kd.DyLoRAConfig.progressive(2, rank=4, seed=5)
    model = randomize(roberta_classifier(num_layers=1))
    kd.enable_dylora(model, config, verbose=0)
    randomize_adapters(model)
    model.compile(keras.optimizers.AdamW(1e-3), classification_loss())
    model.fit(tokens(4 * steps), labels(4 * steps), batch_size=4, verbose=0)
    return model


def truncated():
    model = in_head()
    kd.truncate(model, allocation(model, [1, 3]))
    return model


def causal_lm():
    x = tokens(4)
    return enabled(
        randomize(gpt2()),
        x,
        x["token_ids"],
        classification_loss(),
        target_layers="all-linear",
    )


MODELS = {
    "several": (several, mlp_data(4)[0]),
    "frozen_by_flag": (frozen_by_flag, mlp_data(4)[0]),
    "before_order": (lambda: progressive(1), tokens(4)),
    "after_order": (lambda: progressive(4), tokens(4)),
    "truncated": (truncated, mlp_data(4)[0]),
    "hand_built": (
        lambda: positive(randomize(mlp(dropout=0.5))),
        mlp_data(4)[0],
    ),
}


def outputs(model, x):
    """Outputs at every rank of every adapter, and trained weights as flags."""
    active, found = model.active_adapter, {}
    for name in model.adapter_names:
        model.set_adapter(name)
        for rank in range(
            1 + min(model.dylora_config.rank, 2 if name == "cut" else 4)
        ):
            with model.rank_scope(rank):
                found[f"{name}/{rank}"] = model.predict(x, verbose=0)
    model.set_adapter(active)
    found["trainable"] = [w.trainable for w in model.weights]
    return found


def main():
    for name, (make, x) in MODELS.items():
        model = make()
        model.save(FOLDER / f"{name}.keras")
        model.save_weights(FOLDER / f"{name}.weights.h5")
        np.savez_compressed(FOLDER / f"{name}.npz", **outputs(model, x))
    model = in_head()
    small = allocation(model, [1, 3])
    model.set_rank(small)
    kd.save_adapter(model, FOLDER / "allocated_adapter", rank=small)
    np.savez_compressed(
        FOLDER / "allocated_adapter.npz",
        expected=model.predict(mlp_data(4)[0], verbose=0),
    )
    model = causal_lm()
    small = allocation(model, [1, 3, 0, 4])
    model.set_rank(small)
    kd.to_peft(model, FOLDER / "allocated_peft", rank=small)
    np.savez_compressed(
        FOLDER / "allocated_peft.npz",
        expected=model.predict(tokens(4), verbose=0),
    )


if __name__ == "__main__":
    main()
