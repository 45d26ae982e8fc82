"""evaluate_ranks and RankEvaluation."""

import csv

import keras
import keras_hub
import numpy as np
import pytest

import keras_dylora as kd
from tests import backend
from tests.models import (
    BuiltLate,
    classification_loss,
    labels,
    mlp,
    mlp_data,
    randomize,
    randomize_adapters,
    roberta_classifier,
    tokens,
)
from tests.text import TEXTS, text_classifier


def compiled():
    model = randomize_adapters(mlp())
    model.compile("adam", "mse", metrics=["mae"])
    return model


def test_every_rank_is_what_evaluate_says():
    model, (x, y) = compiled(), mlp_data()
    model.set_rank(3)
    report = kd.evaluate_ranks(model, x, y, ranks=range(5), verbose=0)
    assert report.ranks == [0, 1, 2, 3, 4] and model.rank == 3
    for rank, metrics in report.metrics.items():
        with model.rank_scope(rank):
            expected = model.evaluate(x, y, verbose=0, return_dict=True)
        assert metrics == pytest.approx(expected)


def test_datasets_and_sample_weights():
    import tensorflow as tf

    model, (x, y) = compiled(), mlp_data()
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    one = kd.evaluate_ranks(model, data, verbose=0).metrics
    two = kd.evaluate_ranks(model, x, y, batch_size=8, verbose=0).metrics
    for rank in one:
        assert one[rank] == pytest.approx(two[rank])
    weight = np.arange(len(x), dtype="float32")
    weighted = kd.evaluate_ranks(model, x, y, sample_weight=weight, verbose=0)
    assert weighted.metrics[2]["loss"] != two[2]["loss"]


@pytest.mark.once
def test_strings_are_preprocessed_once():
    model = text_classifier()
    kd.enable_dylora(model, rank=4)
    randomize_adapters(model)
    model.compile("adam", classification_loss(), metrics=["accuracy"])
    y = np.array([0, 1, 0, 1])
    preprocessor = model.preprocessor
    calls = []
    original = model.preprocess_samples

    def counted(*args, **kwargs):
        calls.append(model.preprocessor)
        return original(*args, **kwargs)

    object.__setattr__(model, "preprocess_samples", counted)
    report = kd.evaluate_ranks(model, TEXTS, y, batch_size=2, verbose=0)
    assert [c for c in calls if c is not None] == [preprocessor]
    object.__delattr__(model, "preprocess_samples")
    assert model.preprocessor is preprocessor
    for rank in range(1, 5):
        with model.rank_scope(rank):
            expected = model.evaluate(
                TEXTS, y, batch_size=2, verbose=0, return_dict=True
            )
        assert report.metrics[rank] == pytest.approx(expected, rel=1e-5)


def test_untrained_ranks_are_marked():
    model = roberta_classifier()
    kd.enable_dylora(model, rank=4, min_rank=4)  # fixed-rank LoRA
    model.compile("adam", classification_loss(), metrics=["accuracy"])
    report = kd.evaluate_ranks(
        model, tokens(), labels(), ranks=[0, 2, 4], verbose=0
    )
    text = str(report)
    assert text.count("untrained") == 1 and "base model" in text
    assert report.best("accuracy", tolerance=1.0) == 4


@pytest.mark.once
def test_lists_of_labels_and_weights():
    model = kd.enable_dylora(text_classifier(), rank=2)
    model.compile("adam", classification_loss())
    y, weights = [0, 1, 0, 1], [1.0, 2.0, 1.0, 0.0]
    found = kd.evaluate_ranks(model, TEXTS, y, sample_weight=weights, verbose=0)
    expected = kd.evaluate_ranks(
        model,
        TEXTS,
        np.array(y),
        sample_weight=np.array(weights),
        verbose=0,
    )
    assert found.metrics == expected.metrics
    callback = kd.RankEvaluation((TEXTS, y))
    model.fit(TEXTS, y, verbose=0, callbacks=[callback])


def test_progress_bar(capsys):
    kd.evaluate_ranks(compiled(), *mlp_data())
    assert "4/4" in capsys.readouterr().out


def test_callback_logs_every_rank(tmp_path):
    model, (x, y) = compiled(), mlp_data()
    history = model.fit(
        x,
        y,
        epochs=4,
        verbose=0,
        callbacks=[
            kd.RankEvaluation((x, y), ranks=[1, 4], every=2),
            keras.callbacks.CSVLogger(tmp_path / "all.csv"),
        ],
    ).history
    assert len(history["val_rank1_loss"]) == 2
    with model.rank_scope(4):
        expected = model.evaluate(x, y, verbose=0, return_dict=True)
    assert history["val_rank4_mae"][-1] == pytest.approx(expected["mae"])
    model.fit(
        x,
        y,
        verbose=0,
        callbacks=[
            kd.RankEvaluation([x, y]),  # a list, as Keras takes it
            keras.callbacks.CSVLogger(tmp_path / "each.csv"),
        ],
    )
    with open(tmp_path / "each.csv") as file:
        assert "val_rank4_mae" in next(csv.reader(file))


def test_callbacks_that_watch_a_rank(tmp_path):
    model, (x, y) = compiled(), mlp_data()
    stop = keras.callbacks.EarlyStopping(
        "val_rank2_mae", mode="max", restore_best_weights=True
    )
    best = keras.callbacks.ModelCheckpoint(
        tmp_path / "best.keras", "val_rank2_mae", mode="max",
        save_best_only=True,
    )  # fmt: skip
    ranks = kd.RankEvaluation((x, y), ranks=[2])
    history = model.fit(
        x, y, epochs=3, verbose=0, callbacks=[ranks, stop, best]
    ).history["val_rank2_mae"]
    assert len(history) == 2  # the error fell, so it stopped
    for found in (model, keras.saving.load_model(tmp_path / "best.keras")):
        report = kd.evaluate_ranks(found, x, y, [2], verbose=0)
        assert report.metrics[2]["mae"] == pytest.approx(history[0], rel=1e-5)


@pytest.mark.long
def test_callback_of_two_models_prepares_for_each():
    data = np.array(TEXTS), labels(4)
    callback = kd.RankEvaluation(data, ranks=[2])
    for length in (12, 3):
        model = randomize(text_classifier())
        model.preprocessor.sequence_length = length
        kd.enable_dylora(model, rank=2)
        model.compile(keras.optimizers.SGD(0.0), classification_loss())
        history = model.fit(*data, callbacks=[callback], verbose=0).history
        expected = model.evaluate(*data, verbose=0, return_dict=True)["loss"]
        assert history["val_rank2_loss"] == pytest.approx([expected], rel=1e-5)


def test_callback_of_a_model_that_fit_builds():
    x, y = mlp_data()
    model = BuiltLate()
    model.compile("adam", "mse")
    callback = kd.RankEvaluation((x, y))
    history = model.fit(x, y, callbacks=[callback], verbose=0).history
    assert len(history["val_rank1_loss"]) == 1


def test_callback_does_not_disturb_training():
    x, y = mlp_data()
    results = []
    for callbacks in ([], [kd.RankEvaluation((x, y))]):
        model = mlp()
        for i, weight in enumerate(model.weights):
            rng = np.random.default_rng(i)
            weight.assign(rng.normal(size=weight.shape).astype("float32"))
        model.compile("adam", "mse")
        model.fit(x, y, epochs=3, shuffle=False, verbose=0, callbacks=callbacks)
        results.append(backend.snapshot(model.weights))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ranks": [5]}, ValueError, "rank=5"),
        ({"ranks": [-1]}, ValueError, "rank=-1"),
        ({"ranks": [1.0]}, TypeError, "integer"),
        ({"ranks": []}, ValueError, "`ranks`"),
        ({"ranks": 4}, TypeError, "list of integers. Received: ranks=4"),
    ],
)
def test_bad_ranks(arguments, error, message):
    with pytest.raises(error, match=message):
        kd.evaluate_ranks(compiled(), *mlp_data(), verbose=0, **arguments)


def test_bad_data():
    model, (x, y) = compiled(), mlp_data()
    with pytest.raises(ValueError, match="empty"):
        kd.evaluate_ranks(model, x[:0], y[:0])
    with pytest.raises(ValueError, match="iterator"):
        kd.evaluate_ranks(model, iter([(x, y)]))
    with pytest.raises(ValueError, match="enable_dylora"):
        kd.evaluate_ranks(roberta_classifier(), tokens(), labels())
    with pytest.raises(ValueError, match="`every`"):
        kd.RankEvaluation((x, y), every=0)
    assert model.rank == 4


def byte_pair_classifier():
    """Raw strings in which KerasHub's two ways to split differ."""
    alphabet = [*"abcdefghijklmnopqrstuvwxyz0123456789-", "Ġ"]
    merges = ["1 9", "19 9", "199 9", "Ġ i", "Ġi n"]
    words = [*alphabet, *(m.replace(" ", "") for m in merges)]
    special = ["<s>", "<pad>", "</s>", "<mask>"]
    tokenizer = keras_hub.models.RobertaTokenizer(
        {word: i for i, word in enumerate([*special, *words])}, merges
    )
    preprocessor = keras_hub.models.RobertaTextClassifierPreprocessor(
        tokenizer, sequence_length=12
    )
    return roberta_classifier(preprocessor=preprocessor)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["list", "array"])
def test_strings_are_split_as_in_evaluate(kind):
    model = kd.enable_dylora(byte_pair_classifier(), rank=2)
    randomize_adapters(randomize(model))
    model.compile("adam", classification_loss())
    texts = ["made in 1999", "in-1999 a", "b 1999", "1999 in 1999"]
    texts = np.array(texts) if kind == "array" else texts
    y = np.array([0, 1, 0, 1])
    report = kd.evaluate_ranks(model, texts, y, verbose=0)
    for rank in (1, 2):
        with model.rank_scope(rank):
            expected = model.evaluate(texts, y, verbose=0, return_dict=True)
        assert report.metrics[rank] == pytest.approx(expected, rel=1e-5)


def test_metrics_of_several_values():
    model = randomize_adapters(mlp())
    model.compile("adam", "mse", metrics=[keras.metrics.F1Score()])
    x, _ = mlp_data()
    y = np.eye(3, dtype="float32")[np.arange(len(x)) % 3]
    report = kd.evaluate_ranks(model, x, y, verbose=0)
    names = ["f1_score_0", "f1_score_1", "f1_score_2", "loss"]
    assert report.metric_names == names
    with model.rank_scope(2):
        expected = model.evaluate(x, y, verbose=0, return_dict=True)
    assert [report.metrics[2][name] for name in names[:3]] == pytest.approx(
        list(expected["f1_score"])
    )
    callback = kd.RankEvaluation((x, y), ranks=[2])
    history = model.fit(x, y, verbose=0, callbacks=[callback]).history
    assert "val_rank2_f1_score_2" in history


def spread(y, y_pred):
    return keras.ops.std(y_pred, axis=-1)


def test_metrics_tell_which_is_better():
    model = randomize_adapters(mlp())
    model.compile(
        "adam",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[
            keras_hub.metrics.Perplexity(
                from_logits=True, mask_token_id=-1, name="ppl"
            ),
            "accuracy",
            keras.losses.SparseCategoricalCrossentropy(True, name="nats"),
            spread,
        ],
        weighted_metrics=["accuracy"],
    )
    x, _ = mlp_data()
    y = np.arange(len(x)) % 3
    report = kd.evaluate_ranks(model, x, y, verbose=0)
    assert report.directions == {
        "ppl": "min",
        "accuracy": "max",
        "nats": "min",
        "weighted_accuracy": "max",
        "loss": "min",
    }
    best = report.best("loss")
    assert report.best("ppl") == report.best("nats") == best
    with pytest.raises(ValueError, match="`mode=.*metric='spread'"):
        report.best("spread")
    assert report.best("spread", mode="max") in report.ranks
    report.plot(metric="spread")


def test_metrics_of_outputs_and_of_several_values():
    inputs = keras.Input((10,))
    outputs = {n: kd.DyLoRADense(3, rank=2, name=n)(inputs) for n in "ab"}
    model = kd.DyLoRAModel(inputs, outputs)
    model.compile(
        "adam",
        {"a": "mse", "b": "mae"},
        metrics={
            "a": [keras.metrics.F1Score(name="share"), "mse"],
            "b": [keras.metrics.R2Score(name="fit"), spread],
        },
    )
    x, _ = mlp_data()
    y = np.eye(3, dtype="float32")[np.arange(len(x)) % 3]
    report = kd.evaluate_ranks(model, x, {"a": y, "b": y}, verbose=0)
    assert report.directions == {
        **dict.fromkeys(["a_share_0", "a_share_1", "a_share_2"], "max"),
        **dict.fromkeys(["a_loss", "a_mse", "b_loss", "loss"], "min"),
        "b_fit": "max",
    }


def endless():
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices(mlp_data())
    return data.batch(8).repeat()


class Endless(keras.utils.PyDataset):
    num_batches = None

    def __getitem__(self, index):
        return mlp_data(8, seed=index)


@pytest.mark.parametrize("make", [endless, Endless])
def test_data_without_an_end(make):
    model = compiled()
    with pytest.raises(ValueError, match="`steps`.*steps=None"):
        kd.evaluate_ranks(model, make(), verbose=0)
    with pytest.raises(ValueError, match="`steps`.*steps=None"):
        model.fit(
            *mlp_data(),
            verbose=0,
            callbacks=[kd.RankEvaluation(make())],
        )  # fmt: skip
    report = kd.evaluate_ranks(model, make(), steps=2, verbose=0)
    callback = kd.RankEvaluation(make(), steps=2, ranks=[1])
    model.optimizer.learning_rate = 0.0
    logs = model.fit(*mlp_data(), verbose=0, callbacks=[callback])
    assert logs.history["val_rank1_loss"] == [
        pytest.approx(report.metrics[1]["loss"], rel=1e-5)
    ]


def test_uncompiled():
    x, y = mlp_data(8)
    with pytest.raises(ValueError, match="must be compiled"):
        kd.evaluate_ranks(mlp(), x, y)


def test_targets_in_the_place_of_ranks():
    with pytest.raises(TypeError, match=r"one argument, `\(x, y\)`"):
        kd.RankEvaluation(tokens(), labels())


def test_inputs_without_targets():
    with pytest.raises(ValueError, match="inputs and targets.*y=None"):
        kd.evaluate_ranks(compiled(), mlp_data()[0], verbose=0)


def test_parameters_are_those_of_a_model_of_that_rank():
    report = kd.evaluate_ranks(compiled(), *mlp_data(), verbose=0)
    assert list(report.parameters) == [1, 2, 3, 4]
    for rank, size in report.parameters.items():
        smaller = mlp(rank=rank)
        assert size == sum(
            np.prod(v.shape) for v in smaller.trainable_variables
        )
