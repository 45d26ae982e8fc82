"""What a model computes, by every door that it can leave through."""

import keras
import numpy as np

import keras_dylora as kd


def assert_doors_agree(model, x, mixed, folder):
    """Compares a live model with its merged, saved and truncated forms.

    Args:
        model: an enabled model of rank 4.
        x: its inputs.
        mixed: a `RankAllocation` of it.
        folder: an empty directory.

    Returns:
        The model as it was loaded, then cut to rank 2 and saved again.
    """

    def predicted(model):
        return model.predict(x, verbose=0)

    def assert_same(found, wanted):
        np.testing.assert_allclose(found, wanted, atol=2e-5)

    kd.save_adapter(model, folder / "adapter")
    model.save(folder / "model.keras")
    again = keras.saving.load_model(folder / "model.keras")
    for rank in (0, 1, 3, mixed):
        with model.rank_scope(rank):
            wanted = predicted(model)
        assert_same(predicted(kd.merge(model, rank)), wanted)
        with again.rank_scope(rank):
            assert_same(predicted(again), wanted)
    with model.rank_scope(2):
        wanted = predicted(model)
    for layer in again.dylora_layers:
        layer.up.assign(0 * layer.up)
    kd.load_adapter(again, folder / "adapter")
    kd.truncate(again, 2)
    assert_same(predicted(again), wanted)
    again.save(folder / "cut.keras")
    again = keras.saving.load_model(folder / "cut.keras")
    assert_same(predicted(again), wanted)
    return again
