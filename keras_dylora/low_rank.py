"""The low-rank part that both layers share, and the gate that they read."""

import contextlib

import keras
import numpy as np
from keras import ops

from keras_dylora import ranks
from keras_dylora._keras import forget
from keras_dylora._keras import set_class
from keras_dylora._keras import unlocked
from keras_dylora.config import check_adapter_arguments


class RankGate:
    """The gate vector that one or many adapted layers read.

    It lives in a variable, so a new rank neither retraces nor recompiles, and
    outside of `weights`, as it is state and not something learned.

    Args:
        rank: int. Length of the gate.
        alpha: float. Scale of the adapters.
    """

    def __init__(self, rank, alpha):
        self.rank = rank
        self.alpha = alpha
        self.active_rank = rank
        self.override = None
        self.variable = keras.Variable(
            # Callable, as a layer may be built while JAX traces.
            lambda shape, dtype: ranks.gate(rank, rank, alpha),
            shape=(rank,),
            dtype="float32",
            trainable=False,
            autocast=False,
            aggregation="only_first_replica",
            name="gate",
        )

    @property
    def value(self):
        """`(rank,)`, or `(batch, rank)` where examples have their own rank."""
        return self.variable if self.override is None else self.override

    def set_rank(self, rank):
        self.active_rank = ranks.as_rank(rank, 0, self.rank)
        self.variable.assign(ranks.gate(rank, self.rank, self.alpha))


@contextlib.contextmanager
def overridden(gates, value):
    """Within it, the layers read `value` in place of their gates."""
    for gate in gates:
        gate.override = value
    try:
        yield
    finally:
        for gate in gates:
            gate.override = None


class LowRankAdapter:
    """What both layers share: `h = base(x) + ((x @ down) * gate) @ up`.

    The concrete class says which matrix its base layer's kernel is.
    """

    base_class = None
    # Einsum equations, where the axes aren't in the order of the matrix.
    _input_order = _output_order = None

    def __init__(
        self,
        *args,
        rank=8,
        min_rank=1,
        alpha=16.0,
        frozen=False,
        dropout=0.0,
        down_initializer=None,
        up_initializer="zeros",
        **kwargs,
    ):
        if kwargs.get("lora_rank") is not None:
            raise ValueError(
                f"`{type(self).__name__}` has an adapter of its own and takes "
                f"no `lora_rank`. Received: lora_rank={kwargs['lora_rank']}"
            )
        super().__init__(*args, **kwargs)
        self._set_adapter_arguments(
            rank, min_rank, alpha, frozen, dropout, down_initializer,
            up_initializer,
        )  # fmt: skip

    def _set_adapter_arguments(
        self,
        rank,
        min_rank,
        alpha,
        frozen,
        dropout,
        down_initializer,
        up_initializer,
    ):
        check_adapter_arguments(rank, min_rank, alpha, frozen, dropout)
        self.rank = int(rank)
        self.min_rank = int(min_rank)
        self.alpha = float(alpha)
        self.frozen = frozen
        self.dropout = float(dropout)
        # The authors' kaiming_uniform(a=sqrt(5)): limits 1 / sqrt(fan_in).
        self.down_initializer = keras.initializers.get(
            down_initializer
            or keras.initializers.VarianceScaling(
                1 / 3, mode="fan_in", distribution="uniform"
            )
        )
        self.up_initializer = keras.initializers.get(up_initializer)

    @classmethod
    def check_base(cls, layer):
        """Raises `ValueError` if a built base layer can't take an adapter."""
        if layer.kernel_constraint is not None:
            raise ValueError(
                "A layer with a `kernel_constraint` can't be adapted. "
                f"Received: {layer.name}"
            )
        if layer.lora_enabled:
            raise ValueError(
                "A layer with Keras's own LoRA can't be adapted too. "
                f"Received: {layer.name}"
            )
        if layer.quantization_mode not in (None, "int8", "int4"):
            raise ValueError(
                "Only float, int8 and int4 layers can be adapted. Received: "
                f"{layer.name} with quantization_mode="
                f"{layer.quantization_mode}"
            )

    @classmethod
    def attach(cls, layer, gate, seed, **arguments):
        """Turns a built base layer into this class, in place."""
        set_class(layer, cls)
        initializer = keras.initializers.VarianceScaling(
            1 / 3, mode="fan_in", distribution="uniform", seed=seed
        )
        layer._set_adapter_arguments(
            **arguments, down_initializer=initializer, up_initializer="zeros"
        )
        with unlocked(layer):
            layer._build_adapter(gate, seed)
        return layer

    def build(self, input_shape):
        super().build(input_shape)
        self._build_adapter(RankGate(self.rank, self.alpha), seed=None)

    def _build_adapter(self, gate, seed):
        self._set_geometry()
        self._dropout_seed = (
            keras.random.SeedGenerator(seed) if self.dropout else None
        )
        self._add_adapter(gate)
        self._freeze_base()

    def _add_adapter(self, gate):
        inputs, outputs = self.adapter_dims(self)
        self.down = self.add_weight(
            shape=(int(np.prod(inputs)), self.rank),
            initializer=self.down_initializer,
            dtype="float32",
            name="down",
        )
        self.up = self.add_weight(
            shape=(self.rank, int(np.prod(outputs))),
            initializer=self.up_initializer,
            dtype="float32",
            name="up",
        )
        self._gate = gate
        self._gate_variable = gate.variable

    def truncate(self, rank, min_rank, gate):
        """Cuts `down` and `up` to their first `rank` columns and rows.

        Args:
            rank: int in `1..self.rank`. The new maximum rank.
            min_rank: int. The new lowest rank.
            gate: `RankGate` of the new rank.
        """
        down = float32_array(self.down)[:, :rank]
        up = float32_array(self.up)[:rank]
        trainable = [v.trainable for v in (self.down, self.up)]
        forget(self, "down", "up", "_gate_variable")
        self.rank, self.min_rank = rank, min_rank
        with unlocked(self):
            self._add_adapter(gate)
        for variable, value, flag in zip(
            (self.down, self.up), (down, up), trainable, strict=True
        ):
            variable.assign(value)
            variable.trainable = flag

    @property
    def trainable(self):
        """Whether the adapter is trainable; the base layer never is."""
        return self._trainable

    @trainable.setter
    def trainable(self, value):
        keras.layers.Layer.trainable.fset(self, value)
        if hasattr(self, "_gate"):
            self._freeze_base()

    def _freeze_base(self):
        for variable in self.base_weights:
            variable.trainable = False

    @property
    def weights(self):
        gate = getattr(self, "_gate_variable", None)
        return [w for w in super().weights if w is not gate]

    @property
    def base_weights(self):
        """The variables of the base layer."""
        adapter = (self.down, self.up)
        return [w for w in self.weights if all(w is not a for a in adapter)]

    @property
    def active_rank(self):
        """int. The rank that the layer computes at."""
        return self._gate.active_rank

    def set_rank(self, rank):
        """Sets the rank that the layer computes at.

        The layers that `enable_dylora` adapts share one rank.

        Args:
            rank: int in `0..self.rank`. `0` gives the base layer.

        Raises:
            ValueError: if `rank` is out of range.
            TypeError: if `rank` isn't an integer.
        """
        if not self.built:
            raise ValueError(
                "A layer must be built before its rank is set. "
                f"Received: {self.name}, which isn't built"
            )
        self._gate.set_rank(rank)

    def call(self, inputs, training=None):
        return self._call_adapted(super().call, inputs, training)

    def quantized_call(self, inputs, training=None):
        return self._call_adapted(super().quantized_call, inputs, training)

    def _call_adapted(self, base_call, inputs, training):
        activation = self.activation
        if activation in (None, keras.activations.linear):
            return base_call(inputs) + self._call_adapter(inputs, training)
        # The adapter is added before the activation, which the base layer's
        # call would apply.
        self.activation = None
        try:
            outputs = base_call(inputs)
        finally:
            self.activation = activation
        return activation(outputs + self._call_adapter(inputs, training))

    def _call_adapter(self, inputs, training):
        gate = ops.convert_to_tensor(self._gate.value)
        down = ops.cast(self.down, self.compute_dtype)
        up = ops.cast(self.up, self.compute_dtype)
        if self.frozen:
            newest = ranks.column(
                ops.sum(ops.cast(gate > 0, "int32")), self.rank
            )
            down = _gradient_where(newest, down)
            up = _gradient_where(newest[:, None], up)
        if self.dropout and training:
            inputs = keras.random.dropout(
                inputs, self.dropout, seed=self._dropout_seed
            )
        bottleneck = self._project_down(inputs, down)
        gate = ops.cast(gate, bottleneck.dtype)
        if len(gate.shape) == 2:
            # One rank for each example, of which there may be more here: beam
            # search folds its beams into the batch.
            examples = ops.shape(bottleneck)[0]
            copies = examples // ops.maximum(ops.shape(gate)[0], 1)
            gate = ops.repeat(gate, copies, axis=0)
            middle = (1,) * (len(bottleneck.shape) - 2)
            gate = ops.reshape(gate, (-1, *middle, self.rank))
        return self._project_up(bottleneck * gate, up)

    # As matrices: with more axes, a layer's gradient takes XLA five times
    # longer on a CPU.

    def _project_down(self, inputs, down):
        if self._input_order:
            inputs = ops.einsum(self._input_order, inputs)
        dims, _ = self._adapter_dims
        kept = ops.shape(inputs)[: len(inputs.shape) - len(dims)]
        rows = ops.reshape(inputs, (-1, down.shape[0]))
        return ops.reshape(ops.matmul(rows, down), (*kept, self.rank))

    def _project_up(self, bottleneck, up):
        _, outputs = self._adapter_dims
        kept = ops.shape(bottleneck)[:-1]
        rows = ops.matmul(ops.reshape(bottleneck, (-1, self.rank)), up)
        update = ops.reshape(rows, (*kept, *outputs))
        if self._output_order:
            update = ops.einsum(self._output_order, update)
        return update

    def delta_kernel(self, rank):
        """The adapter's update of the kernel at one rank.

        Args:
            rank: int in `0..self.rank`.

        Returns:
            A float32 NumPy array in the shape of the kernel.
        """
        ranks.as_rank(rank, 0, self.rank)
        gate = ops.convert_to_numpy(ranks.gate(rank, self.rank, self.alpha))
        down, up = float32_array(self.down), float32_array(self.up)
        inputs, outputs = self.adapter_dims(self)
        delta = np.reshape((down * gate) @ up, (*inputs, *outputs))
        return self.in_kernel_order(delta)

    def in_kernel_order(self, x):
        """Transposes an array with input axes, then output axes."""
        return np.transpose(x, self._kernel_axes)

    def save_own_variables(self, store):
        super().save_own_variables(store)
        store["down"] = self.down
        store["up"] = self.up
        store["active_rank"] = np.asarray(self.active_rank, dtype="int32")

    def load_own_variables(self, store):
        if "down" not in store.keys():
            raise ValueError(
                f"The file holds no adapter for layer '{self.path}'. Load the "
                "weights of a base model before you enable DyLoRA."
            )
        super().load_own_variables(store)
        self.down.assign(store["down"])
        self.up.assign(store["up"])
        self.set_rank(int(np.asarray(store["active_rank"])))

    def _check_load_own_variables(self, store):
        # The base layers count the variables of a plain layer.
        pass

    def get_config(self):
        return {
            **super().get_config(),
            "rank": self.rank,
            "min_rank": self.min_rank,
            "alpha": self.alpha,
            "frozen": self.frozen,
            "dropout": self.dropout,
            "down_initializer": keras.initializers.serialize(
                self.down_initializer
            ),
            "up_initializer": keras.initializers.serialize(self.up_initializer),
        }


def float32_array(variable):
    return np.asarray(ops.convert_to_numpy(variable), dtype="float32")


def _gradient_where(mask, x):
    """`x`, whose gradient is zero where `mask` is false."""
    return ops.where(mask, x, ops.stop_gradient(x))
