"""Plan: what is exported, in a form that travels to a child process."""

import dataclasses
import json

import keras

# What an artifact of a format is called below its folder.
FILE_NAMES = {"onnx": "model.onnx", "litert": "model.tflite"}


@dataclasses.dataclass(frozen=True)
class Input:
    """One tensor of a signature; `None` in the shape is a free dimension."""

    name: str
    shape: tuple
    dtype: str


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The tensors that a model takes, and how it wants them packed.

    Args:
        kind: str. `"tensor"`, `"list"` or `"dict"`.
        specs: tuple of `Input`.
    """

    kind: str
    specs: tuple

    @classmethod
    def of(cls, model, input_signature=None):
        """The inputs of a built model, or those that the user asks for."""
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
        """A dict of tensors by name in the structure that the model takes."""
        if self.kind == "dict":
            return {spec.name: tensors[spec.name] for spec in self.specs}
        flat = [tensors[spec.name] for spec in self.specs]
        return flat if self.kind == "list" else flat[0]


def _names(inputs):
    if inputs.kind == "dict":
        return sorted(spec.name for spec in inputs.specs)
    return f"a {inputs.kind} of {len(inputs.specs)}"


def _own_inputs(model):
    """The inputs as the model itself knows them, if it does."""
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
    """The name of a tensor that isn't found by it, where it can be used."""
    name = getattr(spec, "name", None) or default
    return name if name.isidentifier() else default


def _from_structure(structure, own=None):
    """The inputs in a structure of specs; `own` has the dtypes they leave."""
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


@dataclasses.dataclass(frozen=True)
class Served:
    """A rank that is exported.

    Args:
        name: str. Of its signature, or of its folder.
        value: int. What stands for it as the input `rank`.
        rank: int, or a tuple of one for each adapted layer in forward order,
            as paths may be others in another process.
    """

    name: str
    value: int
    rank: int | tuple

    @property
    def by_layer(self):
        return isinstance(self.rank, tuple)

    @property
    def highest(self):
        """int. The highest rank of a layer."""
        return max(self.rank) if self.by_layer else self.rank

    def ranks(self, paths):
        """Dict of path to rank, by the paths of the adapted layers."""
        each = self.rank if self.by_layer else (self.rank,) * len(paths)
        return dict(zip(paths, each, strict=True))


@dataclasses.dataclass(frozen=True)
class ServedAdapter:
    """One of several adapters that are exported, and its highest rank."""

    name: str
    rank: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """The checked arguments of `export_ranks`.

    Args:
        ranks: tuple of `Served`, by size.
        layout: str. `"shared"` or `"merged"`.
        format: str. `"saved_model"`, `"onnx"` or `"litert"`.
        dtype: str or `None`. What float parameters are stored in.
        inputs: `Inputs`.
        text: bool. Whether there is a `serve_text` signature.
        generate: bool. Whether there are generate signatures.
        adapters: tuple of `ServedAdapter`, empty where the active one alone
            is exported, without an input for it.
    """

    ranks: tuple
    layout: str
    format: str
    dtype: str | None
    inputs: Inputs
    text: bool
    generate: bool
    adapters: tuple = ()

    @property
    def steps(self):
        """How many pieces of work a writer reports."""
        return len(self.ranks) + (self.layout == "shared")

    @property
    def by_layer(self):
        """Whether a rank is one for each layer."""
        return any(served.by_layer for served in self.ranks)

    @property
    def highest(self):
        """int. The highest rank that is one for all layers, or 0."""
        return max((x.rank for x in self.ranks if not x.by_layer), default=0)

    @property
    def choices(self):
        """Pairs of the name of an adapter, if it is an input, and a rank."""
        adapters = self.adapters or (ServedAdapter(None, None),)
        return [
            (adapter.name, served)
            for adapter in adapters
            for served in self.ranks
            if adapter.rank is None or served.highest <= adapter.rank
        ]

    def to_json(self):
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text):
        plan = json.loads(text)
        specs = tuple(
            Input(x["name"], tuple(x["shape"]), x["dtype"])
            for x in plan["inputs"]["specs"]
        )
        plan["inputs"] = Inputs(plan["inputs"]["kind"], specs)
        plan["ranks"] = tuple(
            Served(
                x["name"],
                x["value"],
                tuple(x["rank"]) if isinstance(x["rank"], list) else x["rank"],
            )
            for x in plan["ranks"]
        )
        plan["adapters"] = tuple(ServedAdapter(**x) for x in plan["adapters"])
        return cls(**plan)
