"""Plan: what to export, in a form that can be sent to a child process."""

import dataclasses
import json

from keras_dylora.live.inputs import Input, Inputs

# The file of an artifact in its folder, by format.
FILE_NAMES = {"onnx": "model.onnx", "litert": "model.tflite"}


@dataclasses.dataclass(frozen=True)
class Served:
    """A rank that is exported.

    Args:
        name: str. The name of its signature, or of its folder.
        value: int. The value of the input `rank` that means it.
        rank: int, or a tuple of a rank for each adapted layer in forward order.
            There are no paths, as they may differ in another process.
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

    def ranks(self, layers):
        """Dict of path to rank, for a dict of path to adapted layer."""
        if self.by_layer:
            return dict(zip(layers, self.rank, strict=True))
        return {path: min(self.rank, x.rank) for path, x in layers.items()}


@dataclasses.dataclass(frozen=True)
class ServedAdapter:
    """An adapter among several that are exported, and its highest rank."""

    name: str
    rank: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """The checked arguments of `export_ranks`.

    Args:
        ranks: tuple of `Served`, by size.
        layout: str. `"shared"` or `"merged"`.
        format: str. `"saved_model"`, `"onnx"` or `"litert"`.
        dtype: str or `None`. The dtype in which float parameters are stored.
        inputs: `Inputs`.
        text: bool. Whether there is a `serve_text` signature.
        generate: bool. Whether there are generate signatures.
        adapters: tuple of `ServedAdapter`. It is empty if only the active
            adapter is exported, without an input for it.
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
        """The number of pieces of work that a writer reports."""
        return len(self.ranks) + (self.layout == "shared")

    @property
    def by_layer(self):
        """Whether any of the ranks is an allocation."""
        return any(served.by_layer for served in self.ranks)

    @property
    def highest(self):
        """int. The highest rank that isn't an allocation, or 0."""
        return max((x.rank for x in self.ranks if not x.by_layer), default=0)

    @property
    def choices(self):
        """Pairs of an adapter's name, or `None` for no input, and a rank."""
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
