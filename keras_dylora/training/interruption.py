"""Callbacks added to the user's, and interruptions that lose nothing."""

import contextlib
import inspect
import signal
import threading

import keras


class Interruption(keras.callbacks.Callback):
    """Raises a `KeyboardInterrupt` at the end of the batch that it came in."""

    came = False
    # Keras needn't wait for the device after every batch; the next one will do.
    async_safe = True

    def raise_what_came(self):
        if self.came:
            raise KeyboardInterrupt

    def on_train_batch_end(self, batch, logs=None):
        self.raise_what_came()

    on_test_batch_end = on_predict_batch_end = on_train_batch_end


def interruptible(model, method, args, kwargs):
    """Calls `fit`, `evaluate` or `predict`, which Ctrl-C ends after a batch.

    On JAX, Keras takes the values out of the variables for this time, and gives
    their memory to the compiled function. So an interruption in the middle
    would lose the model. A second interruption doesn't wait. After any error,
    the variables have their values again; Keras does that only in `fit`.
    """
    try:
        with _whole_batches(method) as callback:
            if callback is not None:
                args, kwargs = with_callback(
                    method, args, kwargs, callback, True
                )
            return method(*args, **kwargs)
    except BaseException:
        if keras.backend.backend() == "jax":
            model.jax_state_sync()
        raise


@contextlib.contextmanager
def _whole_batches(method):
    usual = signal.default_int_handler
    main = threading.current_thread() is threading.main_thread()
    if (
        keras.backend.backend() != "jax"
        or not main  # signals come only to the main thread
        or _holder(method) is None
        or signal.getsignal(signal.SIGINT) is not usual
    ):
        yield None
        return
    callback = Interruption()

    def later(*args):
        callback.came = True
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, later)
    try:
        yield callback
        callback.raise_what_came()
    finally:
        signal.signal(signal.SIGINT, usual)


def with_callback(method, args, kwargs, callback, last=False):
    """The arguments of a `fit`, with a callback before or after its own.

    Raises a `TypeError` if the method takes no callbacks.
    """
    signature = inspect.signature(method)
    bound = signature.bind(*args, **kwargs)
    arguments = bound.arguments
    holder = _holder(method)
    if holder is None:
        raise TypeError(
            "`full_rank_steps` end in a callback, so the `fit` of the model "
            f"must take `callbacks`, or `**kwargs`. Received: fit{signature}"
        )
    if holder != "callbacks":
        arguments = arguments.setdefault(holder, {})
    callbacks = arguments.get("callbacks")
    found = keras.tree.flatten(callbacks or [])
    found.insert(len(found) if last else 0, callback)
    if isinstance(callbacks, keras.callbacks.CallbackList):
        # In a new list around it, as the user's may run its own in threads.
        found = keras.callbacks.CallbackList(
            found, model=callbacks.model, **callbacks.params
        )
    arguments["callbacks"] = found
    return bound.args, bound.kwargs


def _holder(method):
    """The parameter that takes `callbacks`: itself, `**kwargs` or `None`.

    A KerasHub task passes Keras's arguments on as `**kwargs`.
    """
    parameters = inspect.signature(method).parameters
    if "callbacks" in parameters:
        return "callbacks"
    for name, parameter in parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            return name
    return None
