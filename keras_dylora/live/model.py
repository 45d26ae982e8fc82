"""DyLoRAModel: a Keras model that trains its adapters for every rank."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Self, TypeVar

import keras

from keras_dylora import _keras, training
from keras_dylora.allocation import Rank, RankAllocation
from keras_dylora.config import DyLoRAConfig
from keras_dylora.distributions import RankDistribution
from keras_dylora.layers.low_rank import LowRankAdapter
from keras_dylora.layers.tree import Tree
from keras_dylora.live import sizes
from keras_dylora.live.adaptation import Adaptation
from keras_dylora.live.kept_in_files import KeptInFiles
from keras_dylora.live.live_class import (
    combined_class,
    functional_class,
    is_combined,
)
from keras_dylora.live.quantization import quantize_base
from keras_dylora.live.recompile import reset_functions
from keras_dylora.live.trains import Trains
from keras_dylora.live.with_adapters import WithAdapters

# The type of a model that a function changes in place and returns.
Model = TypeVar("Model", bound=keras.Model)


def adaptation_of(model: keras.Model) -> Adaptation:
    """Returns the `Adaptation` of a model, or raises a `ValueError`."""
    if isinstance(model, DyLoRAModel):
        model._prepare()
    adaptation = getattr(model, "_dylora", None)
    if adaptation is None:
        raise ValueError(
            "The model must be enabled with `enable_dylora` or be a "
            "`DyLoRAModel` whose layers are built. "
            f"Received: {model!r} (of type {type(model).__name__})"
        )
    return adaptation


@keras.saving.register_keras_serializable(package="keras_dylora")
@_keras.keeps_own_state
class DyLoRAModel(KeptInFiles, WithAdapters, Trains, keras.Model):
    """A Keras model that trains its adapters for every rank at once.

    Each training step draws a rank `b` and runs Keras's own step with the first
    `b` columns and rows of every adapter (Algorithm 1). The step logs the rank
    as `rank`, or as `drawn_rank` if a metric is called `rank`. In frozen mode,
    a step changes only column and row `b` of the adapters, and the layers that
    are trained in full (Eq. 10).

    `enable_dylora` turns an existing model into a `DyLoRAModel`. You can also
    build one from DyLoRA layers such as `DyLoRADense`, functional or
    subclassed. Its layers must agree in `rank`, `min_rank`, `alpha`, `scaling`
    and `frozen`.

    Args:
        *args: as in `keras.Model`, such as `inputs, outputs`.
        rank_distribution: as in `DyLoRAConfig`. Defaults to `"uniform"`.
        objective: as in `DyLoRAConfig`. Defaults to `"sampled"`.
        seed: int. Seed of the rank sequence. Defaults to `0`.
        draw: as in `DyLoRAConfig`. Defaults to `"step"`.
        full_rank_steps: int or float, as in `DyLoRAConfig`. Defaults to `0`.
        tune: float, as in `DyLoRAConfig`. Defaults to `0`.
        **kwargs: as in `keras.Model`.

    Raises:
        ValueError: if the layers disagree, or if there are none.

    Example:

    ```python
    inputs = keras.Input((32,))
    x = keras_dylora.DyLoRADense(64, "relu", rank=4, alpha=8)(inputs)
    outputs = keras_dylora.DyLoRADense(1, rank=4, alpha=8)(x)
    model = keras_dylora.DyLoRAModel(inputs, outputs, seed=1)
    model.compile("adam", "mse")
    model.fit(x_train, y_train)
    model.set_rank(2)
    model.predict(x_test)
    ```

    Reference: [Valipour et al., 2022](https://arxiv.org/abs/2210.07558)
    """

    original_class = keras.Model
    train_function: Any

    def __init__(
        self,
        *args: Any,
        rank_distribution: str | RankDistribution = "uniform",
        objective: str = "sampled",
        seed: int = 0,
        draw: str = "step",
        full_rank_steps: int | float = 0,
        tune: float = 0.0,
        **kwargs: Any,
    ) -> None:
        functional = len(args) == 2 or "outputs" in kwargs
        if is_combined(type(self)):
            raise ValueError(
                "The class of this model can't be called without the model's "
                "config, as `clone_model` does. For a model with fresh "
                "weights, use `model.from_config(model.get_config())`; for a "
                "copy, use `save` and `load_model`. "
                f"Received: {type(self).__name__}{args}"
            )
        if functional:
            # Otherwise, Keras would make `Functional` a base of this very
            # class, and so of every subclassed model.
            combined = combined_class(
                type(self),  # type: ignore[arg-type]
                functional_class(),
            )
            _keras.set_class(self, combined)
        super().__init__(*args, **kwargs)
        options = {
            "rank_distribution": rank_distribution,
            "objective": objective,
            "seed": seed,
            "draw": draw,
            "full_rank_steps": full_rank_steps,
            "tune": tune,
        }
        object.__setattr__(self, "_dylora_options", options)
        if functional:
            self._prepare()

    def _prepare(self):
        """Takes over the layers of a hand-built model, once they are built."""
        if hasattr(self, "_dylora"):
            return
        adaptation = Adaptation.of_hand_built(self, self._dylora_options)
        adaptation.configure(adaptation.config)
        object.__setattr__(self, "_dylora", adaptation)

    @property
    def _adaptation(self):
        return adaptation_of(self)

    @property
    def dylora_config(self) -> DyLoRAConfig:
        """The `DyLoRAConfig` of the model; its `rank` is the maximum."""
        return adaptation_of(self).config

    @property
    def dylora_layers(self) -> list[LowRankAdapter]:
        """The adapted layers, in forward order."""
        return list(adaptation_of(self).layers.values())

    @property
    def rank(self) -> Rank:
        """int. The rank that the model computes at outside of training.

        Training and validation don't change it. The maximum rank is
        `dylora_config.rank`. If layers have different ranks, it is a
        `RankAllocation`, unless they differ only because `rank_pattern` gives
        some a lower maximum.
        """
        adaptation = adaptation_of(self)
        training.write_back(self)
        ranks = adaptation.ranks
        highest = max(ranks.values())
        if ranks != adaptation.by_layer(highest):
            return RankAllocation.of(self, ranks)
        return highest

    @property
    def trainable(self) -> bool:
        """Whether the model trains what `enable_dylora` left trainable."""
        return super().trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        adaptation = self.__dict__.get("_dylora")
        if adaptation is None:
            keras.Model.trainable.fset(self, value)
            return
        tree = Tree(self)
        adaptation.settle(tree)
        keras.Model.trainable.fset(self, value)
        if value:
            # Keras makes everything below trainable, even what never should be.
            adaptation.spec.apply(tree)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "trainable":
            # TensorFlow would skip a value that doesn't change, but the layers
            # below may differ from it.
            DyLoRAModel.trainable.fset(self, value)  # type: ignore[attr-defined]
        else:
            super().__setattr__(name, value)

    def set_rank(self, rank: Rank) -> None:
        """Sets the rank for `predict`, `evaluate`, `generate` and calls.

        Compiled functions read the new rank, so nothing is traced again. A live
        model has one rank at a time, which all threads share. To serve several
        ranks at once, use `export_ranks`, or one merged model for each rank.

        Args:
            rank: int in `0..config.rank`, or `RankAllocation`. At `0` the
                adapters add nothing; layers that are trained in full keep
                their trained values.

        Raises:
            ValueError: if `rank` is out of range, or an allocation is for
                another model.
            TypeError: if `rank` isn't an integer.

        Warns:
            UserWarning: if the adapters were neither trained at this rank nor
                ordered. All functions that take a rank warn of this.

        Example:

        ```python
        clf.set_rank(4)
        clf.predict(texts)
        ```
        """
        adaptation = adaptation_of(self)
        adaptation.warn_of_cut(rank)
        adaptation.set_ranks(rank)

    def dylora_summary(
        self, print_fn: Callable[[str], object] | None = None
    ) -> None:
        """Prints the adapted layers, and the parameters at each rank.

        The table of layers has their paths, the sizes of their matrices, their
        ranks and their parameters. The table of ranks has the number of
        parameters, including those that are trained in full, and their bytes.

        Args:
            print_fn: callable that takes the text. Defaults to `None`:
                `print`.

        Raises:
            ValueError: if a hand-built model isn't built yet.
        """
        adaptation_of(self)
        (print_fn or print)(sizes.tables(self))

    @contextlib.contextmanager
    def rank_scope(self, rank: Rank) -> Iterator[Self]:
        """Sets the rank within a `with` block.

        It takes what `set_rank` takes, and raises the same errors. Within a
        training step, a loss or a function that JAX differentiates or compiles,
        the rank applies only to calls of the model.

        Example:

        ```python
        with clf.rank_scope(2):
            clf.predict(texts)
        ```
        """
        adaptation = adaptation_of(self)
        if adaptation.training or training.tracing():
            with adaptation.overridden(adaptation.gates_at(rank)):
                yield self
            return
        # In a TensorFlow graph, there are no values to check.
        with contextlib.suppress(NotImplementedError):
            adaptation.warn_of_cut(rank)
        with adaptation.at(rank):
            yield self

    def quantize(
        self,
        mode: Literal["int8", "int4"] | None = None,
        config: Any = None,
        filters: str
        | Sequence[str]
        | Callable[[keras.Layer], bool]
        | None = None,
        **kwargs: Any,
    ) -> None:
        """Quantizes the base model; the adapters stay in float32.

        Layers that are trained in full, such as a task head, are left out, as
        no gradient reaches an integer kernel.

        Args:
            mode: `"int8"` or `"int4"`. Defaults to `None`: the mode of
                `config`.
            config: as in `keras.Model.quantize`. Defaults to `None`: Keras's
                default for the mode.
            filters: str, list of str, or callable of a layer. Which layers to
                quantize, as in `keras.Model.quantize`. Defaults to `None`: all.
            **kwargs: as in `keras.Model.quantize`.

        Raises:
            TypeError: if `filters` has another type.
            ValueError: if the mode is another one, or if a layer is quantized
                already.

        Example:

        ```python
        keras_dylora.enable_dylora(clf, rank=8)
        clf.quantize("int8")
        clf.fit(texts, labels)
        ```
        """
        adaptation = adaptation_of(self)
        quantize = _keras.covered_quantize(self) or super().quantize
        try:
            quantize_base(Tree(self), quantize, mode, config, filters, **kwargs)
        finally:
            adaptation.forget_replaced()
            _keras.track_for_torch(self)
            reset_functions(self)

    def _own_state(self):
        return self._dylora.state if hasattr(self, "_dylora") else {}

    @property
    def _ranks_drawn(self):
        return adaptation_of(self).ranks_drawn
