"""DyLoRAModel: the Keras model that draws a rank for every training step."""

import contextlib
import functools

import keras
from keras import ops

from keras_dylora import training
from keras_dylora._keras import cover_quantize
from keras_dylora._keras import forget
from keras_dylora._keras import own_weights
from keras_dylora._keras import portable
from keras_dylora._keras import set_class
from keras_dylora._keras import settle_dtype_policies
from keras_dylora._keras import submodels
from keras_dylora._keras import track_for_torch
from keras_dylora._keras import uncover_quantize
from keras_dylora.attachment import Attachment
from keras_dylora.attachment import plain
from keras_dylora.compiling import compile_from
from keras_dylora.compiling import new_optimizer
from keras_dylora.compiling import reset_compiled
from keras_dylora.compiling import reset_functions
from keras_dylora.compiling import uncompiled
from keras_dylora.config import DyLoRAConfig
from keras_dylora.quantization import quantize_base
from keras_dylora.state import DyLoRAState
from keras_dylora.state import adapters

FORMAT_VERSION = 1
RANDOM_STATE = "random_state_"
# What a backbone within an enabled task can't do: it would lose the adapters.
REFUSED = ("save", "save_to_preset", "export_to_transformers")


def state_of(model):
    """The `DyLoRAState` of a model, or a `ValueError`."""
    if isinstance(model, DyLoRAModel):
        model._prepare()
    state = getattr(model, "_dylora", None)
    if state is None:
        raise ValueError(
            "The model must be enabled with `enable_dylora` or be a "
            "`DyLoRAModel` whose layers are built. "
            f"Received: {model!r} (of type {type(model).__name__})"
        )
    return state


def attachment_of(model):
    """How `enable_dylora` made the model, or a `ValueError`."""
    attachment = state_of(model).attachment
    if attachment is None:
        raise ValueError(
            "The model must come from `enable_dylora`. Received: "
            f"{model.name}, which was built from DyLoRA layers"
        )
    return attachment


def adopt(model, config, attachment=None, dylora_class=None):
    """Makes a live model a `DyLoRAModel` without copying anything."""
    dylora_class = dylora_class or DyLoRAModel
    optimizer = new_optimizer(model)
    set_class(model, _combined_class(dylora_class, type(model)))
    uncover_quantize(model)
    settle_dtype_policies(model)
    layers = adapters(model)
    object.__setattr__(
        model, "_dylora", DyLoRAState(model, config, layers, attachment)
    )
    track_for_torch(model)
    for inner in submodels(model)[1:]:
        if hasattr(inner, "save_to_preset"):  # a backbone
            # Its own file or preset would have no place for the adapters.
            for name in REFUSED:
                inner.__dict__[name] = functools.partial(_refuse, name)
    reset_compiled(model, optimizer)


def release(model):
    """Undoes `adopt`; does nothing to a model that isn't adopted."""
    adopted = "_dylora" in model.__dict__
    optimizer = new_optimizer(model) if adopted else None
    model.__dict__.pop("_dylora", None)
    forget(model, "_ranks_drawn", "_open_columns")
    for inner in submodels(model)[1:]:
        for name in REFUSED:
            inner.__dict__.pop(name, None)
    if isinstance(model, DyLoRAModel):
        set_class(model, type(model).original_class)
        cover_quantize(model)
    if adopted:
        reset_compiled(model, optimizer)


def _refuse(method, *args, **kwargs):
    path, *_ = *args, *kwargs.values(), None
    raise ValueError(
        "A preset, a Transformers export or a file of the backbone alone "
        "holds a plain model. Use `merge(model, rank)` and save that, or "
        "`model.save` or `save_adapter` of the whole model, which keep the "
        "adapters. "
        f"Received: {method}({str(path)!r}) of an enabled model"
    )


def restart(model, config, optimizer):
    """Gives a model a new config, at the same place of its rank sequence.

    Args:
        model: a `DyLoRAModel`.
        config: `DyLoRAConfig`.
        optimizer: as `new_optimizer` makes one.
    """
    old = state_of(model)
    drawn = ops.convert_to_numpy(model._ranks_drawn)
    forget(model, "_ranks_drawn", "_open_columns")
    if old.attachment is not None:
        old.attachment.config = config
    state = DyLoRAState(model, config, old.layers, old.attachment)
    object.__setattr__(model, "_dylora", state)
    model._ranks_drawn.assign(drawn)
    track_for_torch(model)
    reset_compiled(model, optimizer)


@functools.cache
def _combined_class(dylora_class, original_class):
    """The class that is both a `DyLoRAModel` and the original one."""
    cls = type(
        f"DyLoRA{original_class.__name__}"
        if dylora_class is DyLoRAModel
        else dylora_class.__name__,
        (dylora_class, original_class),
        {
            "__module__": dylora_class.__module__,
            "__doc__": original_class.__doc__,
            "original_class": original_class,
        },
    )
    # It is saved under the name of the importable class, which revives it.
    package, _, name = keras.saving.get_registered_name(
        dylora_class
    ).rpartition(">")
    for registered in (cls, dylora_class) if package else ():
        keras.saving.register_keras_serializable(package, name)(registered)
    return cls


@functools.cache
def _functional_class():
    inputs = keras.Input((1,))
    return type(keras.Model(inputs, inputs))


@keras.saving.register_keras_serializable(package="keras_dylora")
class DyLoRAModel(keras.Model):
    """A Keras model that trains its adapters for every rank at once.

    Each training step draws a rank `b`, runs Keras's own step with the first
    `b` columns and rows of every adapter (Algorithm 1), and logs it as
    `rank`. In frozen mode nothing but column and row `b` of the adapters, and
    the layers that are trained in full, may change (Eq. 10).

    `enable_dylora` turns an existing model into one. A model that is built
    from `DyLoRADense` and `DyLoRAEinsumDense` layers, functional or
    subclassed, is one by construction; its layers must agree in `rank`,
    `min_rank`, `alpha` and `frozen`.

    Args:
        *args: as in `keras.Model`, so `inputs, outputs` for a functional one.
        rank_distribution: as in `DyLoRAConfig`. Defaults to `"uniform"`.
        objective: as in `DyLoRAConfig`. Defaults to `"sampled"`.
        seed: int. Seed of the rank sequence. Defaults to `0`.
        **kwargs: as in `keras.Model`.

    Raises:
        ValueError: if the layers disagree or there is none.

    Example:

    ```python
    inputs = keras.Input((32,))
    x = keras_dylora.DyLoRADense(64, "relu", rank=4, alpha=8)(inputs)
    outputs = keras_dylora.DyLoRADense(1, rank=4, alpha=8)(x)
    model = keras_dylora.DyLoRAModel(inputs, outputs, seed=1)
    model.compile("adam", "mse")
    model.fit(x_train, y_train)
    model.set_rank(2)
    model.predict(x_test)
    ```

    Reference:

    - [Valipour et al., 2022](https://arxiv.org/abs/2210.07558)
    """

    original_class = keras.Model

    def __init__(
        self,
        *args,
        rank_distribution="uniform",
        objective="sampled",
        seed=0,
        **kwargs,
    ):
        functional = len(args) == 2 or "outputs" in kwargs
        if functional:
            # Left alone, Keras would make `Functional` a base of this very
            # class, and so of every subclassed model.
            set_class(self, _combined_class(type(self), _functional_class()))
        super().__init__(*args, **kwargs)
        options = {
            "rank_distribution": rank_distribution,
            "objective": objective,
            "seed": seed,
        }
        object.__setattr__(self, "_dylora_options", options)
        if functional:
            self._prepare()

    def _prepare(self):
        """Takes over the layers of a hand-built model, once they are built."""
        if hasattr(self, "_dylora"):
            return
        layers = adapters(self)
        if not layers or not all(layer.built for layer in layers):
            raise ValueError(
                "A `DyLoRAModel` needs built `DyLoRADense` or "
                "`DyLoRAEinsumDense` layers. Received: "
                f"{[layer.name for layer in layers]} in {self.name}"
            )
        shared = {}
        for name in ("rank", "min_rank", "alpha", "frozen"):
            values = {getattr(layer, name) for layer in layers}
            if len(values) > 1:
                raise ValueError(
                    f"All layers of a `DyLoRAModel` must have the same "
                    f"`{name}`. Received: {sorted(values)}"
                )
            shared[name] = values.pop()
        config = DyLoRAConfig(**shared, **self._dylora_options)
        object.__setattr__(self, "_dylora", DyLoRAState(self, config, layers))

    @property
    def dylora_config(self):
        """The `DyLoRAConfig` of the model."""
        return state_of(self).config

    @property
    def dylora_layers(self):
        """The adapted layers, in forward order."""
        return list(state_of(self).layers)

    @property
    def rank(self):
        """int. The rank of inference; training and validation keep it."""
        return state_of(self).gates[0].active_rank

    def set_rank(self, rank):
        """Sets the rank of `predict`, `evaluate`, `generate` and calls.

        Compiled functions read the new rank; nothing is traced again.

        Args:
            rank: int in `0..config.rank`. `0` gives the base model.

        Raises:
            ValueError: if `rank` is out of range.
            TypeError: if `rank` isn't an integer.

        Example:

        ```python
        clf.set_rank(4)
        clf.predict(texts)
        ```
        """
        gates = state_of(self).gates
        training.sync(self)
        for gate in gates:
            gate.set_rank(rank)

    @contextlib.contextmanager
    def rank_scope(self, rank):
        """Sets the rank for the time of a `with` block.

        Args:
            rank: int in `0..config.rank`.

        Raises:
            ValueError: if `rank` is out of range.
            TypeError: if `rank` isn't an integer.

        Example:

        ```python
        with clf.rank_scope(2):
            clf.predict(texts)
        ```
        """
        previous = self.rank
        self.set_rank(rank)
        try:
            yield self
        finally:
            self.set_rank(previous)

    def make_train_function(self, force=False):
        # On TensorFlow, a subclassed model is built in its first step only.
        layers = adapters(self)
        if layers and all(layer.built for layer in layers):
            self.start_training()
        before = self.train_function
        function = super().make_train_function(force)
        if self.train_function is not before:
            function = training.guarded(self, self.train_function)
            self.train_function = function
        return function

    def start_training(self):
        """Makes what a step needs beside the layers, once they are built."""
        self._prepare()
        if self.optimizer is None:
            return
        if self._dylora.config.frozen:
            training.check_frozen(self.optimizer)
        if not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)

    def train_step(self, *args):
        return training.train_step(self, super().train_step, *args)

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, **kwargs
    ):
        compute = super().compute_loss
        if hasattr(self, "_dylora") and self._dylora.summing:
            compute = functools.partial(training.summed_loss, self, compute)
        return compute(x, y, y_pred, sample_weight, **kwargs)

    def quantize(self, mode=None, config=None, filters=None, **kwargs):
        """Quantizes the base model; the adapters stay in float32.

        Layers that are trained in full, such as a task head, are left out: no
        gradient reaches an integer kernel.

        Args:
            mode: `"int8"` or `"int4"`. Defaults to `None`, that of `config`.
            config: `keras.quantizers.QuantizationConfig`. Defaults to `None`,
                Keras's default for the mode.
            filters: str, list of str, or callable of a layer. Which layers to
                quantize, as in `keras.Model.quantize`. Defaults to `None`,
                all.
            **kwargs: further arguments of `keras.Model.quantize`.

        Raises:
            TypeError: if `filters` is something else.
            ValueError: if the mode is another one, or a layer is quantized
                already.

        Example:

        ```python
        keras_dylora.enable_dylora(clf, rank=8)
        clf.quantize("int8")
        clf.fit(texts, labels)
        ```
        """
        state = state_of(self)
        keras_quantize = self.__dict__.get("_keras_quantize")
        try:
            quantize_base(
                self, keras_quantize or super().quantize,
                state.layers, mode, config, filters, **kwargs,
            )  # fmt: skip
        finally:
            if state.attachment is not None:
                state.attachment.forget_replaced()
            track_for_torch(self)
            reset_functions(self)

    def save_to_preset(self, preset_dir, **kwargs):
        """Raises a `ValueError`: a KerasHub preset can't hold adapters."""
        _refuse("save_to_preset", preset_dir)

    def export_to_transformers(self, path, **kwargs):
        """Raises a `ValueError`: use `to_peft`, or export what `merge` gives.

        KerasHub would write the base model, without the adapters.
        """
        _refuse("export_to_transformers", path)

    def __reduce__(self):
        # The class of an enabled model can't be imported. The archive names
        # the one that revives it.
        _, arguments = super().__reduce__()
        return DyLoRAModel._unpickle_model, arguments

    @property
    def weights(self):
        own = {
            id(self.__dict__.get(name))
            for name in ("_ranks_drawn", "_open_columns")
        }
        return [w for w in super().weights if id(w) not in own]

    def save_own_variables(self, store):
        self._prepare()
        super().save_own_variables(store)
        for name, variable in self._random_state().items():
            store[name] = variable

    def load_own_variables(self, store):
        self._prepare()
        if not store.keys():
            raise ValueError(
                "The file holds no DyLoRA state. Load the weights of a base "
                f"model before you enable DyLoRA. Received: {self.name}"
            )
        stored = {k: store[k] for k in store.keys()}
        random_state = self._random_state()
        values = {
            k: stored.pop(k) for k in list(stored) if k.startswith(RANDOM_STATE)
        }
        # The open columns of the frozen mode, the last of a model's own.
        count = len(own_weights(self))
        if self._dylora.config.frozen:
            stored.setdefault(f"{count - 1}", self._open_columns)
        else:
            stored.pop(f"{count}", None)
        super().load_own_variables(stored)
        if values.keys() == random_state.keys():
            for name, variable in random_state.items():
                variable.assign(values[name])
        # Else with another dropout: its random numbers start anew, as Keras's.

    def _random_state(self):
        """States of the layers' seed generators, which Keras doesn't save.

        Without them, a run with dropout can't resume where it stopped.
        """
        skip = {id(w) for w in super().weights}
        skip |= {id(gate.variable) for gate in self._dylora.gates}
        states = [v for v in self.variables if id(v) not in skip]
        return {f"{RANDOM_STATE}{i}": v for i, v in enumerate(states)}

    def get_compile_config(self):
        config = portable(super().get_compile_config())
        if config and self.optimizer is not None:
            # Keras couldn't load what an optimizer saved before it was built
            # into one that is.
            config["optimizer_built"] = self.optimizer.built
        return config

    def compile_from_config(self, config):
        compile_from(self, config)

    def get_config(self):
        if not _is_combined(type(self)):
            return super().get_config()
        state = state_of(self)
        attachment, trainable = (
            state.attachment,
            [w.trainable for w in self.weights],
        )
        attached = attachment.layers.values() if attachment else ()
        with uncompiled(self), plain(self, attached, attachment):
            base = keras.saving.serialize_keras_object(self)
        return {
            "format_version": FORMAT_VERSION,
            "base": base,
            "dylora": attachment.get_config()
            if attachment
            else {"config": state.config.get_config(), "layers": None},
            "trainable": trainable,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        if "base" not in config:
            return super().from_config(config, custom_objects)
        if config["format_version"] > FORMAT_VERSION:
            raise ValueError(
                "The file must be of format version "
                f"{FORMAT_VERSION} or older; a newer keras_dylora wrote it. "
                f"Received: format_version={config['format_version']}"
            )
        model = keras.saving.deserialize_keras_object(
            config["base"], custom_objects
        )
        attachment = Attachment.from_config(model, config["dylora"])
        if attachment is not None:
            attachment.attach()
        adopt(
            model,
            DyLoRAConfig.from_config(config["dylora"]["config"]),
            attachment,
            cls,
        )
        flags = list(zip(model.weights, config["trainable"], strict=True))
        if attachment is not None:
            # Of the layers too: a batch normalization asks for its own.
            attachment.train([w for w, trainable in flags if trainable])
            return model
        for weight, trainable in flags:
            weight.trainable = trainable
        return model


def _is_combined(cls):
    return "original_class" in vars(cls) and cls is not DyLoRAModel
