"""Properties of any shape, equation, rank, scaling and dtype (hypothesis)."""

import re
import string

import keras
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import keras_dylora as kd
from tests import backend

SETTINGS = settings(max_examples=50, deadline=None, derandomize=True)
SCALINGS = st.sampled_from(["rank", "sqrt", "constant"])
# By the digits that a dtype has; TensorFlow's products of halves have fewer.
TOLERANCE = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 1e-1}


@st.composite
def equations(draw):
    """An equation of `EinsumDense`, with the sizes of its axes."""
    letters = iter(string.ascii_lowercase)
    batch, inputs, outputs = (
        "".join(next(letters) for _ in range(draw(st.integers(1, n))))
        for n in (2, 2, 3)
    )
    kernel = "".join(draw(st.permutations(inputs + outputs)))
    equation = f"{batch}{inputs},{kernel}->{batch}{outputs}"
    axes = batch + inputs + outputs
    return equation, {axis: draw(st.integers(1, 4)) for axis in axes}


@pytest.mark.long
@SETTINGS
@given(
    equations(),
    st.integers(1, 5),
    SCALINGS,
    st.sampled_from(list(TOLERANCE)),
    st.data(),
)
def test_a_layer_computes_its_merged_kernel(shape, rank, scaling, dtype, data):
    equation, sizes = shape
    source, _, output = re.split("[,>]", equation.replace("-", ""))
    # Any axis of the output but the first may have a bias.
    bias_axes = [axis for axis in output[1:] if data.draw(st.booleans())]
    # On TensorFlow, Keras adds a vector along the last axis, or the second, if
    # it has their size, whatever axis it is of (3.15).
    long = [axis for axis in bias_axes if sizes[axis] > 1]
    ends = {output[1], output[-1]} - set(long)
    mistaken = len(long) == 1 and any(
        sizes[axis] == sizes[long[0]] for axis in ends
    )
    assume(backend.NAME != "tensorflow" or not mistaken)
    layer = kd.DyLoRAEinsumDense(
        equation,
        tuple(sizes[axis] for axis in output[1:]),
        rank=rank,
        alpha=float(rank),
        scaling=scaling,
        bias_axes="".join(bias_axes) or None,
        activation=data.draw(st.sampled_from([None, "relu"])),
        dtype=dtype,
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=[sizes[axis] for axis in source])
    layer.build(x.shape)
    for weight in layer.weights:
        weight.assign(0.3 * rng.normal(size=weight.shape))
    b = data.draw(st.integers(0, rank))
    layer.set_rank(b)
    assert layer.active_rank == b
    found = layer(keras.ops.convert_to_tensor(x, dtype))
    assert keras.backend.standardize_dtype(found.dtype) == dtype
    kernel = backend.to_numpy(keras.ops.cast(layer.kernel, "float32"))
    expected = np.einsum(equation, x, kernel + layer.delta_kernel(b))
    if bias_axes:
        expected += backend.to_numpy(keras.ops.cast(layer.bias, "float32"))
    if layer.activation is keras.activations.relu:
        expected = np.maximum(expected, 0.0)
    np.testing.assert_allclose(
        backend.to_numpy(keras.ops.cast(found, "float32")),
        expected,
        atol=TOLERANCE[dtype] * max(1.0, np.abs(expected).max()),
    )
