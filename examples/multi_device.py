"""Train on several devices: the same ranks and weights as on one.

Every replica draws from one seeded sequence, so all of them train at the same
rank in every step, and put columns in the same order. Where each example has a
rank (`--method progressive`), MirroredStrategy and DDP draw for each replica's
part of a batch, as often each rank as its probability says. Run on this
machine's CPU, each way of its backend:

    KERAS_BACKEND=jax python -m examples.multi_device data_parallel
    KERAS_BACKEND=jax python -m examples.multi_device model_parallel
    KERAS_BACKEND=tensorflow python -m examples.multi_device mirrored
    KERAS_BACKEND=torch python -m examples.multi_device ddp

It prints the ranks and how far the weights are from those of one device.
"""

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

WAYS = {
    "data_parallel": "jax",
    "model_parallel": "jax",
    "mirrored": "tensorflow",
    "ddp": "torch",
}
# Eight devices out of one CPU; read when JAX starts.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import keras  # noqa: E402
import keras_hub  # noqa: E402
import numpy as np  # noqa: E402

import keras_dylora as kd  # noqa: E402

BATCH, STEPS = 16, 10
FIELDS = {"rank": 4, "alpha": 16.0, "seed": 3}
METHODS = {
    "dylora": kd.DyLoRAConfig(**FIELDS),
    "dylora-frozen": kd.DyLoRAConfig(frozen=True, **FIELDS),
    "summed": kd.DyLoRAConfig(objective="summed", **FIELDS),
    "progressive": kd.DyLoRAConfig.progressive(round(0.4 * STEPS), **FIELDS),
}


def classifier(method):
    """A small, seeded text classifier, enabled and compiled."""
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.RobertaBackbone(
        vocabulary_size=100,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=32,
        max_sequence_length=8,
        dropout=0.0,
    )
    model = keras_hub.models.RobertaTextClassifier(
        backbone, num_classes=2, preprocessor=None, dropout=0.0
    )
    kd.enable_dylora(model, METHODS[method], verbose=0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(1e-3), loss)
    return model


def batches(shard=0, shards=1):
    """Token ids and labels, or the part of every batch that is a shard's."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 100, (STEPS, BATCH, 8)).astype("int32")
    labels = rng.integers(0, 2, (STEPS, BATCH)).astype("int32")
    own = slice(BATCH // shards * shard, BATCH // shards * (shard + 1))
    ids = ids[:, own].reshape(-1, 8)
    # Not in bool: to build the model's metrics, Keras adds up the replicas'
    # parts of the first batch.
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    return x, labels[:, own].reshape(-1)


def fit(model, shard=0, shards=1):
    """Trains one epoch; returns the steps' ranks and the trained weights."""
    drawn = []
    callback = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda step, logs: drawn.append(logs.get("rank"))
    )
    x, y = batches(shard, shards)
    model.fit(
        x, y, batch_size=BATCH // shards, shuffle=False, verbose=0,
        callbacks=[callback],
    )  # fmt: skip
    return [int(rank) for rank in drawn if rank is not None], [
        keras.ops.convert_to_numpy(v) for v in model.trainable_variables
    ]


def data_parallel(method):
    """JAX: every device has all weights and a part of each batch."""
    distribution = keras.distribution.DataParallel(auto_shard_dataset=False)
    with distribution.scope():
        return fit(classifier(method))


def model_parallel(method):
    """JAX: the kernels and the adapters are split as well."""
    mesh = keras.distribution.DeviceMesh((4, 2), ["batch", "model"])
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*(query|key|value)/kernel"] = (None, "model", None)
    layouts[".*(query|key|value)/up"] = (None, "model")
    layouts[".*feedforward_intermediate_dense/kernel"] = (None, "model")
    layouts[".*feedforward_output_dense/kernel"] = ("model", None)
    distribution = keras.distribution.ModelParallel(
        layout_map=layouts, batch_dim_name="batch", auto_shard_dataset=False
    )
    with distribution.scope():
        model = classifier(method)
        kernel = model.dylora_layers[0].kernel.value
        assert not kernel.sharding.is_fully_replicated
        return fit(model)


def mirrored(method):
    """TensorFlow: one copy of the model on each of two devices."""
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * 2
    )
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model = classifier(method)
    return fit(model)


def ddp(method):
    """torch: two processes, each with a part of every batch."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
        free.close()
        command = [
            sys.executable, "-m", "examples.multi_device", "ddp",
            "--folder", folder, "--method", method,
        ]  # fmt: skip
        processes = [
            subprocess.Popen(
                command,
                env={
                    **os.environ,
                    "MASTER_ADDR": "localhost",
                    "MASTER_PORT": str(port),
                    "WORLD_SIZE": "2",
                    "RANK": str(i),
                },
            )
            for i in range(2)
        ]
        if any([process.wait() for process in processes]):
            raise RuntimeError("A process of the training failed.")
        results = [np.load(pathlib.Path(folder) / f"{i}.npz") for i in range(2)]
        zero, one = ([data[key] for key in data.files] for data in results)
    for a, b in zip(zero, one, strict=True):
        np.testing.assert_array_equal(a, b)
    return zero[0].tolist(), zero[1:]


def ddp_process(folder, method):
    """A process of `ddp`, as `torchrun` would start it.

    `fit` calls the model and not a `DistributedDataParallel` around it, which
    would average nothing. So each gradient is averaged as it is computed.
    """
    import torch.distributed as dist

    dist.init_process_group("gloo")
    model = classifier(method)

    def average(parameter):
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()

    for variable in model.trainable_variables:
        variable.value.register_post_accumulate_grad_hook(average)
    rank = dist.get_rank()
    drawn, weights = fit(model, rank, dist.get_world_size())
    np.savez(pathlib.Path(folder) / f"{rank}.npz", np.array(drawn), *weights)
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ways", nargs="+", choices=WAYS, metavar="way")
    parser.add_argument("--method", default="dylora", choices=METHODS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    backend = keras.backend.backend()
    for way in args.ways:
        if backend != WAYS[way]:
            raise SystemExit(
                f"Keras has {way!r} on the {WAYS[way]} backend only. "
                f"Received: KERAS_BACKEND={backend}"
            )
    if args.folder:
        ddp_process(args.folder, args.method)
        return
    # First, as TensorFlow and JAX must find their devices.
    results = {way: globals()[way](args.method) for way in args.ways}
    expected_ranks, expected = fit(classifier(args.method))
    for way, (ranks, weights) in results.items():
        differences = [
            np.abs(a - b).max() for a, b in zip(weights, expected, strict=True)
        ]
        result = {
            "way": way,
            "ranks": ranks,
            "ranks_of_one_device": expected_ranks,
            "difference": float(max(differences)),
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
