"""The gate has a row for each layer: ranks of their own without a retrace."""

import keras
import numpy as np
import pytest

import keras_dylora as kd
from tests import backend
from tests.models import (
    classification_loss,
    labels,
    mlp,
    mlp_data,
    randomize,
    randomize_adapters,
    roberta_classifier,
    tokens,
)

RANKS = [3, 1, 0, 4]


def enabled():
    model = randomize(roberta_classifier(), scale=0.1)
    return randomize_adapters(kd.enable_dylora(model, rank=4))


def with_ranks(model):
    for layer, rank in zip(model.dylora_layers, RANKS, strict=True):
        layer._gate.set_rank(rank)
    return model


def merged_by_hand(model):
    """A plain model whose kernels have each layer's update at its own rank."""
    plain = kd.merge(model, rank=0)
    kernels = {v.path: v for v in plain.weights if v.name == "kernel"}
    for layer, rank in zip(model.dylora_layers, RANKS, strict=True):
        kernel = kernels[layer.kernel.path]
        kernel.assign(backend.to_numpy(kernel) + layer.delta_kernel(rank))
    return plain


@pytest.mark.once
def test_a_layer_has_a_rank_of_its_own():
    model = enabled()
    assert model.dylora_layers[0]._gate.gate.variable.shape == (4, 4)
    model.predict(tokens(), verbose=0)
    with backend.count_compilations(model) as counts:
        found = with_ranks(model).predict(tokens(), verbose=0)
    assert backend.NAME == "torch" or not counts  # which compiles nothing
    assert [layer.active_rank for layer in model.dylora_layers] == RANKS
    expected = merged_by_hand(model).predict(tokens(), verbose=0)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    model.set_rank(2)
    assert [layer.active_rank for layer in model.dylora_layers] == [2] * 4


@pytest.mark.once
def test_ranks_of_layers_are_saved_and_survive_training(tmp_path):
    model = with_ranks(enabled())
    expected = model.predict(tokens(), verbose=0)
    model.save(tmp_path / "model.keras")
    model = keras.saving.load_model(tmp_path / "model.keras")
    found = model.predict(tokens(), verbose=0)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    model.compile(keras.optimizers.SGD(0.0), classification_loss())
    model.fit(tokens(), labels(), verbose=0)
    found = model.predict(tokens(), verbose=0)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_hand_built_layer_has_a_gate_of_its_own():
    model = randomize_adapters(mlp())
    first, second = model.dylora_layers
    first._gate.set_rank(1)
    assert (first.active_rank, second.active_rank) == (1, 4)
    x, _ = mlp_data()
    alone = model.predict(x, verbose=0)
    model.set_rank(4)
    assert np.abs(model.predict(x, verbose=0) - alone).max() > 1e-3


def test_layers_read_what_a_checkpoint_sets():
    """The variable is the truth, whoever changes it, and how."""
    model = randomize_adapters(mlp())
    x, _ = mlp_data()
    layer = model.dylora_layers[0]
    gate = layer._gate.gate.variable
    at_full = backend.to_numpy(layer(x))
    layer.set_rank(1)
    at_one, row = backend.to_numpy(layer(x)), backend.to_numpy(gate)
    assert np.abs(at_one - at_full).max() > 1e-3
    layer.set_rank(4)
    gate.assign(row)
    np.testing.assert_array_equal(backend.to_numpy(layer(x)), at_one)
    if backend.NAME == "torch":
        import torch

        layer.set_rank(4)
        layer(x)
        with torch.no_grad():
            gate.value.copy_(torch.tensor(row))
        np.testing.assert_array_equal(backend.to_numpy(layer(x)), at_one)
        layer.set_rank(4)
        layer(x)
        gate.value.data = torch.tensor(row)  # as a move to a device does
        np.testing.assert_array_equal(backend.to_numpy(layer(x)), at_one)
    mapping = [(gate, keras.ops.convert_to_tensor(row))]
    layer.set_rank(4)
    with keras.StatelessScope(state_mapping=mapping):
        np.testing.assert_array_equal(backend.to_numpy(layer(x)), at_one)
    np.testing.assert_array_equal(backend.to_numpy(layer(x)), at_full)


@pytest.mark.parametrize("rank", [-1, 5])
def test_a_rank_that_is_none(rank):
    layer = enabled().dylora_layers[1]
    with pytest.raises(ValueError, match=f"Received: rank={rank}"):
        layer._gate.set_rank(rank)
    assert layer.active_rank == 4
