"""ProgressiveDecay: a learning rate that takes its steps from `fit`."""

from typing import Any

import keras
from keras import ops

from keras_dylora.checks import check_fraction, check_positive


@keras.saving.register_keras_serializable(package="keras_dylora")
class ProgressiveDecay(keras.optimizers.schedules.LearningRateSchedule):
    """A linear decay to zero that restarts when `fit` orders the columns.

    A progressive run trains something else after the order, so its learning
    rate should be high again there. `fit` gives the schedule the number of
    steps and the step of the order. Without `full_rank_steps`, the rate decays
    once. If `fit` continues a run at a later `initial_epoch`, the decay
    continues too. Any other call of `fit` starts the decay again.

    Args:
        learning_rate: float. The peak learning rate.
        restart: float. The learning rate at the restart, as a multiple of the
            peak. Defaults to `None`: `2` if fewer than half of the model's
            linear layers have an adapter, otherwise `1`.
        warmup: float in `[0, 1)`. The share of the steps in which the rate
            rises from zero. Defaults to `0`.
        steps: int. The number of steps of the run. Defaults to `None`: `fit`
            gives it. Set it for a loop of your own, such as one of
            `train_on_batch`.
        order: int. The step at which the columns are ordered. Defaults to
            `None`: `fit` gives it.
        begin: int. The optimizer's step at the start of the run. Defaults to
            `0`.

    Raises:
        ValueError: if an argument is out of range, or if the rate is computed
            before `fit` or `steps` gave the number of steps.

    Example:

    ```python
    config = keras_dylora.DyLoRAConfig.progressive(rank=8, alpha=16)
    keras_dylora.enable_dylora(clf, config)
    rate = keras_dylora.ProgressiveDecay(4e-4)
    clf.compile(keras.optimizers.AdamW(rate), loss="mse")
    clf.fit(texts, labels, epochs=3)
    ```
    """

    def __init__(
        self,
        learning_rate: float,
        restart: float | None = None,
        warmup: float = 0.0,
        steps: int | None = None,
        order: int | None = None,
        begin: int = 0,
    ) -> None:
        super().__init__()
        check_positive("learning_rate", learning_rate)
        if restart is not None:
            check_positive("restart", restart)
        check_fraction("warmup", warmup)
        self.learning_rate, self.restart = learning_rate, restart
        self.warmup, self.begin = warmup, begin
        self.steps, self.order = steps, order
        self.height = restart

    def take(
        self, steps: int, order: int | None, begin: int, height: float
    ) -> bool:
        """Takes the values that `fit` knows; returns whether any is new.

        Args:
            steps: int. The number of steps of the run.
            order: int. The step of the order, or `None`.
            begin: int. The optimizer's step at the start of the run.
            height: float. The restart to use if `restart` is `None`.
        """
        before = self.steps, self.order, self.begin, self.height
        self.steps, self.order, self.begin = steps, order, begin
        self.height = height if self.restart is None else self.restart
        return before != (self.steps, self.order, self.begin, self.height)

    def __call__(self, step: Any) -> Any:
        if self.steps is None:
            raise ValueError(
                "`ProgressiveDecay` takes its steps from `fit`. For a loop of "
                "your own, give `steps`, and `order` for a progressive run. "
                "Received: steps=None"
            )
        step = ops.cast(step, "float32") - self.begin
        left = self.steps - step
        factor = left / (self.steps * (1 - self.warmup))
        if self.warmup:
            rising = (step + 1) / (self.steps * self.warmup)
            factor = ops.minimum(rising, factor)
        if self.order is not None:
            height = 1.0 if self.height is None else self.height
            again = height * left / max(self.steps - self.order, 1)
            factor = ops.where(step >= self.order, again, factor)
        return self.learning_rate * ops.maximum(factor, 0.0)

    def get_config(self) -> dict[str, Any]:
        names = "learning_rate", "warmup", "steps", "order", "begin"
        # With what `fit` chose, for steps of one's own after a reload.
        return {name: getattr(self, name) for name in names} | {
            "restart": self.height
        }
