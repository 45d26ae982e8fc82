"""The layers that are adapted and trained, and what is said of the others."""

import warnings

import keras
import keras_hub
import numpy as np
import pytest

import keras_dylora as kd
from tests import backend
from tests.models import (
    gpt2,
    randomize_adapters,
    roberta_backbone,
    roberta_classifier,
    tokens,
)


@keras.saving.register_keras_serializable(package="tests")
class ReadsAKernel(keras.Layer):
    """Calls one of its layers, and reads the kernel of the other."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.query = keras.layers.Dense(5, name="query")
        self.value = keras.layers.Dense(5, use_bias=False, name="value")

    def build(self, input_shape):
        self.query.build(input_shape)
        self.value.build(input_shape)

    def call(self, x):
        return self.query(x) + keras.ops.matmul(x, self.value.kernel)


def reads_a_kernel():
    inputs = keras.Input((6,))
    return keras.Model(inputs, ReadsAKernel(name="block")(inputs))


def test_a_layer_that_is_never_called_is_left_out(capsys):
    model = reads_a_kernel()
    with pytest.warns(UserWarning, match="left out") as caught:
        kd.enable_dylora(model, rank=2, trainable_layers=())
    assert caught[0].filename == __file__
    assert [layer.name for layer in model.dylora_layers] == ["query"]
    assert "left out: block/value" in capsys.readouterr().out
    randomize_adapters(model)
    x = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
    np.testing.assert_allclose(
        model.predict(x, verbose=0),
        kd.merge(model, 2).predict(x, verbose=0),
        atol=1e-5,
    )


class Subclassed(keras.Model):
    """A subclassed model: nothing of it can be traced before it is called."""

    def __init__(self):
        super().__init__()
        self.block = ReadsAKernel(name="block")

    def call(self, x):
        return self.block(x)


def test_a_layer_that_training_never_calls_is_warned_of():
    model, x = Subclassed(), np.ones((4, 6), "float32")
    model(x)
    kd.enable_dylora(model, rank=2, trainable_layers=())
    assert len(model.dylora_layers) == 2
    model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match=r"never calls.*\['block/value'\]"):
        model.fit(x, np.ones((4, 5)), verbose=0)
    with warnings.catch_warnings(record=True) as caught:
        model.fit(x, np.ones((4, 5)), verbose=0)
    assert not [w for w in caught if "never calls" in str(w.message)]  # once


def test_other_layers_of_blocks_that_are_alike():
    """One block of a kind is traced for the same targets alone."""
    model = roberta_classifier()
    paths = [
        "transformer_layer_0/self_attention_layer/query",
        "transformer_layer_1/self_attention_layer/key",
    ]
    kd.enable_dylora(model, rank=2, target_layers=paths, verbose=0)
    assert list(model._dylora.layers) == paths


def test_nothing_but_layers_that_are_never_called():
    model = reads_a_kernel()
    with pytest.raises(ValueError, match=r"calls.*\['block/value'\]"):
        kd.enable_dylora(model, target_layers="value")
    assert not isinstance(model, kd.DyLoRAModel)


def test_calls_are_traced_in_models_of_any_length():
    for make in (roberta_classifier, gpt2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kd.enable_dylora(make(), target_layers="all-linear")


NAMES = """query value q_proj v_proj query_dense value_dense query_proj
value_proj query_projector value_projector q_dense_layer v_dense_layer
query_projection in_proj_qkv attention_qkv qkv qkv_proj query_key_value
receptance""".split()
OTHERS = """key k_proj key_dense output_dense attention_output query_norm
query_embed value_embedding in_proj_z""".split()


def stacked(names):
    inputs = x = keras.Input((4,))
    for name in names:
        x = keras.layers.Dense(4, name=name)(x)
    return keras.Model(inputs, x)


def test_query_and_value_of_every_family():
    model = stacked(NAMES + OTHERS)
    kd.enable_dylora(model, rank=2, trainable_layers=())
    assert [layer.name for layer in model.dylora_layers] == NAMES


def test_layers_of_other_names_are_named():
    with pytest.raises(ValueError, match="None, query and value") as error:
        kd.enable_dylora(stacked(["query_0", "key"]), trainable_layers=())
    assert "target_layers=['key', 'query_0']" in str(error.value)


def test_routers_are_left_out(capsys):
    backbone = keras_hub.models.MixtralBackbone(
        vocabulary_size=97,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=12,
        num_experts=2,
        top_k=1,
    )
    kd.enable_dylora(backbone, rank=2, target_layers="all-linear")
    names = [layer.name for layer in backbone.dylora_layers]
    assert sorted(names) == ["attention_output", "key", "query", "value"]
    said = capsys.readouterr().out
    # Experts are no `Dense` layers, so most of the model isn't covered.
    attention = sum(np.prod(x.kernel.shape) for x in backbone.dylora_layers)
    experts, router = 2 * 3 * 8 * 12, 8 * 2
    share = attention / (attention + experts + router)
    assert f"on 4 of 5 linear layers, {share:.0%} of its matrices" in said
    assert "sparse_feedforward_gate_dense, which chooses experts" in said


def headed(backbone):
    pooled = backbone.output[:, 0]
    return keras.Model(backbone.input, keras.layers.Dense(2)(pooled))


def nested(backbone):
    inputs = {k: keras.Input((None,), dtype=v.dtype, name=k)
              for k, v in backbone.input.items()}  # fmt: skip
    pooled = backbone(inputs)[:, 0]
    return keras.Model(inputs, keras.layers.Dense(2)(pooled))


@pytest.mark.parametrize("around", [headed, nested])
def test_a_head_on_a_backbone_is_trained(around):
    backbone = roberta_backbone()
    model = around(backbone)
    head = model.layers[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        known = {"backbone": backbone} if around is headed else {}
        kd.enable_dylora(model, rank=2, **known)
    others = {id(v) for v in model.trainable_variables} - {
        id(v) for x in model.dylora_layers for v in (x.down, x.up)
    }
    assert others == {id(v) for v in head.weights}


def classifier():
    inputs = keras.Input((4,))
    x = keras.layers.Dense(4, name="query")(inputs)
    return keras.Model(inputs, keras.layers.Dense(2, name="new")(x))


def test_a_head_that_cannot_be_told():
    with pytest.warns(UserWarning, match=r"trainable_layers.*\['new'\]"):
        kd.enable_dylora(classifier(), rank=2)


@pytest.mark.parametrize(
    "arguments",
    [{"trainable_layers": ()}, {"trainable_layers": "new"},
     {"target_layers": "all-linear"}],
    ids=["none", "named", "adapted"],
)  # fmt: skip
def test_a_head_that_can(arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kd.enable_dylora(classifier(), rank=2, **arguments)


def test_a_backbone_has_no_head():
    """A backbone has no head, even if its attribute `backbone` is a part."""
    backbone = roberta_backbone()
    backbone.backbone = roberta_backbone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kd.enable_dylora(backbone, rank=2)
    assert {v.name for v in backbone.trainable_variables} == {"down", "up"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"r": 4, "lora_alpha": 8}, r"\['r', 'lora_alpha'\].*\['rank', 'alpha"),
        ({"target_modules": ["query"]}, r"\['target_layers'\] here"),
        ({"ranks": 4}, r"Received: \['ranks'\] .did you mean 'rank'"),
    ],
    ids=["rank", "targets", "unknown"],
)
def test_names_of_other_libraries(overrides, message):
    with pytest.raises(TypeError, match=message):
        kd.enable_dylora(roberta_classifier(), **overrides)


@pytest.mark.parametrize(
    ("target_layers", "message"),
    [
        ([], r"target_layers=\[\]"),
        ("all_linear", "did you mean 'all-linear'"),
        (["qeury"], "'qeury' .did you mean 'query'"),
        (["query", "all-conv"], "'all-conv' .only.*not in a list"),
    ],
    ids=["none", "underscore", "misspelt", "listed"],
)
def test_targets_that_are_none(target_layers, message):
    with pytest.raises(ValueError, match=message):
        kd.enable_dylora(roberta_classifier(), target_layers=target_layers)


def test_what_was_done_is_said(capsys):
    model = roberta_classifier()
    kd.enable_dylora(model, rank=4)
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    trained = sum(v.size for v in map(backend.to_numpy,
                                      model.trainable_variables))  # fmt: skip
    assert "ranks 1 to 4 on 4 of 14 linear layers" in line
    assert f"{trained:,} parameters are trained, 306 of them in full: " in line
    assert "pooled_dense, logits" in line
    kd.enable_dylora(roberta_classifier(), verbose=0)
    assert not capsys.readouterr().out


def test_tracing_changes_nothing():
    model = roberta_classifier(dropout=0.5)
    before = backend.snapshot(model.variables)
    kd.enable_dylora(model, rank=2, verbose=0)
    kd.disable_dylora(model)
    for a, b in zip(before, backend.snapshot(model.variables), strict=True):
        np.testing.assert_array_equal(a, b)
    assert all("call" not in vars(x) for x in model._flatten_layers())
    model(tokens())
