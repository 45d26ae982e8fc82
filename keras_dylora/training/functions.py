"""The functions of one batch that `fit`, `evaluate` and `predict` call."""

import functools
import itertools

import keras

from keras_dylora import _keras


def make(model, kind, keras_make, restoring, force):
    """Makes Keras's function of a batch, which leaves no trace if it fails.

    On torch, `jit_compile` traces the function whole.

    Args:
        model: a `DyLoRAModel`.
        kind: str. The purpose of the function: `"train"`, `"test"` or
            `"predict"`.
        keras_make: Keras's method that makes it.
        restoring: function of the model, the kind and the function; see
            `stateful.restore_on_error`.
        force: bool. Whether to make it again if there is one.
    """
    name = f"{kind}_function"
    before = getattr(model, name)
    on_torch = keras.backend.backend() == "torch"
    traced = on_torch and model.jit_compile
    # A model that is compiled again keeps its functions.
    force = force or getattr(before, "traced", traced) != traced
    with _keras.jit_compile(model, False if traced else model.jit_compile):
        keras_make(force)
    made = getattr(model, name)
    if made is not before:
        if traced:
            made = _Traced(model, kind, made)
        made = restoring(model, kind, made)
        if on_torch:
            made.traced = traced
        setattr(model, name, made)
    return made


def last(step, batches, count):
    """The logs of the last of `count` steps, on batches of an iterator."""
    logs = step(next(batches))
    for batch in itertools.islice(batches, count - 1):
        logs = step(batch)
    return logs


def make_generate(model, original_class):
    """The function of a batch that `generate` of a causal model calls.

    On torch, `jit_compile` traces the call for one more token, which KerasHub's
    sampler makes in a loop.
    """
    before = model.generate_function
    made = original_class.make_generate_function(model)
    on_torch = keras.backend.backend() == "torch"
    if made is before or not (on_torch and model.jit_compile):
        return made

    def with_cache(data):
        args, kwargs = data[0]
        return original_class.call_with_cache(model, *args, **kwargs)

    traced = _Traced(model, "generate", with_cache)

    def generate(inputs, stop_token_ids=None):
        model.__dict__["call_with_cache"] = lambda *args, **kwargs: traced(
            [(args, kwargs)]
        )
        try:
            return made(inputs, stop_token_ids)
        finally:
            model.__dict__.pop("call_with_cache", None)

    model.generate_function = generate
    return generate


def make_own(model, function):
    """A training step of the user's, traced whole on torch.

    Args:
        model: a `DyLoRAModel`.
        function: function of structures of arrays that returns a structure of
            tensors, or `None`.
    """
    if keras.backend.backend() != "torch":
        raise ValueError(
            "`traced` is for torch; on TensorFlow use `tf.function`, and on "
            f"JAX `jax.jit`. Received: {keras.backend.backend()}"
        )
    from keras_dylora.training.traced import is_array

    def step(data):
        args, kwargs = data[0]
        found = function(*args, **kwargs)
        # A result is a tensor.
        return () if found is None else (found,)

    traced = made_for = None

    @functools.wraps(function)
    def call(*args, **kwargs):
        nonlocal traced, made_for
        for x in keras.tree.flatten([args, kwargs]):
            if x is not None and not is_array(x):
                raise TypeError(
                    "A traced step takes arrays and tensors, as it would "
                    f"keep any other value. Received: {x!r} (of type "
                    f"{type(x).__name__})"
                )
        if getattr(model, "optimizer", None) is None:
            raise ValueError(
                "A traced step updates weights with the optimizer that the "
                f"model is compiled with. Received: {model.name}, which isn't "
                "compiled"
            )
        model.train_all_columns()
        # A mark on the model, dropped with its other functions.
        if made_for is None or vars(model).get("own_function") is not made_for:
            made_for = vars(model).get("own_function") or object()
            vars(model)["own_function"] = made_for
            traced = _Traced(model, "train", step)
        found = traced([(args, kwargs)])
        return found[0] if found else None

    return call


class _Traced:
    """A function of a batch, traced whole for a model's compile settings."""

    def __init__(self, model, kind, function):
        self.model, self.kind, self.function = model, kind, function
        self.compiled_as = None

    def __call__(self, data):
        model = self.model
        compiled_as = _keras.compile_state(model)
        if compiled_as != self.compiled_as:
            slots = ()
            if self.kind == "train":
                # A slot that a trace made would be forgotten after each step.
                model.start_training()
                slots = model.optimizer.variables
            self.step = traced_step(model, self.function, slots)
            self.compiled_as = compiled_as
        return self.step(data)


def traced_step(model, function, slots=()):
    """A `TracedStep` of a function of `[batch]`, with a model's variables."""
    from keras_dylora.training.traced import TracedStep

    variables = [*model.variables, *model.metrics_variables, *slots]
    return TracedStep(
        function,
        list({id(v): v for v in variables}.values()),
        model.name,
        compiled=model.jit_compile not in ("trace", False),
    )
