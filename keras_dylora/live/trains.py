"""Trains: the methods of a live model that train it and run its functions."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import keras
from keras import ops

from keras_dylora import training
from keras_dylora.layers.tree import Tree
from keras_dylora.live.decays import Decays
from keras_dylora.live.recompile import reset_functions
from keras_dylora.live.tuning import TuningInFit
from keras_dylora.live.untrained import warn_of_frozen, warn_of_idle

if TYPE_CHECKING:
    # The class that this one is mixed into.
    from keras import Model as _Base
else:
    _Base = object

_Step = TypeVar("_Step", bound=Callable[..., Any])


class Trains(_Base):
    """The part of a `DyLoRAModel` that draws ranks and takes steps."""

    _adaptation: Any
    _dylora: Any
    _dylora_options: dict[str, Any]
    _prepare: Any

    @contextlib.contextmanager
    def draw_ranks(
        self, x: Any, non_trainable_variables: Sequence[Any] | None = None
    ) -> Iterator[list[Any] | None]:
        """Draws ranks for calls of the model in a training loop of your own.

        Within a `with` block, calls of the model compute what a step of `fit`
        computes: at one drawn rank, or at one for each example. The next block
        draws the next ranks of the same sequence. `full_rank_steps` last until
        you call `order_ranks`.

        Args:
            x: the inputs of the batch: an array, or a structure of arrays, with
                the examples along the first axis.
            non_trainable_variables: list of tensors. The state that
                `stateless_call` takes, for functions that JAX traces. Defaults
                to `None`: the state is in the model's variables.

        Returns:
            A context manager. It yields the state to call the model with, where
            the position in the rank sequence has advanced. It yields `None` if
            the state is in the model's variables.

        Raises:
            ValueError: if the model is `frozen` or has `objective="summed"`,
                which need more than a call; or if JAX traces without a state.

        Example:

        ```python
        with model.draw_ranks(x), tf.GradientTape() as tape:
            loss = loss_function(y, model(x, training=True))
        ```

        `examples/own_loop.py` has a whole loop for each backend.
        """
        adaptation, state = self._adaptation, non_trainable_variables
        if state is None and training.tracing():
            raise ValueError(
                "On JAX, a traced function needs the state of the model. "
                "Received: non_trainable_variables=None"
            )
        self.train_all_columns()
        gate, state = training.drawn(self, x, state)
        with adaptation.rank_chosen(), adaptation.overridden(gate):
            yield state

    def traced(self, step: _Step) -> _Step:
        """Makes a training step of your own faster on torch: a traced step.

        The step is recorded as one graph, which is then replayed without
        Python, as `compile(jit_compile="trace")` does in `fit`. With
        `jit_compile=True` the graph is compiled as well. On TensorFlow and JAX,
        use `tf.function` and `jax.jit`.

        Args:
            step: function that takes arrays and returns a structure of tensors,
                or `None`. It updates the weights with the model's optimizer.

        Returns:
            A function like `step`.

        Raises:
            TypeError: when the function is called with anything but arrays and
                tensors.
            ValueError: if the backend isn't torch; or, when the function is
                called, if the model isn't compiled.

        Warns:
            UserWarning: if the step can't be traced. Then it runs as it is.

        Example:

        ```python
        @model.traced
        def step(x, y):
            with model.draw_ranks(x):
                loss = loss_function(y, model(x, training=True))
            loss.backward()
            weights = model.trainable_weights
            with torch.no_grad():
                model.optimizer.apply([w.value.grad for w in weights], weights)
            return loss
        ```
        """
        return training.make_own(self, step)

    def train_all_columns(self) -> None:
        """Prepares a step of the user's, whatever was done since the last."""
        adaptation = self._adaptation
        adaptation.named.limit = None
        if adaptation.has_stale_cuts():
            adaptation.drop_tuned_cuts()

    def fit(self, *args: Any, **kwargs: Any) -> keras.callbacks.History:
        with self._dropping_tuned_cuts():
            return self._fit(super().fit, args, kwargs)

    def _fit(self, fit, args, kwargs):
        phases = None
        if hasattr(self, "_dylora"):
            warn_of_frozen(self._dylora)
        decays = Decays(self)
        tuning = TuningInFit(self)
        in_phases = map(self._run_option, ("full_rank_steps", "tune"))
        if decays or any(in_phases):
            phases = training.Phases(training.write_back, decays, tuning)
            args, kwargs = training.with_callback(fit, args, kwargs, phases)
        try:
            history = training.interruptible(self, fit, args, kwargs)
        finally:
            tuning.end()
        if phases is not None:
            phases.settle()
        # On TensorFlow, a subclassed model is built only in its first step.
        if hasattr(self, "_dylora"):
            warn_of_idle(self._dylora)
        return history

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        with self._dropping_tuned_cuts():
            return super().train_on_batch(*args, **kwargs)

    @contextlib.contextmanager
    def _dropping_tuned_cuts(self):
        """In a `with` block, layers ignore tuned cuts; stale ones are dropped.

        Cuts are stale once a step has moved the columns that they mix.
        """
        adaptation = getattr(self, "_dylora", None)
        if adaptation is None or not adaptation.has_stale_cuts():
            yield
            return
        before, cuts = self._iterations(), adaptation.named.cuts
        reset_functions(self)
        try:
            with adaptation.untuned():
                yield
        finally:
            reset_functions(self)
            training.write_back(self)
            moved = self._iterations() != before
            if moved and adaptation.named.cuts is cuts:
                adaptation.drop_tuned_cuts()

    def _iterations(self):
        optimizer = getattr(self, "optimizer", None)
        return optimizer and int(ops.convert_to_numpy(optimizer.iterations))

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        return training.interruptible(self, super().evaluate, args, kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        return training.interruptible(self, super().predict, args, kwargs)

    def _run_option(self, name):
        if hasattr(self, "_dylora"):
            return getattr(self._dylora.config, name)
        return self._dylora_options[name]

    def make_train_function(self, force: bool = False) -> Callable[..., Any]:
        # On TensorFlow, a subclassed model is built only in its first step.
        layers = Tree(self).adapted.values()
        if layers and all(layer.built for layer in layers):
            self.start_training()
        return training.make(self, "train", super().make_train_function, force)

    def make_test_function(self, force: bool = False) -> Callable[..., Any]:
        return training.make(self, "test", super().make_test_function, force)

    def make_predict_function(self, force: bool = False) -> Callable[..., Any]:
        make = super().make_predict_function
        return training.make(self, "predict", make, force)

    def start_training(self) -> None:
        """Makes what a step needs besides the layers, once they are built."""
        self._prepare()
        self._dylora.settle(Tree(self))
        self._dylora.open = False
        self._dylora.named.limit = None  # all columns are trained
        if self.optimizer is None:
            return
        if self._dylora.config.frozen:
            training.check_frozen(self.optimizer)
        if not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)
        training.masked(self)

    def train_step(self, *args: Any) -> Any:
        return training.train_step(self, super().train_step, *args)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        **kwargs: Any,
    ) -> Any:
        compute = super().compute_loss
        if hasattr(self, "_dylora") and self._dylora.training:
            compute = functools.partial(
                self._dylora.objective.loss, self, training.forward, compute
            )
        return compute(x, y, y_pred, sample_weight, **kwargs)
