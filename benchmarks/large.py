"""A Llama of a billion parameters: time and memory of what is done to it."""

import contextlib
import gc
import pathlib
import tempfile
import threading
import time

import psutil

from benchmarks import grid, table
from benchmarks.peaks import forget_peak, held

RANK = 8
# That of a TinyLlama, and what a test can do with.
SIZES = {
    "llama-1b": {
        "vocabulary_size": 32_000,
        "num_layers": 22,
        "num_query_heads": 32,
        "num_key_value_heads": 4,
        "hidden_dim": 2_048,
        "intermediate_dim": 5_632,
    },
    "tiny": {
        "vocabulary_size": 4_000,
        "num_layers": 4,
        "num_query_heads": 4,
        "num_key_value_heads": 2,
        "hidden_dim": 256,
        "intermediate_dim": 512,
    },
}


# Each in a fresh process: some allocators keep what was let go, and what is
# held next would be found there.
GROUPS = (
    (
        "enable_dylora",
        "order_ranks",
        "save_adapter",
        "load_adapter",
        "to_peft",
        "from_peft",
        "disable_dylora",
    ),
    ("merge",),
    ("export_ranks",),
    ("a second model, by itself",),
)
COLUMNS = {
    "": lambda row: row["name"],
    "seconds": lambda row: f"{row['seconds']:.2f}",
    "over the base": lambda row: f"{row['over_base']:.3f}",
}


def main(args):
    groups = grid.measured(
        args, Operations, GROUPS, SIZES[args.size], rounds=0, alone=True
    )
    rows = [row for group in groups for row in group["operations"]]
    table.write(
        args,
        [
            f"{rows[0]['parameters']:,} parameters in bfloat16",
            table.of_rows(COLUMNS, rows),
        ],
        {row["name"]: row["over_base"] for row in rows},
        "peak memory over the base's",
        data=rows,
    )


class Operations(grid.Cell):
    """Operations on one model, one after the other.

    `over_base` is 1 and the bytes held beside the base, over the base's.
    """

    def prepare(self, steps):
        import keras_hub

        import keras_dylora as kd

        def new_model():
            backbone = keras_hub.models.LlamaBackbone(
                **self.size, dtype="bfloat16"
            )
            return keras_hub.models.LlamaCausalLM(backbone, preprocessor=None)

        model = new_model()
        parameters = model.count_params()
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            own, peft, served = (pathlib.Path(folder, x) for x in "ops")
            calls = {
                "enable_dylora": lambda: kd.enable_dylora(model, rank=RANK),
                "order_ranks": lambda: kd.order_ranks(model),
                "save_adapter": lambda: kd.save_adapter(model, own),
                "load_adapter": lambda: kd.load_adapter(model, own),
                "to_peft": lambda: kd.to_peft(model, peft),
                "from_peft": lambda: kd.from_peft(model, peft),
                "disable_dylora": lambda: kd.disable_dylora(model),
                "merge": lambda: kd.merge(model, RANK),
                "export_ranks": lambda: kd.export_ranks(
                    model, served, verify=False
                ),
                "a second model, by itself": new_model,
            }
            if "enable_dylora" not in self.name:
                calls["enable_dylora"]()
            for name in self.name:
                seconds, held = _measured(calls[name])
                rows.append(
                    {
                        "name": name,
                        "seconds": seconds,
                        "over_base": 1 + held / (2 * parameters),
                        "parameters": parameters,
                    }
                )
                print(rows[-1], flush=True)
        return {"operations": rows}


def _measured(call):
    """Seconds, and the most bytes that were held beside those of before.

    Both are of this process and of those that it waits for, at one time.
    """
    gc.collect()
    forget_peak()
    before, done, most = held("VmRSS"), threading.Event(), [0]
    sampler = threading.Thread(target=_sample, args=(done, most))
    sampler.start()
    start = time.perf_counter()
    try:
        call()
    finally:
        seconds = time.perf_counter() - start
        done.set()
        sampler.join()
    return seconds, max(held("VmHWM"), *most) - before


def _sample(done, most):
    """Appends the bytes of this process and its children, while it has any."""
    this = psutil.Process()
    while not done.wait(0.01):
        with contextlib.suppress(psutil.NoSuchProcess):
            children = this.children(recursive=True)
            if children:
                every = [this, *children]
                most.append(sum(x.memory_info().rss for x in every))
