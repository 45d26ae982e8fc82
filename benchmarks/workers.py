"""Competitors in processes of their own, asked in turn."""

import contextlib
import multiprocessing
import pathlib
import platform
import resource
import traceback

# Fresh interpreters: a forked TensorFlow or JAX hangs.
_spawn = multiprocessing.get_context("spawn")


class Worker:
    """A fresh process that runs one function on every request.

    Args:
        start: function of `arguments` that returns the function to ask. It
            and what is sent must be picklable.
        *arguments: of `start`.
    """

    def __init__(self, start, *arguments):
        self._connection, theirs = _spawn.Pipe()
        self._process = _spawn.Process(
            target=_serve, args=(theirs, start, arguments), daemon=True
        )
        self._process.start()
        theirs.close()

    def ask(self, *request):
        self._connection.send(request)
        failed, answer = self._connection.recv()
        if failed:
            raise RuntimeError(f"A benchmark's process failed:\n{answer}")
        return answer

    def close(self):
        self._connection.close()
        self._process.join(timeout=10)
        self._process.kill()


@contextlib.contextmanager
def workers(start, names, *arguments):
    """A `Worker` for each name, by name."""
    running = {}
    try:
        for name in names:
            running[name] = Worker(start, name, *arguments)
        yield running
    finally:
        for worker in running.values():
            worker.close()


def in_turn(running, rounds, *request):
    """Yields the answers of all workers by name, once for each round.

    There and back, so that a drift of the machine meets all alike.
    """
    names = list(running)
    for turn in range(rounds):
        order = names[:: -1 if turn % 2 else 1]
        yield {name: running[name].ask(*request) for name in order}


def import_packages(with_peft):
    """Imports what trains, before what a training holds is counted."""
    import keras_hub  # noqa: F401

    if with_peft:
        import peft  # noqa: F401
        import transformers  # noqa: F401


def _serve(connection, start, arguments):
    answer = None
    with contextlib.suppress(EOFError):
        while True:
            request = connection.recv()
            try:
                answer = answer or start(*arguments)
                connection.send((False, answer(*request)))
            except Exception:
                connection.send((True, traceback.format_exc()))


def peak_memory():
    """Bytes: the most that this process has held so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak():
    """On Linux: `held("VmHWM")` is the most from now on."""
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
