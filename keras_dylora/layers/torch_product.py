"""The base and the adapter of a layer, in as few passes as torch can.

Keras adds the bias of a `Dense` in a pass of its own, and computes attention
projections by `einsum`. Here, both are products of matrices that also add the
bias and the adapter. The compilers of the other backends do this themselves:
`ON_TORCH` is false there, and nothing here is used.
"""

import keras

from keras_dylora import ranks

ON_TORCH = keras.backend.backend() == "torch"
if ON_TORCH:
    import torch


def base(layer, inputs):
    """The output of a base layer as a matrix, before its activation.

    Returns:
        A new tensor `(rows, outputs)`; the input as a matrix; and the axes that
        both have in front. `None` if the layer isn't a plain product of
        matrices.
    """
    geometry = layer._geometry
    kernel = layer.kernel.value
    if (
        geometry.input_order
        or geometry.output_order
        or geometry.kernel_axes != tuple(range(kernel.ndim))
        or inputs.dtype != kernel.dtype
    ):
        return None
    kept = inputs.shape[: inputs.ndim - len(geometry.inputs)]
    rows = inputs.reshape(-1, geometry.shape[0])
    kernel = kernel.reshape(geometry.shape)
    if layer.bias is None:
        return rows @ kernel, rows, kept
    bias = layer.bias.value
    if bias.shape != geometry.outputs:
        if bias.ndim > len(geometry.outputs):
            return None
        bias = bias.expand(geometry.outputs)
    return torch.addmm(bias.reshape(-1), rows, kernel), rows, kept


def add_product(layer, rows, a, b, kept):
    """The output of a layer: `rows + a @ b`, computed in place."""
    return rows.addmm_(a, b).view(*kept, *layer._geometry.outputs)


def cast(variable, dtype):
    return variable.value.to(getattr(torch, dtype))


class GateRows:
    """The rows of a gate, copied once for all layers that read them.

    They are copies, as torch can't differentiate after the variable changed.
    """

    def __init__(self):
        self._kept = None, None, {}  # the value, its state, rows by name

    def row(self, variable, index, dtype):
        def cast_row(value):
            return value.to(getattr(torch, dtype), copy=True)

        return self._row(variable, index, dtype, cast_row)

    def newest(self, variable, index):
        return self._row(variable, index, "newest", ranks.newest)

    def _row(self, variable, index, name, function):
        value = variable.value
        # While a step is traced, the value is a placeholder.
        now = type(value) in (torch.Tensor, torch.nn.Parameter)
        if not now or torch.compiler.is_compiling() or value.is_inference():
            return function(value[index])
        # `_version` counts assignments; another place is another device.
        state = value.data_ptr(), value._version
        *kept, rows = self._kept
        if kept[0] is not value or kept[1] != state:
            rows = {}
            self._kept = value, state, rows  # at once, as threads share it
        if name not in rows:
            # A call in inference mode may make rows that training reads.
            with torch.inference_mode(False):
                rows[name] = function(value.detach()).unbind()
        return rows[name][index]
