"""A Llama of a billion parameters: time and memory of what is done to it."""

import contextlib
import gc
import pathlib
import tempfile
import threading
import time

import psutil

from benchmarks import table
from benchmarks.workers import forget_peak, held, workers
from examples import markdown

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


def main(args):
    rows = []
    for names in GROUPS:
        with workers(start, [names], args.size) as running:
            parameters, found = running[names].ask()
        rows += found
    table.write(
        args,
        [
            f"{parameters:,} parameters in bfloat16",
            markdown.table(
                ("", "seconds", "over the base"),
                [(n, f"{s:.2f}", f"{m:.3f}") for n, s, m in rows],
            ),
        ],
        {name: memory for name, _, memory in rows},
        "peak memory over the base's",
        data=[
            {"name": n, "seconds": s, "over_base": m, "parameters": parameters}
            for n, s, m in rows
        ],
    )


def start(names, size):
    return lambda: measure(SIZES[size], names)


def measure(size, names):
    """The parameters of the model, and `(name, seconds, memory)` of each.

    The memory is 1 and what was held beside the base, in bases.
    """
    import keras_hub

    import keras_dylora as kd

    def new_model():
        backbone = keras_hub.models.LlamaBackbone(**size, dtype="bfloat16")
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
        if "enable_dylora" not in names:
            calls["enable_dylora"]()
        for name in names:
            seconds, held = _measured(calls[name])
            rows.append((name, seconds, 1 + held / (2 * parameters)))
            print(*rows[-1], flush=True)
    return parameters, rows


def _measured(call):
    """Seconds, and the most bytes that were held beside those of before.

    At one time, in this process and in those that it waits for.
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
    """Appends what this process holds while it has children, with theirs."""
    this = psutil.Process()
    while not done.wait(0.01):
        with contextlib.suppress(psutil.NoSuchProcess):
            children = this.children(recursive=True)
            if children:
                every = [this, *children]
                most.append(sum(x.memory_info().rss for x in every))
