"""DyLoRAModel by hand: functional, subclassed, and what it refuses."""

import keras
import numpy as np
import pytest

import keras_dylora as kd
from tests import backend
from tests.marks import once
from tests.models import BuiltLate, mlp, mlp_data, randomize_adapters


def test_layers_that_are_made_on_building():
    model = BuiltLate()
    model.compile("adam", "mse")
    model.fit(np.ones((4, 5), "float32"), np.zeros((4, 3)), verbose=0)
    assert model.dylora_config.rank == 3


@keras.saving.register_keras_serializable(package="tests")
class ByHand(kd.DyLoRAModel):
    def __init__(self, frozen=False, **kwargs):
        super().__init__(seed=3, **kwargs)
        self.frozen = frozen
        self.first = kd.DyLoRADense(8, "tanh", rank=3, frozen=frozen)
        self.second = kd.DyLoRADense(3, rank=3, frozen=frozen)

    def call(self, inputs):
        return self.second(self.first(inputs))

    def get_config(self):
        return {**super().get_config(), "frozen": self.frozen}


def test_subclassed_model_that_is_built_but_never_trained():
    model = ByHand(frozen=True)
    with pytest.raises(ValueError, match="needs built"):
        model.dylora_layers  # noqa: B018
    model(mlp_data()[0])
    assert [layer.rank for layer in model.dylora_layers] == [3, 3]
    assert (model.rank, model.dylora_config.frozen) == (3, True)


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "frozen"])
def test_subclassed_model_trains_saves_and_loads(frozen, tmp_path):
    x, y = mlp_data()
    model = ByHand(frozen=frozen)
    model.compile("adam", "mse")
    history = model.fit(x, y, batch_size=16, epochs=3, verbose=0)
    assert "rank" in history.history
    outputs = {}
    for rank in range(4):
        model.set_rank(rank)
        outputs[rank] = model.predict(x, verbose=0)
    assert (outputs[1] != outputs[3]).any()
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert type(again) is ByHand
    for rank, expected in outputs.items():
        again.set_rank(rank)
        np.testing.assert_allclose(
            expected, again.predict(x, verbose=0), atol=1e-6
        )
    assert int(backend.to_numpy(again._ranks_drawn)) == 12


def test_functional_construction_leaves_the_class_alone():
    bases = kd.DyLoRAModel.__bases__
    mlp()
    assert kd.DyLoRAModel.__bases__ == bases
    assert bases[-1] is keras.Model


def test_config_and_layers():
    model = mlp(frozen=True, rank=5, seed=4)
    config = model.dylora_config
    assert (config.rank, config.alpha, config.frozen, config.seed) == (
        5, 8, True, 4,
    )  # fmt: skip
    assert [layer.name for layer in model.dylora_layers] == ["first", "second"]


def test_rank_scope_restores_after_an_error():
    model = mlp()
    with pytest.raises(RuntimeError), model.rank_scope(1):
        assert model.rank == 1
        raise RuntimeError
    assert model.rank == 4
    with pytest.raises(ValueError, match="rank=9"), model.rank_scope(9):
        pass
    assert model.rank == 4


@pytest.mark.parametrize("rank", [-1, 5])
def test_bad_rank(rank):
    model = mlp()
    with pytest.raises(ValueError, match=f"Received: rank={rank}"):
        model.set_rank(rank)
    assert model.rank == 4


def test_layers_must_agree():
    inputs = keras.Input((4,))
    x = kd.DyLoRADense(4, rank=2)(inputs)
    with pytest.raises(ValueError, match="same `rank`.*\\[2, 3\\]"):
        kd.DyLoRAModel(inputs, kd.DyLoRADense(4, rank=3)(x))


def test_a_model_without_adapters():
    inputs = keras.Input((4,))
    with pytest.raises(ValueError, match="DyLoRADense"):
        kd.DyLoRAModel(inputs, keras.layers.Dense(4)(inputs))


def test_weights_leave_out_the_state():
    model = mlp(frozen=True)
    names = [w.name for w in model.weights]
    assert sorted(set(names)) == ["bias", "down", "kernel", "up"]
    copy = mlp(frozen=True)
    randomize_adapters(model)
    copy.set_weights(model.get_weights())
    x, _ = mlp_data()
    np.testing.assert_allclose(
        model.predict(x, verbose=0), copy.predict(x, verbose=0), atol=1e-6
    )


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize(
    "frozen", once([False, True], but=[True]), ids=["all", "frozen"]
)
def test_mixed_precision_training(policy, frozen):
    keras.config.set_dtype_policy(policy)
    model = mlp(frozen=frozen)
    model.compile(keras.optimizers.AdamW(0.01), "mse")
    history = model.fit(*mlp_data(), epochs=5, verbose=0)
    assert history.history["loss"][-1] < history.history["loss"][0]
    assert {layer.down.dtype for layer in model.dylora_layers} == {"float32"}
