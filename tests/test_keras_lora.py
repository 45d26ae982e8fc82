"""Keras's own LoRA beside ours."""

import pytest

from tests.models import enabled


@pytest.mark.parametrize(
    "of",
    [lambda m: m, lambda m: m.backbone, lambda m: m.dylora_layers[1]],
    ids=["task", "backbone", "layer"],
)
def test_keras_lora_is_refused(of):
    model = enabled()
    weights = list(model.weights)
    with pytest.raises(ValueError, match="Use `disable_dylora` before Keras"):
        of(model).enable_lora(4)
    assert [id(w) for w in model.weights] == [id(w) for w in weights]


def test_keras_lora_of_another_layer_cannot_be_saved(tmp_path):
    model = enabled()
    model.get_layer("pooled_dense").enable_lora(2)
    with pytest.raises(ValueError, match=r"LoRA at \['pooled_dense'\]"):
        model.save(tmp_path / "clf.keras")
    assert not any(tmp_path.iterdir())
