"""Geometry: the kernel of a linear layer as a matrix."""

import dataclasses
import math

import numpy as np
from keras import ops


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How the kernel of a linear layer is a matrix.

    `inputs` are the sizes of the input axes of the kernel, in the order of an
    input. `outputs` are the sizes of its output axes, in the order of an
    output. `kernel_axes` transposes `inputs + outputs` to the order of the
    kernel. `input_order` is the einsum equation that moves the input axes of an
    input to the end, and `output_order` the one that moves output axes to their
    places. Both are `None` where nothing moves.
    """

    inputs: tuple
    outputs: tuple
    kernel_axes: tuple = (0, 1)
    input_order: str | None = None
    output_order: str | None = None

    @classmethod
    def of_equation(cls, equation, shape):
        """The geometry of an `EinsumDense` layer with a kernel of this shape.

        Raises a `ValueError` if an axis of the kernel is on both sides or on
        neither.
        """
        left, output = equation.replace(" ", "").split("->")
        source, kernel = left.split(",")
        inputs = [a for a in source if a in kernel and a not in output]
        outputs = [a for a in output if a in kernel and a not in source]
        if "." in kernel or sorted(inputs + outputs) != sorted(kernel):
            raise ValueError(
                "An adapter needs an equation in which every axis of the "
                "kernel is either summed over or new in the output. "
                f"Received: equation={equation!r}"
            )
        kept = [a for a in source if a not in inputs]
        sizes = dict(zip(kernel, shape, strict=True))
        return cls(
            tuple(sizes[axis] for axis in inputs),
            tuple(sizes[axis] for axis in outputs),
            tuple((inputs + outputs).index(axis) for axis in kernel),
            _transposition(source, "".join(kept + inputs)),
            _transposition("".join(kept + outputs), output),
        )

    @property
    def shape(self):
        """`(inputs, outputs)` of the matrix."""
        return math.prod(self.inputs), math.prod(self.outputs)

    def rows(self, x):
        """An input of the layer as a matrix, and the sizes of its other axes.

        With an input of more axes, XLA takes five times longer for the gradient
        of a layer on a CPU.
        """
        if self.input_order:
            x = ops.einsum(self.input_order, x)
        kept = ops.shape(x)[: len(x.shape) - len(self.inputs)]
        return ops.reshape(x, (-1, self.shape[0])), kept

    def back(self, rows, kept):
        """Turns the rows of an output into the shape of an output again."""
        x = ops.reshape(rows, (*kept, *self.outputs))
        return ops.einsum(self.output_order, x) if self.output_order else x

    def kernel(self, matrix):
        """Puts a NumPy matrix into the shape of the kernel.

        A side of size 1 stays of size 1, to be broadcast.
        """
        inputs, outputs = (
            axes if size > 1 else (1,) * len(axes)
            for size, axes in zip(
                matrix.shape, (self.inputs, self.outputs), strict=True
            )
        )
        x = np.reshape(matrix, (*inputs, *outputs))
        return np.transpose(x, self.kernel_axes)


def _transposition(old, new):
    return None if old == new else f"{old}->{new}"
