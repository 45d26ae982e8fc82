"""enable_dylora and disable_dylora on real models."""

import gc

import keras
import keras_hub
import numpy as np
import pytest

import keras_dylora as kd
from tests import backend
from tests.marks import once
from tests.models import (
    classification_loss,
    gpt2,
    labels,
    randomize,
    randomize_adapters,
    roberta_backbone,
    roberta_classifier,
    tokens,
)


def bert_classifier():
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=97,
        num_layers=1,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=24,
        max_sequence_length=12,
        dropout=0.0,
    )
    return keras_hub.models.BertTextClassifier(
        backbone, num_classes=2, dropout=0.0, preprocessor=None
    )


def functional():
    inputs = keras.Input((6,))
    x = keras.layers.Dense(5, "relu", name="query")(inputs)
    return keras.Model(inputs, keras.layers.Dense(2, name="value")(x))


def sequential():
    model = keras.Sequential(
        [keras.layers.Dense(5, "relu"), keras.layers.Dense(2, name="value")]
    )
    model.build((None, 6))
    return model


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.query = keras.layers.Dense(5, "tanh", name="query")
        self.top = keras.layers.Dense(2, name="value")

    def call(self, inputs):
        return self.top(self.query(inputs))


def subclassed():
    model = Subclassed()
    model(np.zeros((1, 6), "float32"))
    return model


def masked_lm_inputs():
    positions = np.tile([[1, 2]], (32, 1)).astype("int32")
    return {**tokens(), "mask_positions": positions}


def bert_inputs():
    inputs = tokens()
    return {**inputs, "segment_ids": np.zeros_like(inputs["token_ids"])}


def vectors():
    return np.random.default_rng(0).normal(size=(16, 6)).astype("float32")


MODELS = {
    "roberta": (roberta_classifier, tokens),
    "masked-lm": (
        lambda: keras_hub.models.RobertaMaskedLM(
            roberta_backbone(), preprocessor=None
        ),
        masked_lm_inputs,
    ),
    "gpt2": (gpt2, tokens),
    "bert": (bert_classifier, bert_inputs),
    "backbone": (roberta_backbone, tokens),
    "functional": (functional, vectors),
    "sequential": (sequential, vectors),
    "subclassed": (subclassed, vectors),
}


COMPILED = ["roberta", "functional", "subclassed", "sequential"]


@pytest.fixture(params=once(MODELS, but=COMPILED))
def case(request):
    make, inputs = MODELS[request.param]
    return randomize(make()), inputs()


def outputs(model, x):
    found = keras.tree.flatten(model.predict(x, verbose=0))
    return [np.asarray(value) for value in found]


def by_hand(model, x):
    return [backend.to_numpy(y) for y in keras.tree.flatten(model(x))]


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_in_place_and_back(case):
    model, x = case
    cls, weights = type(model), list(model.weights)
    flags = [v.trainable for v in model.variables]
    expected, compiled = by_hand(model, x), outputs(model, x)

    assert kd.enable_dylora(model, rank=4) is model
    assert isinstance(model, kd.DyLoRAModel) and isinstance(model, cls)
    adapters = {id(v) for y in model.dylora_layers for v in (y.down, y.up)}
    kept = [w for w in model.weights if id(w) not in adapters]
    assert [id(w) for w in kept] == [id(w) for w in weights]

    randomize_adapters(model)
    model.set_rank(0)
    if backend.NAME != "torch":
        assert_same(by_hand(model, x), expected)
    # XLA fuses another program in another way, and on torch an adapted layer
    # adds its bias within the product: a last bit may differ.
    found = [*by_hand(model, x), *outputs(model, x)]
    for a, b in zip(found, [*expected, *compiled], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    model.set_rank(3)
    changed = by_hand(model, x)
    assert any((a != b).any() for a, b in zip(changed, expected, strict=True))

    assert kd.disable_dylora(model) is model
    assert type(model) is cls
    assert [id(w) for w in model.weights] == [id(w) for w in weights]
    assert [v.trainable for v in model.variables] == flags
    assert_same(by_hand(model, x), expected)
    kd.enable_dylora(model, rank=2)  # and once more


def test_by_hand_and_by_predict_agree_at_every_rank(case):
    model, x = case
    kd.enable_dylora(model, rank=3)
    randomize_adapters(model)
    for rank in range(4):
        with model.rank_scope(rank):
            for a, b in zip(outputs(model, x), by_hand(model, x), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert model.rank == 3


@pytest.mark.long
@pytest.mark.parametrize(("rank", "count"), [(8, 887_042), (1, 628_994)])
def test_trainable_parameters_of_roberta_base(rank, count):
    model = roberta_classifier(
        num_layers=12,
        num_heads=12,
        hidden_dim=768,
        intermediate_dim=3072,
        max_sequence_length=512,
    )
    kd.enable_dylora(model, rank=rank)
    assert sum(v.value.shape.numel() if backend.NAME == "torch" else np.prod(
        v.shape) for v in model.trainable_variables) == count  # fmt: skip
    lines = []
    model.summary(print_fn=lambda line, **kwargs: lines.append(line))
    assert f"Trainable params: {count:,}" in "".join(lines)


@pytest.mark.long
def test_trainable_parameters_of_gpt2_medium():
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=97,  # not adapted, so of no account
        num_layers=24,
        num_heads=16,
        hidden_dim=1024,
        intermediate_dim=4096,
        max_sequence_length=16,
        dtype="bfloat16",
    )
    model = keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)
    kd.enable_dylora(model, rank=4)
    shapes = [v.shape for v in model.trainable_variables]
    assert sum(int(np.prod(shape)) for shape in shapes) == 393_216


def test_layers_are_in_forward_order():
    model = kd.enable_dylora(gpt2(), rank=2)
    assert [layer.path.split("/")[0] for layer in model.dylora_layers] == [
        "transformer_layer_0",
        "transformer_layer_0",
        "transformer_layer_1",
        "transformer_layer_1",
    ]
    assert [layer.name for layer in model.dylora_layers[:2]] == [
        "query",
        "value",
    ]


@pytest.mark.parametrize(
    ("target_layers", "count"),
    [
        ("query", 2),
        (["query", "key", "value"], 6),
        (r"transformer_layer_0/.*/(query|attention_output)", 2),
        ("all-linear", 12),
        (lambda path, layer: layer.name == "key", 2),
        ("pooled_dense", 1),
    ],
    ids=["name", "names", "regex", "all-linear", "callable", "head"],
)
def test_target_layers(target_layers, count):
    model = roberta_classifier()
    kd.enable_dylora(model, rank=2, target_layers=target_layers)
    assert len(model.dylora_layers) == count


@pytest.mark.parametrize(
    ("trainable_layers", "names"),
    [
        (None, {"pooled_dense", "logits"}),
        ((), set()),
        ("logits", {"logits"}),
        (["logits", "embeddings_layer_norm"], {
            "logits", "embeddings_layer_norm",
        }),
    ],
    ids=["head", "none", "one", "and-norm"],
)  # fmt: skip
def test_trainable_layers(trainable_layers, names):
    model = roberta_classifier()
    kd.enable_dylora(model, rank=2, trainable_layers=trainable_layers)
    trained = {
        v.path.split("/")[-2]
        for v in model.trainable_variables
        if v.name not in ("down", "up")
    }
    assert trained == names


def test_tied_embeddings_stay_frozen():
    model = keras_hub.models.RobertaMaskedLM(
        roberta_backbone(), preprocessor=None
    )
    kd.enable_dylora(model, rank=2)
    names = [v.path for v in model.trainable_variables]
    assert not any("token_embedding" in name for name in names)
    assert any("mlm_head" in name for name in names)


@pytest.mark.once
def test_a_compiled_and_trained_model_goes_on():
    model = roberta_classifier()
    model.compile("adam", classification_loss(), metrics=["accuracy"])
    x, y = tokens(), labels()
    model.fit(x, y, verbose=0)
    kd.enable_dylora(model, rank=2)
    model.fit(x, y, verbose=0)
    assert set(model.evaluate(x, y, verbose=0, return_dict=True)) >= {"loss"}
    kd.disable_dylora(model)
    model.fit(x, y, verbose=0)


def test_set_rank_reaches_the_backbone_alone():
    model = randomize(roberta_classifier())
    kd.enable_dylora(model, rank=4)
    randomize_adapters(model)
    full = outputs(model.backbone, tokens())
    model.set_rank(1)
    low = outputs(model.backbone, tokens())
    assert (full[0] != low[0]).any()


class OtherDense(keras.layers.Dense):
    pass


def with_layer(layer, shape=(6,)):
    inputs = keras.Input(shape)
    return keras.Model(inputs, layer(inputs))


def bad_layers():
    native = keras.layers.Dense(2, name="query")
    model = with_layer(native)
    native.enable_lora(2)
    yield "native-lora", model, "Keras's own LoRA"
    constrained = keras.layers.Dense(
        2, kernel_constraint="non_neg", name="query"
    )
    yield "constraint", with_layer(constrained), "kernel_constraint"
    yield "subclass", with_layer(OtherDense(2, name="query")), "OtherDense"
    einsum = keras.layers.EinsumDense("ab,b->ab", (6,), name="query")
    yield "equation", with_layer(einsum), "Received: equation='ab,b->ab'"


@pytest.mark.parametrize(
    "which", ["native-lora", "constraint", "subclass", "equation"]
)
def test_layers_that_cannot_be_adapted(which):
    model, message = next((m, t) for n, m, t in bad_layers() if n == which)
    refuses(model, ValueError, message)


def refuses(model, error, message, **overrides):
    """Enabling raises, and the model is what it was."""
    cls = type(model)
    variables = [(id(v), v.trainable) for v in model.variables]
    values = backend.snapshot(model.variables)
    with pytest.raises(error, match=message):
        kd.enable_dylora(model, **overrides)
    assert type(model) is cls
    assert variables == [(id(v), v.trainable) for v in model.variables]
    assert_same(values, backend.snapshot(model.variables))


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"target_layers": "qkv"}, ValueError, "'qkv'.*query"),
        ({"target_layers": ["query", "typo"]}, ValueError, "'typo'"),
        ({"target_layers": "que("}, ValueError, "regular expression"),
        ({"target_layers": 3}, TypeError, "`target_layers`"),
        ({"target_layers": lambda p, x: False}, ValueError, "at least one"),
        ({"trainable_layers": "typo"}, ValueError, "`trainable_layers`"),
        ({"rank": 0}, ValueError, "rank=0"),
        ({"ranks": 4}, TypeError, "ranks"),
        ({"config": {"rank": 4}}, TypeError, "DyLoRAConfig"),
    ],
)
def test_bad_arguments(overrides, error, message):
    refuses(roberta_classifier(), error, message, **overrides)


def test_no_match_by_default_lists_the_layers():
    inputs = keras.Input((6,))
    model = keras.Model(inputs, keras.layers.Dense(2, name="only")(inputs))
    refuses(model, ValueError, "query and value.*'only'")


def test_enabled_twice():
    model = kd.enable_dylora(roberta_classifier(), rank=2)
    refuses(model, ValueError, "once.*query")


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: Subclassed(), ValueError, "must be built"),
        (lambda: keras.layers.Dense(2), TypeError, "keras.Model"),
        (lambda: "roberta_base_en", TypeError, "keras.Model"),
    ],
    ids=["unbuilt", "layer", "string"],
)
def test_what_is_no_built_model(model, error, message):
    with pytest.raises(error, match=message):
        kd.enable_dylora(model())


def test_disable_needs_an_enabled_model():
    with pytest.raises(ValueError, match="enable_dylora"):
        kd.disable_dylora(functional())


@pytest.mark.once
def test_any_seed_serves():
    model = roberta_classifier(dropout=0.1)
    kd.enable_dylora(model, rank=2, dropout=0.1, seed=2**63 - 1)
    model.compile("adam", classification_loss())
    history = model.fit(tokens(), labels(), verbose=0).history
    assert np.isfinite(history["loss"]).all()


def test_what_was_frozen_before_is_trained():
    backbone = roberta_backbone()
    backbone.trainable = False
    kd.enable_dylora(backbone, rank=2)
    assert len(backbone.trainable_variables) == 8  # two layers' query, value
    kd.disable_dylora(backbone)
    assert not backbone.trainable and not backbone.trainable_variables

    model = roberta_classifier()
    model.backbone.trainable = False
    kd.enable_dylora(
        model, rank=2, trainable_layers=["logits", "embeddings_layer_norm"]
    )
    trained = {v.path for v in model.trainable_variables}
    assert any("embeddings_layer_norm" in path for path in trained)
    assert len(trained) == 8 + 2 + 2


def test_backbone_functions_are_those_of_the_change():
    model = randomize(roberta_classifier())
    x = tokens()
    before = model.backbone.predict(x, verbose=0)
    randomize_adapters(kd.enable_dylora(model, rank=2))
    during = model.backbone.predict(x, verbose=0)
    assert np.abs(during - before).max() > 1e-3
    kd.disable_dylora(model)
    after = model.backbone.predict(x, verbose=0)
    np.testing.assert_array_equal(after, before)


def test_a_backbone_within_is_not_saved_alone(tmp_path):
    model = kd.enable_dylora(gpt2(), rank=2)
    for each in (model, model.backbone):
        with pytest.raises(ValueError, match="merge.*Received"):
            each.save_to_preset(tmp_path / "preset", max_shard_size=1)
        with pytest.raises(ValueError, match="Received: export_to_transf"):
            each.export_to_transformers(tmp_path / "transformers")
    with pytest.raises(ValueError, match="backbone alone.*Received: save"):
        model.backbone.save(filepath=tmp_path / "backbone.keras")
    assert not any(tmp_path.iterdir())
    model.save(tmp_path / "model.keras")
    kd.disable_dylora(model)
    model.backbone.save_to_preset(tmp_path / "preset")
    assert (tmp_path / "preset" / "model.weights.h5").exists()
    model.backbone.save(tmp_path / "backbone.keras")
    keras.saving.load_model(tmp_path / "backbone.keras")


class Stack(keras.layers.Layer):
    """A model whose attribute `layers` is a number."""

    def __init__(self):
        super().__init__()
        self.layers = 2
        self.query = keras.layers.Dense(4, name="query")

    def call(self, inputs):
        for _ in range(self.layers):
            inputs = self.query(inputs)
        return inputs


def test_takes_a_layer_whose_layers_are_something_else():
    inputs = keras.Input((4,))
    model = kd.enable_dylora(keras.Model(inputs, Stack()(inputs)), rank=2)
    assert [layer.name for layer in model.dylora_layers] == ["query"]


def test_dropout_leaves_no_variable_behind():
    model = roberta_classifier(dropout=0.1)
    before = model.variables
    kd.disable_dylora(kd.enable_dylora(model, rank=2, dropout=0.1))
    assert len(model.variables) == len(before)
    assert all(a is b for a, b in zip(model.variables, before, strict=True))


class Unmakeable(keras.optimizers.SGD):
    """An optimizer that no config makes again."""

    def __init__(self):
        super().__init__(0.1)


@pytest.mark.once
def test_an_optimizer_that_cannot_be_made_anew():
    model = roberta_classifier()
    kd.enable_dylora(model, rank=4)
    model.compile(Unmakeable(), classification_loss())
    x, y = tokens(), labels()
    model.fit(x, y, verbose=0)
    before = model.predict(x, verbose=0)
    for change in (kd.disable_dylora, lambda m: kd.truncate(m, 2)):
        with pytest.raises(TypeError):
            change(model)
        assert model.dylora_config.rank == model.rank == 4
        np.testing.assert_array_equal(model.predict(x, verbose=0), before)
    model.fit(x, y, verbose=0)
    plain = roberta_classifier()
    plain.compile(Unmakeable(), classification_loss())
    plain.fit(x, y, verbose=0)
    with pytest.raises(TypeError):
        kd.enable_dylora(plain)
    assert not isinstance(plain, kd.DyLoRAModel)
    plain.fit(x, y, verbose=0)


def test_undoing_collects_no_garbage(monkeypatch):
    """Keras collects garbage for each variable that a layer deletes."""
    collections = []
    monkeypatch.setattr(gc, "collect", lambda *args: collections.append(args))
    model = kd.enable_dylora(roberta_classifier(), rank=4, dropout=0.1)
    kd.truncate(model, 2)
    kd.disable_dylora(model)
    assert not collections
    model.compile(Unmakeable(), classification_loss())
    model.optimizer.build(model.trainable_variables)
    with pytest.raises(TypeError):
        kd.enable_dylora(model, rank=4)
    assert not collections
