"""Objects in processes of their own, asked from here."""

import contextlib
import multiprocessing
import traceback

# Fresh interpreters: a forked TensorFlow or JAX hangs.
_spawn = multiprocessing.get_context("spawn")


class Worker:
    """A fresh process that holds one object and calls its methods.

    Args:
        make: function of `arguments` that returns the object. It and what is
            sent must be picklable.
        *arguments: of `make`.
    """

    def __init__(self, make, *arguments):
        self._connection, theirs = _spawn.Pipe()
        self._process = _spawn.Process(
            target=_serve, args=(theirs, make, arguments), daemon=True
        )
        self._process.start()
        theirs.close()

    def ask(self, method, *arguments):
        self._connection.send((method, arguments))
        failed, answer = self._connection.recv()
        if failed:
            raise RuntimeError(f"A benchmark's process failed:\n{answer}")
        return answer

    def close(self):
        self._connection.close()
        self._process.join(timeout=10)
        self._process.kill()


@contextlib.contextmanager
def workers(make, names, *arguments):
    """A `Worker` for each name, by name."""
    running = {}
    try:
        for name in names:
            running[name] = Worker(make, name, *arguments)
        yield running
    finally:
        for worker in running.values():
            worker.close()


def _serve(connection, make, arguments):
    held = None
    with contextlib.suppress(EOFError):
        while True:
            method, given = connection.recv()
            try:
                held = held or make(*arguments)
                connection.send((False, getattr(held, method)(*given)))
            except Exception:
                connection.send((True, traceback.format_exc()))
