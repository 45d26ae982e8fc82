"""EvaluationData: whatever `evaluate` takes is taken by all."""

import numpy as np
import pandas
import pytest
import scipy.sparse

import keras_dylora as kd
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


def frames(x, y):
    return pandas.DataFrame(x), pandas.DataFrame(y)


def of_tensorflow(x, y):
    import tensorflow as tf

    return tf.constant(x), tf.constant(y)


def of_torch(x, y):
    import torch

    return torch.tensor(x), torch.tensor(y)


def loader(x, y):
    import torch

    data = torch.utils.data.TensorDataset(*of_torch(x, y))
    return torch.utils.data.DataLoader(data, batch_size=32), None


KINDS = {
    "pandas": frames,
    "lists-of-arrays": lambda x, y: ([x], [y]),
    "tensorflow": of_tensorflow,
    "torch": of_torch,
    "torch-loader": loader,
    "scipy-matrix": lambda x, y: (scipy.sparse.csr_matrix(x), y),
    "scipy-array": lambda x, y: (scipy.sparse.csr_array(x), y),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.once
def test_what_evaluate_takes(kind):
    model = randomize_adapters(mlp())
    model.compile("adam", "mse")
    data = mlp_data()
    report = kd.evaluate_ranks(model, *KINDS[kind](*data), [2], verbose=0)
    same = kd.evaluate_ranks(model, *data, [2], verbose=0)
    assert report.metrics[2] == pytest.approx(same.metrics[2], rel=1e-5)
    found = kd.allocate_ranks(model, *KINDS[kind](*data), verbose=0)
    if kind != "torch-loader":  # whose order is its own
        assert found == kd.allocate_ranks(model, *data, verbose=0)


@pytest.mark.once
def test_a_dict_of_frames_and_a_series_of_labels():
    model = randomize(roberta_classifier())
    kd.enable_dylora(model, rank=4, scaling="constant", verbose=0)
    model.compile(loss=classification_loss(), metrics=["accuracy"])
    randomize_adapters(model)
    x = {name: pandas.DataFrame(v) for name, v in tokens().items()}
    data = x, pandas.Series(labels()), 0.5, pandas.Series(np.ones(32))
    same = tokens(), labels(), 0.5, np.ones(32)
    found = kd.allocate_ranks(model, *data, verbose=0)
    assert found == kd.allocate_ranks(model, *same, verbose=0)
    report = kd.evaluate_ranks(model, *data[:2], [found], verbose=0)
    assert report.metrics[found]["accuracy"] == pytest.approx(
        model_accuracy(model, found)
    )


def model_accuracy(model, rank):
    with model.rank_scope(rank):
        return model.evaluate(tokens(), labels(), verbose=0)[1]


@pytest.mark.parametrize("call", [kd.evaluate_ranks, kd.allocate_ranks])
@pytest.mark.parametrize("kind", ["pandas", "scipy-matrix"])
def test_no_examples_or_targets(kind, call):
    model = mlp()
    model.compile("adam", "mse")
    x, y = mlp_data()
    with pytest.raises(ValueError, match="no example"):
        call(model, *KINDS[kind](x[:0], y[:0]))
    with pytest.raises(ValueError, match="targets.*y=None"):
        call(model, KINDS[kind](x, y)[0])
