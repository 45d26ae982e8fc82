"""The low-rank part that all adapted layers share."""

import dataclasses
from typing import TYPE_CHECKING, Any, NoReturn

import keras
import numpy as np
from keras import ops

from keras_dylora import _keras, ranks
from keras_dylora.config import AdapterArguments
from keras_dylora.cuts import warn_of_cut
from keras_dylora.layers import torch_product
from keras_dylora.layers.factors import Factors, float32_array
from keras_dylora.layers.gate import GateRow, RankGate
from keras_dylora.layers.gated import gated

if TYPE_CHECKING:
    # The class that this one is mixed into.
    from keras import Layer as _Base
else:
    _Base = object

_cast = torch_product.cast if torch_product.ON_TORCH else ops.cast


@_keras.keeps_own_state
@_keras.loads_any_number
class LowRankAdapter(_Base):
    """The adapter of a layer: `h = base(x) + ((x @ down) * gate) @ up`.

    At a `TunedCut`, a core of `(rank, rank)` replaces the gate:
    `h = base(x) + (x @ down) @ core @ up`.

    A concrete class says how its base layer's kernel is a matrix, by
    `geometry_of(layer)`, and what its name is, by `kernel_name`.
    """

    original_class: type | None = None
    kernel_name = "kernel"
    takes_quantized = True
    _is_upgraded = False
    rank: int
    min_rank: int
    alpha: float
    frozen: bool
    dropout: float
    scaling: str
    down: keras.Variable
    up: keras.Variable

    def __init__(
        self,
        *args: Any,
        rank: int = 8,
        min_rank: int = 1,
        alpha: float = 16.0,
        frozen: bool = False,
        dropout: float = 0.0,
        scaling: str = "rank",
        down_initializer: str | dict | keras.Initializer | None = None,
        up_initializer: str | dict | keras.Initializer = "zeros",
        **kwargs: Any,
    ) -> None:
        if kwargs.get("lora_rank") is not None:
            raise ValueError(
                f"`{type(self).__name__}` has an adapter of its own and takes "
                f"no `lora_rank`. Received: lora_rank={kwargs['lora_rank']}"
            )
        super().__init__(*args, **kwargs)
        self._set_adapter_arguments(
            AdapterArguments(rank, min_rank, alpha, frozen, dropout, scaling),
            down_initializer,
            up_initializer,
        )

    def _set_adapter_arguments(
        self, arguments, down_initializer=None, up_initializer="zeros"
    ):
        self.set_arguments(arguments)
        self.down_initializer = keras.initializers.get(
            down_initializer or self._initial_down()
        )
        self.up_initializer = keras.initializers.get(up_initializer)

    @staticmethod
    def _initial_down(seed=None):
        """The authors' kaiming_uniform(a=sqrt(5)): limits 1 / sqrt(fan_in)."""
        return keras.initializers.VarianceScaling(
            1 / 3, mode="fan_in", distribution="uniform", seed=seed
        )

    def set_arguments(self, arguments: AdapterArguments) -> None:
        """Sets the fields of `AdapterArguments` as attributes."""
        for name, value in dataclasses.asdict(arguments).items():
            setattr(self, name, value)

    @classmethod
    def check_base(cls, layer: keras.Layer) -> None:
        """Raises `ValueError` if a built base layer can't take an adapter."""
        mode, rule = layer.quantization_mode, None
        constraint = f"{cls.kernel_name}_constraint"
        if getattr(layer, constraint) is not None:
            rule = f"A layer can't be adapted with its `{constraint}`"
        elif layer.lora_enabled:
            rule = "A layer with Keras's own LoRA can't be adapted too"
        elif mode not in (None, "int8", "int4"):
            rule = "Only float, int8 and int4 layers can be adapted"
        elif mode is not None and not cls.takes_quantized:
            rule = "Only a float layer of its kind can be adapted"
        if rule:
            raise ValueError(
                f"{rule}. Received: {layer.name} with quantization_mode={mode}"
            )
        cls.geometry_of(layer)

    @classmethod
    def upgrade(
        cls,
        layer: keras.Layer,
        arguments: AdapterArguments,
        row: GateRow,
        seed: int,
    ) -> None:
        """Turns a built base layer into this class, in place.

        `row` is the layer's row of the gate. `seed` is that of the initial
        values and of dropout.
        """
        _keras.set_class(layer, cls)
        layer._is_upgraded = True
        layer._set_adapter_arguments(arguments, cls._initial_down(seed))
        with _keras.unlocked(layer):
            layer._build_adapter(row, seed)

    def downgrade(self) -> None:
        """Turns a layer that `upgrade` made back into its base layer."""
        _keras.forget(self, "down", "up", "_dropout_seed")
        for name in _ATTRIBUTES:
            self.__dict__.pop(name, None)
        _keras.set_class(self, self.original_class)

    def enable_lora(self, rank: int, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            "A layer has one adapter. Use `disable_dylora` before Keras's own "
            f"LoRA. Received: enable_lora({rank!r}) of {self.path}"
        )

    def build(self, input_shape: Any) -> None:
        self._build_base(input_shape)
        scale = ranks.Scale(self.rank, self.alpha, self.scaling)
        row = GateRow(RankGate([self.rank], scale))
        self._build_adapter(row, seed=None)

    def _build_base(self, input_shape):
        super().build(input_shape)

    def _build_adapter(self, row, seed):
        self._geometry = self.geometry_of(self)
        self._dropout_seed = (
            keras.random.SeedGenerator(seed) if self.dropout else None
        )
        self._add_adapter(row)
        self._freeze_base()

    def _add_adapter(self, row):
        inputs, outputs = self._geometry.shape
        self.down = self.add_weight(
            shape=(inputs, self.rank),
            initializer=self.down_initializer,
            dtype="float32",
            name="down",
        )
        self.up = self.add_weight(
            shape=(self.rank, outputs),
            initializer=self.up_initializer,
            dtype="float32",
            name="up",
        )
        self._gate = row

    def truncate(
        self, arguments: AdapterArguments, row: GateRow, factors: Factors
    ) -> None:
        """Replaces the adapter by `Factors`, with a new maximum rank.

        `arguments` have that rank, and `row` is the row of its gate. If the
        factors have a lower rank, the other columns are zero.
        """
        factors = factors.padded(arguments.rank)
        trainable = [v.trainable for v in (self.down, self.up)]
        _keras.forget(self, "down", "up")
        self.set_arguments(arguments)
        with _keras.unlocked(self):
            self._add_adapter(row)
        for variable, value, flag in zip(
            (self.down, self.up),
            (factors.down, factors.up),
            trainable,
            strict=True,
        ):
            variable.assign(value)
            variable.trainable = flag

    @property
    def trainable(self) -> bool:
        """Whether the adapter is trainable; the base layer never is."""
        return super().trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        keras.Layer.trainable.fset(self, value)
        if hasattr(self, "_gate"):
            self._freeze_base()

    def _freeze_base(self):
        for variable in self.base_weights:
            variable.trainable = False

    def _own_state(self):
        row = getattr(self, "_gate", None)
        return row.gate.variables if row else {}

    @property
    def base_kernel(self) -> keras.Variable:
        """The variable of the base layer that the adapter updates."""
        return getattr(self, self.kernel_name)

    @property
    def base_weights(self) -> list[keras.Variable]:
        """The variables of the base layer."""
        adapter = (self.down, self.up)
        return [w for w in self.weights if all(w is not a for a in adapter)]

    @property
    def scale(self) -> ranks.Scale:
        """The `Scale` of the model, or of a layer on its own."""
        return self._gate.gate.scale

    @property
    def active_rank(self) -> int:
        """int. The rank that the layer computes at; `rank` is the maximum."""
        return self._gate.active_rank

    def set_rank(self, rank: int) -> None:
        """Sets the rank that the layer computes at, in `0..self.rank`.

        At `0`, it computes what the base layer does. In a model that
        `enable_dylora` made, all layers get the rank.

        Args:
            rank: int in `0..self.rank`.

        Raises:
            TypeError: if `rank` isn't an integer.
            ValueError: if `rank` is out of range, or the layer isn't built.
        """
        if not self.built:
            raise ValueError(
                "A layer must be built before its rank is set. "
                f"Received: {self.name}, which isn't built"
            )
        rank = ranks.as_rank(rank, 0, self.rank)
        warn_of_cut([rank], self.min_rank, lambda: [self.factors()])
        self._gate.gate.set_rank(rank)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        base = None
        if torch_product.ON_TORCH:
            base = torch_product.base(self, inputs)
        if base is None:
            return self._call_adapted("call", inputs, training)
        outputs, rows, kept = base
        gate, down, up = self._sides(training)
        bottleneck = self._dropped(rows, training) @ down
        bottleneck = gated(self, bottleneck, gate, kept)
        outputs = torch_product.add_product(self, outputs, bottleneck, up, kept)
        return self._activated(outputs)

    def quantized_call(self, inputs: Any, training: bool | None = None) -> Any:
        return self._call_adapted("quantized_call", inputs, training)

    def _call_adapted(self, method, inputs, training):
        gate, down, up = self._sides(training)
        bottleneck, kept = self._project(inputs, down, training)
        update = self._expand(gated(self, bottleneck, gate, kept), up, kept)
        # The adapter is added before the activation.
        base = _keras.stand_in(self, self.original_class, activation=None)
        return self._activated(getattr(base, method)(inputs) + update)

    def _activated(self, outputs):
        activation = getattr(self, "activation", None)
        return activation(outputs) if activation else outputs

    def _project(self, inputs, down, training):
        """`x @ down` as a matrix, and the axes of the input that stay."""
        rows, kept = self._geometry.rows(inputs)
        rows = ops.cast(rows, self.compute_dtype)
        return self._dropped(rows, training) @ down, kept

    def _expand(self, bottleneck, up, kept):
        """`bottleneck @ up` in the shape of an output."""
        return self._geometry.back(bottleneck @ up, kept)

    def _dropped(self, x, training):
        if self.dropout and training:
            x = keras.random.dropout(x, self.dropout, seed=self._dropout_seed)
        return x

    def _sides(self, training):
        """The gate, `down` and `up`, as a call uses them."""
        # With rematerialization on JAX, `training` is a tracer, not a bool.
        if training is True and self.min_rank < self.rank:
            self._gate.warn_unless_chosen(self.path)
        gate = self._gate.value(self.compute_dtype)
        down = _cast(self.down, self.compute_dtype)
        up = _cast(self.up, self.compute_dtype)
        # Frozen mode never trains with a rank for each example.
        if self.frozen and len(gate.shape) == 1:
            newest = self._gate.newest()
            down = _gradient_where(newest, down)
            up = _gradient_where(newest[:, None], up)
        return gate, down, up

    def factors(self, rank: int | None = None) -> Factors:
        """The adapter as `Factors`, cut to a rank if one is given."""
        scale = self.scale
        whole = Factors(
            float32_array(self.down),
            float32_array(self.up),
            scale.at(self.rank),
        )
        return whole if rank is None else whole.cut(rank, scale)

    def delta_kernel(self, rank: int) -> np.ndarray:
        """The update of the kernel at a rank in `0..self.rank`, in NumPy.

        It is that of the first columns, even if the rank has a tuned cut.
        """
        ranks.as_rank(rank, 0, self.rank)
        return self.kernel_update(self.factors(rank))

    def kernel_update(self, factors: Factors) -> np.ndarray:
        """The update of the kernel that `Factors` stand for, in NumPy."""
        return self._geometry.kernel(factors.product())

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        store["down"] = self.down
        store["up"] = self.up
        store["active_rank"] = np.asarray(self.active_rank, dtype="int32")

    def load_own_variables(self, store: Any) -> None:
        if "down" not in store.keys():
            raise ValueError(
                f"The file holds no adapter for layer '{self.path}'. Load the "
                "weights of a base model before you enable DyLoRA."
            )
        super().load_own_variables(store)
        self.down.assign(store["down"])
        self.up.assign(store["up"])
        self._gate.set_rank(int(np.asarray(store["active_rank"])))

    def get_config(self) -> dict[str, Any]:
        if self._is_upgraded:
            raise ValueError(
                "A layer of an enabled model can't be copied alone, which is "
                "what `clone_model` does. For a model with fresh weights, use "
                "`model.from_config(model.get_config())`. "
                f"Received: {self.path}"
            )
        return {
            **super().get_config(),
            **dataclasses.asdict(AdapterArguments.of(self)),
            "down_initializer": keras.initializers.serialize(
                self.down_initializer
            ),
            "up_initializer": keras.initializers.serialize(self.up_initializer),
        }


# The attributes that `upgrade` gives a layer, variables aside.
_ATTRIBUTES = (
    *(field.name for field in dataclasses.fields(AdapterArguments)),
    "down_initializer",
    "up_initializer",
    "_geometry",
    "_gate",
    "_is_upgraded",
)


def _gradient_where(mask, x):
    """Returns `x`, with a gradient of zero where `mask` is false."""
    return ops.where(mask, x, ops.stop_gradient(x))
