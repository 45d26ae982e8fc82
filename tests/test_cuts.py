"""Cuts: a rank that is no good is warned of, once, at every door."""

import warnings

import numpy as np
import pytest

import keras_dylora as kd
from keras_dylora.layers.low_rank import LowRankAdapter
from tests import backend
from tests.models import (
    allocation,
    gpt2,
    mlp,
    mlp_data,
    randomize_adapters,
    tokens,
)

RANK = 4


def lora(**options):
    """A language model with a LoRA of one rank, whose columns have no order."""
    model = kd.enable_dylora(
        gpt2(), rank=RANK, min_rank=RANK, verbose=0, **options
    )
    return randomize_adapters(model)


def scope(model, folder, rank):
    with model.rank_scope(rank):
        pass


def export(model, folder, rank, **options):
    (folder / "kept").write_text("")
    with pytest.raises(ValueError):  # the warning comes before the files
        kd.export_ranks(model, folder, [rank, 3, RANK], verbose=0, **options)


def from_peft(model, folder, rank):
    kd.to_peft(model, folder / "peft")
    kd.from_peft(gpt2(), folder / "peft", strict=False, rank=rank)


DOORS = {
    "set_rank": lambda m, _, b: m.set_rank(b),
    "rank_scope": scope,
    "allocation": lambda m, _, b: m.set_rank(allocation(m, [0, b, 4, 4])),
    "layer": lambda m, _, b: m.dylora_layers[0].set_rank(b),
    "merge": lambda m, _, b: kd.merge(m, b),
    "truncate": lambda m, _, b: kd.truncate(m, b),
    "save_adapter": lambda m, folder, b: kd.save_adapter(m, folder / "a", b),
    "to_peft": lambda m, folder, b: kd.to_peft(m, folder / "a", b),
    "to_peft-ranks": lambda m, folder, b: kd.to_peft(
        m, folder / "a", ranks=[b, 3, 4]
    ),
    "from_peft": from_peft,
    "export_ranks": export,
    "export_ranks-adapters": lambda m, folder, b: export(
        m, folder, b, adapters="all"
    ),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.once
def test_a_bad_cut_is_warned_of_at_every_door(door, tmp_path):
    with pytest.warns(UserWarning) as found:
        DOORS[door](lora(), tmp_path, 2)
    (warning,) = [w for w in found if "order_ranks" in str(w.message)]
    assert "rank=2 of adapters that were trained from rank 4 on" in str(
        warning.message
    )
    assert warning.filename == __file__


def test_a_rank_that_is_no_rank_is_an_error_and_no_warning():
    model = lora()
    with warnings.catch_warnings(action="error", category=UserWarning):
        with pytest.raises(ValueError, match="rank=5"):
            model.set_rank(5)
        with pytest.raises(TypeError, match="'2'"):
            model.dylora_layers[0].set_rank("2")
    with (
        pytest.raises(UserWarning),
        warnings.catch_warnings(action="error", category=UserWarning),
    ):
        model.set_rank(1)
    assert model.rank == RANK


@pytest.mark.filterwarnings("error:Adapters are of use:UserWarning")
@pytest.mark.once
def test_good_cuts_and_reports_are_not_warned_of(tmp_path):
    model = randomize_adapters(mlp(min_rank=RANK))
    model.compile("adam", "mse")
    data = mlp_data()
    for rank in (0, RANK):
        model.set_rank(rank)
        kd.merge(model, rank)
    kd.evaluate_ranks(model, *data, ranks=range(5), verbose=0)
    model.fit(*data, verbose=0, callbacks=[kd.RankEvaluation(data)])
    kd.order_ranks(model)
    kd.save_adapter(model, tmp_path / "cut", rank=1)
    kd.truncate(model, 2)
    model.set_rank(1)


def test_what_is_trained_at_every_rank_is_not_looked_at(monkeypatch):
    model = randomize_adapters(mlp())
    monkeypatch.setattr(LowRankAdapter, "factors", pytest.fail)
    model.set_rank(1)
    with model.rank_scope(2):
        pass


@pytest.mark.skipif(backend.NAME != "tensorflow", reason="its graphs")
@pytest.mark.parametrize("options", [{}, {"full_rank_steps": 5}])
def test_a_scope_in_a_graph(options):
    import tensorflow as tf

    rank = 1 if options else RANK
    model = randomize_adapters(mlp(min_rank=rank, options=options))
    x, _ = mlp_data()

    @tf.function
    def low(x):
        with model.rank_scope(1):
            return model(x)

    found = low(x)
    with model._dylora.at(1):
        np.testing.assert_allclose(found, model(x), atol=1e-5)


def reported(model, ranks=None):
    model.compile("adam", "mse")
    return kd.evaluate_ranks(model, *mlp_data(), ranks, verbose=0)


@pytest.mark.once
def test_cuts_of_an_ordered_lora_are_chosen_from():
    model = randomize_adapters(mlp(min_rank=RANK))
    report = reported(model)
    assert list(map(report.state, report.ranks)) == [
        "untrained", "untrained", "untrained", "trained",
    ]  # fmt: skip
    assert report.best("loss", tolerance=1e9) == RANK
    kd.order_ranks(model)
    report = reported(model, range(5))
    assert list(map(report.state, report.ranks)) == [
        "base model", "cut", "cut", "cut", "trained",
    ]  # fmt: skip
    assert report.best("loss", tolerance=1e9) == 1
    assert reported(model, [2]).best("loss") == 2
    small = allocation(model, [1, 3])
    assert reported(model, [small]).best("loss") == small
    kd.truncate(model, 3)
    assert reported(model).best("loss", tolerance=1e9) == 1
    model.fit(*mlp_data(), verbose=0)  # and so they are in no order
    assert reported(model).best("loss", tolerance=1e9) == 3


def test_an_adapter_that_is_zero_has_no_order_to_keep():
    model = randomize_adapters(mlp(min_rank=RANK))
    layer = model.dylora_layers[1]
    layer.up.assign(np.zeros(layer.up.shape))
    kd.order_ranks(model)
    assert reported(model).state(1) == "cut"


@pytest.mark.once
def test_a_named_adapter_of_a_lower_rank(tmp_path):
    """It is trained at its own rank, whatever that of the model is."""
    source = kd.enable_dylora(gpt2(), rank=2, min_rank=2, verbose=0)
    kd.save_adapter(randomize_adapters(source), tmp_path / "small")
    model = lora()
    with warnings.catch_warnings(action="error", category=UserWarning):
        kd.load_adapter(model, tmp_path / "small", name="small", strict=False)
        model.set_rank(2)
    model.compile("adam", "sparse_categorical_crossentropy")
    y = tokens()["token_ids"]
    report = kd.evaluate_ranks(model, tokens(), y, verbose=0)
    assert list(map(report.state, (1, 2))) == ["untrained", "trained"]
    assert report.best("loss") == 2
    callback = kd.RankEvaluation((tokens(), y), ranks=[1, 2])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Adapters are of use")
        logs = model.fit(tokens(), y, verbose=0, callbacks=[callback]).history
    assert "val_rank1_loss" in logs
