"""The inputs of a model: their names, shapes, structure and made-up values."""

import dataclasses

import keras
import numpy as np

LENGTH = 16  # the size of open dimensions in samples, except the batch


@dataclasses.dataclass(frozen=True)
class Input:
    """A tensor of a signature; `None` in its shape is an open dimension."""

    name: str
    shape: tuple
    dtype: str


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The tensors that a model takes, and their structure.

    Args:
        kind: str. `"tensor"`, `"list"` or `"dict"`.
        specs: tuple of `Input`.
    """

    kind: str
    specs: tuple

    @classmethod
    def of(cls, model, input_signature=None):
        """The inputs of a built model, or those of an `input_signature`."""
        own = _own_inputs(model)
        if input_signature is None:
            if own is None:
                raise ValueError(
                    "A model that isn't functional and takes more than one "
                    "argument needs an `input_signature`. "
                    f"Received: {model.name} without one"
                )
            return own
        # `Model.export` takes one entry for each argument of the call.
        if (
            isinstance(input_signature, (list, tuple))
            and len(input_signature) == 1
            and (own is None or own.kind != "list")
        ):
            input_signature = input_signature[0]
        given = _from_structure(input_signature, own)
        if own is not None and _names(own) != _names(given):
            raise ValueError(
                "`input_signature` must have the structure of the model's "
                f"input: {_names(own)}. Received: {_names(given)}"
            )
        return given

    def pack(self, tensors):
        """Puts a dict of tensors by name into the structure of the input."""
        if self.kind == "dict":
            return {spec.name: tensors[spec.name] for spec in self.specs}
        flat = [tensors[spec.name] for spec in self.specs]
        return flat if self.kind == "list" else flat[0]

    def samples(self, model, batch):
        """A dict of name to a random array, as an input of a model.

        A row of integers is ones up to a random length, then zeros.
        """
        rng = np.random.default_rng(0)
        backbone = getattr(model, "backbone", None)
        longest = getattr(backbone, "max_sequence_length", None) or LENGTH
        lengths = rng.integers(1, LENGTH + 1, batch)
        found = {}
        for spec in self.specs:
            shape = [min(LENGTH, longest) if d is None else d
                     for d in spec.shape]  # fmt: skip
            shape[0] = batch
            if spec.dtype.startswith(("float", "bfloat")):
                value = rng.normal(size=shape)
            elif spec.name == "token_ids" and backbone is not None:
                value = rng.integers(0, backbone.vocabulary_size, shape)
            else:
                value = np.arange(shape[-1]) < lengths.reshape(
                    batch, *[1] * (len(shape) - 1)
                )
                value = np.broadcast_to(value, shape)
            found[spec.name] = np.asarray(value, spec.dtype)
        return found


def _names(inputs):
    if inputs.kind == "dict":
        return sorted(spec.name for spec in inputs.specs)
    return f"a {inputs.kind} of {len(inputs.specs)}"


def _own_inputs(model):
    """The inputs that the model itself declares, or `None`."""
    if isinstance(model, keras.Sequential) and model.inputs:
        return _from_structure(model.inputs[0])
    try:
        structure = model.input
    except (AttributeError, ValueError):  # isn't functional
        built = model.get_build_config() or {}
        if "input_shape" not in built:
            return None
        structure = keras.tree.map_shape_structure(
            lambda shape: keras.InputSpec(shape=(None, *shape[1:])),
            built["input_shape"],
        )
    return _from_structure(structure)


def _label(spec, default):
    """The name of a tensor if it is an identifier, otherwise the default."""
    name = getattr(spec, "name", None) or default
    return name if name.isidentifier() else default


def _from_structure(structure, own=None):
    """The inputs in a structure of specs; `own` has dtypes for missing ones."""
    if isinstance(structure, dict):
        kind, items = "dict", list(structure.items())
    elif isinstance(structure, (list, tuple)):
        kind = "list"
        items = [
            (_label(spec, f"input_{i}"), spec)
            for i, spec in enumerate(structure)
        ]
    else:
        kind = "tensor"
        items = [(_label(structure, "inputs"), structure)]
    for name, spec in items:
        if not name.isidentifier():
            raise ValueError(
                "The names of a model's inputs become those of a signature's "
                "arguments, and must be Python identifiers. "
                f"Received: {name!r}"
            )
        if getattr(spec, "shape", None) is None or not hasattr(spec, "dtype"):
            raise ValueError(
                "A model's input must be a tensor, or a list or a dict of "
                "tensors, each given as a spec with a shape and a dtype. "
                f"Received: {structure!r}"
            )
    names = [name for name, _ in items]
    dtypes = {}
    if own is not None:
        labels = [x.name for x in own.specs] if kind == "dict" else names
        dtypes = dict(zip(labels, [x.dtype for x in own.specs], strict=False))
    return Inputs(
        kind,
        tuple(
            Input(
                name,
                (None, *spec.shape[1:]),
                _dtype_name(spec.dtype or dtypes.get(name)),
            )
            for name, spec in items
        ),
    )


def _dtype_name(dtype):
    return keras.backend.standardize_dtype(dtype or keras.config.floatx())
