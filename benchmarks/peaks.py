"""The most memory that a process has held, or a card for it."""

import pathlib
import platform
import resource


def import_packages(with_peft):
    """Imports what trains, before what a training holds is counted."""
    import keras
    import keras_hub  # noqa: F401

    if keras.backend.backend() == "torch":
        import torch._inductor.compile_fx  # noqa: F401
    if with_peft:
        import peft  # noqa: F401
        import transformers  # noqa: F401


def peak_memory():
    """Bytes: the most that this process has held so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak():
    """Makes `held("VmHWM")` the most from now on, on Linux."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def held(name):
    """Bytes: `"VmRSS"` of this process on Linux, or its peak, `"VmHWM"`."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    line = next(x for x in lines if x.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def device():
    """The name of the card, and the most bytes it held for this process.

    Without a card, of the processor and this process.
    """
    import keras

    backend = keras.backend.backend()
    if backend == "torch":
        import torch

        if torch.cuda.is_available():
            return (
                torch.cuda.get_device_name(),
                torch.cuda.max_memory_allocated(),
            )
    elif backend == "jax":
        import jax

        card = jax.local_devices()[0]
        if card.platform != "cpu":
            return card.device_kind, card.memory_stats()["peak_bytes_in_use"]
    else:
        import tensorflow as tf

        cards = tf.config.list_physical_devices("GPU")
        if cards:
            details = tf.config.experimental.get_device_details(cards[0])
            peak = tf.config.experimental.get_memory_info("GPU:0")["peak"]
            return details["device_name"], peak
    return platform.processor() or platform.machine(), peak_memory()
