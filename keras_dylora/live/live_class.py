"""How the class of a live model becomes a `DyLoRAModel`'s, and back.

`docs/live_models.md` says why the class is changed in place.
"""

import functools

import keras

from keras_dylora import _keras, training
from keras_dylora.live.recompile import new_optimizer, reset_compiled

_PLAIN = (
    "A preset, a Transformers export or a file of the backbone alone holds a "
    "plain model. Save what `merge(model, rank)` returns; or keep the adapters "
    "by `model.save` or `save_adapter` of the whole model."
)
# Methods that would lose the adapters, with the error. `save` is refused only
# for models within the model.
REFUSED = {
    "save": _PLAIN,
    "save_to_preset": _PLAIN,
    "export_to_transformers": _PLAIN,
    "enable_lora": "A model has adapters of one kind. Use `disable_dylora` "
    "before Keras's own LoRA.",
}


def to_dylora_class(model, adaptation, dylora_class):
    """Turns a live model into a `DyLoRAModel` without copying anything.

    `dylora_class` is `DyLoRAModel` or a subclass of it.
    """
    if is_combined(dylora_class):  # as in `model.from_config`
        dylora_class, _ = dylora_class.__bases__
    optimizer = new_optimizer(model)
    combined = combined_class(dylora_class, type(model))
    _keras.set_class(model, combined)
    _keras.uncover_quantize(model)
    _keras.settle_dtype_policies(model)
    adaptation.configure(adaptation.config)
    object.__setattr__(model, "_dylora", adaptation)
    _keras.track_for_torch(model)
    for each in _keras.submodels(model):
        if hasattr(each, "save_to_preset"):  # a task or a backbone
            for name in REFUSED:
                if name != "save" or each is not model:
                    each.__dict__[name] = functools.partial(_refuse, name)
    reset_compiled(model, optimizer)


def to_original_class(model):
    """Undoes `to_dylora_class`; does nothing to a model of another class."""
    enabled = "_dylora" in model.__dict__
    optimizer = new_optimizer(model) if enabled else None
    model.__dict__.pop("_dylora", None)
    for each in _keras.submodels(model):
        for name in REFUSED:
            each.__dict__.pop(name, None)
    if is_combined(type(model)):
        _keras.set_class(model, type(model).original_class)
        _keras.cover_quantize(model)
    if enabled:
        reset_compiled(model, optimizer)


def _refuse(method, *args, **kwargs):
    path, *_ = *args, *kwargs.values(), None  # type: ignore[misc]
    raise ValueError(
        f"{REFUSED[method]} Received: {method}({str(path)!r}) of an enabled "
        "model"
    )


@functools.cache
def combined_class(dylora_class, original_class):
    """The class that subclasses both a `DyLoRAModel` and the original class."""
    methods = {}
    if hasattr(original_class, "call_with_cache"):  # a model that generates
        methods["make_generate_function"] = _make_generate_function
    # A user's subclass keeps its name.
    ours = "original_class" in vars(dylora_class)
    cls = type(
        f"DyLoRA{original_class.__name__}" if ours else dylora_class.__name__,
        (dylora_class, original_class),
        {
            "__module__": dylora_class.__module__,
            "__doc__": original_class.__doc__,
            "original_class": original_class,
            "is_combined": True,
            **methods,
        },
    )
    # Files have the name of the importable class, which revives it.
    package, _, name = keras.saving.get_registered_name(
        dylora_class
    ).rpartition(">")
    for registered in (cls, dylora_class) if package else ():
        keras.saving.register_keras_serializable(package, name)(registered)
    return cls


def _make_generate_function(model):
    return training.make_generate(model, model.original_class)


@functools.cache
def functional_class():
    """The class that Keras gives to a model of inputs and outputs."""
    inputs = keras.Input((1,))
    return type(keras.Model(inputs, inputs))


def is_combined(cls):
    """Whether `combined_class` made this class."""
    return "is_combined" in vars(cls)
