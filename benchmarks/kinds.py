"""Steps of embeddings and convolutions, beside Keras's own LoRA."""

import time

import numpy as np

from benchmarks import grid, table
from benchmarks.competitors import RANK
from benchmarks.peaks import forget_peak, held, import_packages

EMBEDDING, CONVOLUTIONS = "embedding", "convolutions"
OURS, KERAS = "DyLoRA", f"Keras LoRA {RANK}"
NAMES = [f"{who}, {kind}" for kind in (EMBEDDING, CONVOLUTIONS)
         for who in (OURS, KERAS)]  # fmt: skip


def embedding(size):
    """The table of GPT-2, or a tiny one, and a head."""
    import keras

    vocabulary, hidden = (50257, 768) if size != "tiny" else (100, 8)
    ids = keras.Input((64,), dtype="int32")
    x = keras.layers.Embedding(vocabulary, hidden, name="table")(ids)
    x = keras.layers.GlobalAveragePooling1D()(x)
    model = keras.Model(ids, keras.layers.Dense(2, name="head")(x))
    rng = np.random.default_rng(0)
    return model, lambda rows: rng.integers(0, vocabulary, (rows, 64)), 16


def convolutions(size):
    """A ResNet-50, or a tiny one, and a head."""
    import keras
    import keras_hub

    blocks = [3, 4, 6, 3] if size != "tiny" else [1, 1]
    widths = [64, 128, 256, 512][: len(blocks)]
    side = 96 if size != "tiny" else 16
    backbone = keras_hub.models.ResNetBackbone(
        input_conv_filters=[widths[0]],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=widths,
        stackwise_num_blocks=blocks,
        stackwise_num_strides=[1, *[2] * (len(blocks) - 1)],
        block_type="bottleneck_block",
        image_shape=(side, side, 3),
    )
    x = keras.layers.GlobalAveragePooling2D()(backbone.output)
    outputs = keras.layers.Dense(2, name="head")(x)
    model = keras.Model(backbone.input, outputs)
    rng = np.random.default_rng(0)
    shape = side, side, 3
    return model, lambda rows: rng.normal(size=(rows, *shape)), 8


MODELS = {EMBEDDING: embedding, CONVOLUTIONS: convolutions}


class KindOfLayer(grid.Cell):
    """Steps of a model whose layers of one kind have an adapter."""

    def __init__(self, name, size):
        import keras

        import keras_dylora as kd

        super().__init__(name, size)
        import_packages(with_peft=False)
        self.before = held("VmRSS")
        who, kind = name.split(", ")
        keras.utils.set_random_seed(0)
        self.model, self.inputs, self.batch = MODELS[kind](size)
        if who == OURS:
            targets = "table" if kind == EMBEDDING else "all-conv"
            kd.enable_dylora(
                self.model,
                rank=RANK,
                target_layers=targets,
                trainable_layers="head",
                verbose=0,
            )
        else:
            for layer in self.model.layers:
                if layer.name == "head":
                    continue
                layer.trainable = False
                if hasattr(layer, "enable_lora"):
                    layer.trainable = True
                    layer.enable_lora(RANK)
                    if getattr(layer, "bias", None) is not None:
                        layer.bias.trainable = False
        self.model.compile(
            keras.optimizers.AdamW(1e-3),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )

    def prepare(self, steps):
        self.measure(steps)
        forget_peak()  # of what was built and compiled
        trained = self.model.trainable_variables
        return {"parameters": sum(int(np.prod(v.shape)) for v in trained)}

    def measure(self, steps):
        rows = steps * self.batch
        x, y = self.inputs(rows), np.arange(rows) % 2
        start = time.perf_counter()
        self.model.fit(x, y, batch_size=self.batch, shuffle=False, verbose=0)
        return {
            "seconds": (time.perf_counter() - start) / steps,
            "memory": held("VmHWM") - self.before,
        }


def main(args):
    names = [name for name in NAMES if args.over in name.split(", ")[1]]
    rows = grid.measured(
        args, KindOfLayer, names, args.size, processes=args.processes
    )
    kinds = (EMBEDDING, CONVOLUTIONS)
    ratios = [
        (f"{OURS}, {kind}", f"{KERAS}, {kind}", 1)
        for kind in kinds
        if f"{OURS}, {kind}" in names
    ]
    table.write_step_times(args, rows, ratios, memory=True)
