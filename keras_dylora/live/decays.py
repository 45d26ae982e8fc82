"""Decays: the learning rates of a model that take their steps from `fit`."""

from keras import ops

from keras_dylora import _keras
from keras_dylora.layers.kinds import LINEAR
from keras_dylora.layers.low_rank import LowRankAdapter
from keras_dylora.layers.tree import Tree
from keras_dylora.schedule import ProgressiveDecay

RESTART = 2.0  # a multiple of the peak, if few layers are adapted


class Decays:
    """All `ProgressiveDecay`s of a compiled model; false if there are none."""

    def __init__(self, model):
        self._model = model
        self._found = [
            (schedule, optimizer)
            for schedule, optimizer in _keras.optimizers.schedules(
                getattr(model, "optimizer", None)
            )
            if isinstance(schedule, ProgressiveDecay)
        ]

    def __bool__(self):
        return bool(self._found)

    def tell(self, steps, order, done):
        """Tells the schedules how many steps a `fit` has.

        Args:
            steps: int. The number of steps of the run.
            order: int or `None`. The step of the order.
            done: int. The steps of the same run that were taken before.
        """
        height, new = self._height(), False
        for schedule, optimizer in self._found:
            updates = int(ops.convert_to_numpy(optimizer.iterations))
            taken = updates * (optimizer.gradient_accumulation_steps or 1)
            new |= schedule.take(steps, order, taken - done, height)
        if new:  # traced functions have the old numbers
            self._model.make_train_function(force=True)

    def _height(self):
        layers = Tree(self._model).layers.values()
        adapted = sum(isinstance(x, LowRankAdapter) for x in layers)
        plain = sum(type(x) in LINEAR for x in layers)
        return RESTART if adapted < plain else 1.0
