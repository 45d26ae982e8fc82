"""ProgressiveDecay: a learning rate that takes its steps from `fit`."""

from typing import Any

import keras
from keras import ops

from keras_dylora.checks import check_fraction, check_positive


@keras.saving.register_keras_serializable(package="keras_dylora")
class ProgressiveDecay(keras.optimizers.schedules.LearningRateSchedule):
    """A linear decay to zero, which begins anew when `fit` orders the columns.

    A progressive run changes what it trains at the order, so its learning rate
    should be high there again. `fit` tells the schedule how many steps the run
    has and where the order comes; without `full_rank_steps` the rate decays
    once. A `fit` that goes on at a later `initial_epoch` goes on in the decay;
    any other `fit` begins anew.

    Args:
        learning_rate: float. The peak.
        restart: float. Where the decay begins anew, as a multiple of the peak.
            Defaults to `None`: `2` if fewer than half of the model's linear
            layers have an adapter, otherwise `1`.
        warmup: float in `[0, 1)`. The share of the steps in which the rate
            rises from zero. Defaults to `0`.
        steps: int. All steps of the run. Defaults to `None`, those of `fit`.
            Give them for a loop of your own, as `train_on_batch`.
        order: int. The step of the order. Defaults to `None`, as `fit` says.
        begin: int. The optimizer's step at which the run begins. Defaults to
            `0`.

    Raises:
        ValueError: if an argument is out of range, or if the rate is asked for
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
        """Takes what `fit` knows; returns whether it is new.

        Args:
            steps: int. All steps of the run.
            order: int. The step of the order, or `None`.
            begin: int. The optimizer's step at which the run begins.
            height: float. What `restart=None` stands for.
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
