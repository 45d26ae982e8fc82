"""DyLoRAConfig: every choice of a run, and the part that layers need."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import keras

from keras_dylora.checks import (
    as_tokens,
    check_fraction,
    check_one_of,
    check_positive,
    is_share,
)
from keras_dylora.distributions import (
    Categorical,
    RankDistribution,
    Uniform,
    get_distribution,
)
from keras_dylora.ranks import (
    INT32_MAX,
    SCALINGS,
    Scale,
    as_pattern,
    as_rank,
)
from keras_dylora.training.objectives import OBJECTIVES

# Names, paths or regular expressions, or a function of a path and its layer.
Layers = str | Sequence[str] | Callable[[str, keras.Layer], bool] | None


@dataclasses.dataclass(frozen=True)
class AdapterArguments:
    """The arguments that layers and configs share; see `DyLoRAConfig`."""

    rank: int = 8
    min_rank: int = 1
    alpha: float = 16.0
    frozen: bool = False
    dropout: float = 0.0
    scaling: str = "rank"

    def __post_init__(self) -> None:
        rank, alpha, dropout = self.rank, self.alpha, self.dropout
        as_rank(rank, 1)
        as_rank(self.min_rank, 1, rank, "min_rank")
        check_positive("alpha", alpha)
        if not isinstance(self.frozen, bool):
            raise TypeError(
                "`frozen` must be True or False. "
                f"Received: frozen={self.frozen!r}"
            )
        check_fraction("dropout", dropout)
        check_one_of("scaling", self.scaling, SCALINGS)
        # NumPy's scalars are allowed, but JSON and Keras need Python's.
        for field in dataclasses.fields(self):
            object.__setattr__(
                self,
                field.name,
                field.type(getattr(self, field.name)),  # type: ignore[operator]
            )

    @classmethod
    def of(cls, source: Any) -> Self:
        """The arguments that a layer or a config has as its attributes."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: getattr(source, name) for name in names})

    def at_most(self, rank: int) -> Self:
        """The arguments with a maximum rank of at most `rank`."""
        rank = min(self.rank, rank)
        return dataclasses.replace(
            self, rank=rank, min_rank=min(self.min_rank, rank)
        )


@keras.saving.register_keras_serializable(package="keras_dylora")
@dataclasses.dataclass(frozen=True)
class DyLoRAConfig:
    """The choices that define a DyLoRA run.

    Args:
        rank: int. The maximum rank, which is the number of columns of every
            adapter. A model computes at `model.rank`. Defaults to `8`.
        min_rank: int. The lowest rank that is trained. `min_rank=rank` gives
            fixed-rank LoRA. Defaults to `1`.
        alpha: float. The scale of the adapters; see `scaling`. Defaults to
            `16`.
        target_layers: the layers that get an adapter: a name, a path, a regular
            expression that matches one of them whole, a list of those,
            `"all-linear"` (no embeddings, no convolutions), `"all-conv"`, or a
            callable `(path, layer) -> bool`. They can be `Dense`,
            `EinsumDense`, `Embedding`, `ReversibleEmbedding` and `Conv1D` to
            `Conv3D`. Defaults to `None`: the query and value projections.
        trainable_layers: the layers that are trained in full: a name, path,
            regular expression, list or callable, as above. `()` means none.
            Defaults to `None`: the task head, which is every layer outside of
            `model.backbone`.
        rank_distribution: `"uniform"`, `"geometric"` (p = 0.15), or a
            `Uniform`, `Geometric` or `Categorical`. Defaults to
            `"uniform"`.
        frozen: bool. Whether a step at rank `b` updates only column and row `b`
            (Eq. 10), not all of the first `b`. Defaults to `False`.
        dropout: float in `[0, 1)`. Dropout on the adapters' input. Defaults
            to `0`.
        objective: str. How a step averages over the rank distribution.
            `"sampled"` draws one rank (Algorithm 1). `"summed"` takes the sum
            of the losses at all ranks, weighted by their probabilities (nested
            dropout, Table 7), which costs a pass for each rank. `"matryoshka"`
            takes one pass with the sum of the gates of all ranks that have a
            probability above zero (its paper uses `scaling="sqrt"`). The last
            two draw nothing, so they don't go with `frozen`, `draw="example"`
            or `full_rank_steps`. Defaults to `"sampled"`.
        seed: int. The seed of the rank sequence, of the adapters' initial
            values and of their dropout. Defaults to `0`.
        scaling: str. The scale of rank `b`. `"rank"` is `alpha / b` (Eq. 7).
            `"sqrt"` is `alpha / sqrt(b)`, as in rsLoRA. `"constant"` is
            `alpha / rank`, so a lower rank is a prefix of a higher one.
            Defaults to `"rank"`.
        draw: str. `"step"` draws one rank for the whole batch (Algorithm 1).
            `"example"` draws one rank for each example, so that every batch has
            the proportions of `rank_distribution`; it doesn't go with `frozen`.
            Defaults to `"step"`.
        full_rank_steps: int, or float in `(0, 1)`. How many steps are taken
            at the maximum rank, or which share of the steps of `fit`. Then
            `fit` puts the columns of the adapters in order, as `order_ranks`
            does, and ranks are drawn from there. Can't be `frozen`. Defaults
            to `0`.
        tune: float in `[0, 1)`. The last share of the steps of `fit`. Each of
            them trains the maximum rank together with the cuts of
            `tuned_ranks`, and then tunes those cuts on the same batch, as
            `tune_ranks` does. It takes three passes. Defaults to `0`.
        rank_pattern: dict of str to int in `1..rank`. Lower maximum ranks of
            some layers. A key is a name, path or regular expression, as in
            `target_layers`; the first one that matches a layer counts. At a
            higher rank of the model, such a layer stays at its maximum.
            Defaults to `None`: `rank` for all layers.
        trainable_tokens: list of int, the ids of tokens whose rows in the table
            of tokens are trained in full; or `"new"`, the tokens that the
            model's tokenizer has beyond the rows of the table, which then
            grows. Defaults to `None`: no tokens.

    Raises:
        ValueError: if a value is outside its range.
        TypeError: if a value has the wrong type.

    Example:

    ```python
    config = keras_dylora.DyLoRAConfig(rank=16, alpha=32, frozen=True)
    keras_dylora.enable_dylora(model, config)
    ```

    Reference:

    - [Valipour et al., 2022](https://arxiv.org/abs/2210.07558)
    - [Rippel et al., 2014](https://arxiv.org/abs/1402.0915), summed
    - [Modoranu et al., 2026](https://arxiv.org/abs/2605.07850), matryoshka
    """

    rank: int = 8
    min_rank: int = 1
    alpha: float = 16.0
    target_layers: Layers = None
    trainable_layers: Layers = None
    rank_distribution: str | RankDistribution = "uniform"
    frozen: bool = False
    dropout: float = 0.0
    objective: str = "sampled"
    seed: int = 0
    scaling: str = "rank"
    draw: str = "step"
    full_rank_steps: int | float = 0
    tune: float = 0.0
    rank_pattern: Mapping[str, int] | None = None
    trainable_tokens: str | Sequence[int] | None = None

    def __post_init__(self) -> None:
        arguments = dataclasses.asdict(AdapterArguments.of(self))
        for name, value in arguments.items():
            object.__setattr__(self, name, value)
        pattern = as_pattern(self.rank_pattern, self.rank)
        object.__setattr__(self, "rank_pattern", pattern)
        self.distribution.probabilities(self.min_rank, self.rank)
        check_one_of("objective", self.objective, OBJECTIVES)
        check_one_of("draw", self.draw, ("step", "example"))
        seed = as_rank(self.seed, 0, 2**63 - 1, "seed")
        object.__setattr__(self, "seed", seed)
        if not is_share(self.full_rank_steps):
            steps = as_rank(
                self.full_rank_steps, 0, INT32_MAX, "full_rank_steps"
            )
            object.__setattr__(self, "full_rank_steps", steps)
        check_fraction("tune", self.tune)
        object.__setattr__(self, "tune", float(self.tune))
        object.__setattr__(
            self, "trainable_tokens", as_tokens(self.trainable_tokens)
        )
        if self.tune and not self.tuned_ranks:
            raise ValueError(
                "`tune` is for ranks below the maximum. "
                f"Received: tune={self.tune}, rank={self.rank}, "
                f"rank_distribution={self.rank_distribution!r}"
            )
        if is_share(self.full_rank_steps) and (
            self.full_rank_steps + self.tune > 1
        ):
            raise ValueError(
                "`full_rank_steps` and `tune` are shares of the same steps, "
                "so together they mustn't exceed 1. Received: "
                f"full_rank_steps={self.full_rank_steps}, tune={self.tune}"
            )
        if self.frozen and not OBJECTIVES[self.objective].draws:
            raise ValueError(
                "`frozen` updates the column of the drawn rank, so it needs "
                f"`objective='sampled'`. Received: "
                f"objective={self.objective!r}"
            )
        progressive = self.draw == "example" or self.full_rank_steps
        if progressive and (
            self.frozen or not OBJECTIVES[self.objective].draws
        ):
            raise ValueError(
                "`draw='example'` and `full_rank_steps` need "
                "`objective='sampled'` and `frozen=False`. Received: "
                f"draw={self.draw!r}, full_rank_steps={self.full_rank_steps}, "
                f"objective={self.objective!r}, frozen={self.frozen}"
            )

    @classmethod
    def progressive(
        cls,
        full_rank_steps: int | float = 0.4,
        tune: float = 0.0,
        **fields: Any,
    ) -> Self:
        """The best recipe that we know for good quality at every rank.

        It trains LoRA at the maximum rank first. Then it orders the columns,
        and each example gets its own rank: a quarter of the examples are at the
        maximum, the others are uniform over all ranks. All ranks have the scale
        `alpha / rank`. `ProgressiveDecay` is the learning rate for it.

        Args:
            full_rank_steps: int, or float in `(0, 1)`. Steps at the maximum
                rank, or their share of the steps of `fit`. The more, the
                better the highest ranks and the worse the lowest. Defaults to
                `0.4`.
            tune: float in `[0, 1)`. The last share of the steps, which tune
                the cuts of lower ranks while they train. Defaults to `0`.
            **fields: other fields of `DyLoRAConfig`, which take precedence.

        Returns:
            A `DyLoRAConfig`.

        Raises:
            ValueError: if a value is outside its range.
            TypeError: if a value has the wrong type, or a field is unknown.

        Example:

        ```python
        config = keras_dylora.DyLoRAConfig.progressive(rank=8, alpha=16)
        keras_dylora.enable_dylora(model, config)
        ```
        """
        recipe = {
            "scaling": "constant",
            "draw": "example",
            "rank_distribution": Uniform(full=0.25),
        }
        return cls(
            full_rank_steps=full_rank_steps, tune=tune, **{**recipe, **fields}
        )

    @property
    def scale(self) -> Scale:
        """The `Scale` of `rank`, `alpha` and `scaling`."""
        return Scale(self.rank, self.alpha, self.scaling)

    @property
    def distribution(self) -> RankDistribution:
        """The `RankDistribution` that `rank_distribution` names."""
        return get_distribution(self.rank_distribution)

    @property
    def rank_probabilities(self) -> dict[int, float]:
        """dict. The probability of each rank that is trained, by rank."""
        probabilities = self.distribution.probabilities(
            self.min_rank, self.rank
        )
        return {
            b: float(p)
            for b, p in enumerate(probabilities, start=self.min_rank)
            if p > 0
        }

    @property
    def draws_ranks(self) -> bool:
        """Whether a run has steps at drawn ranks.

        It has none if shares of its steps make up `full_rank_steps` and `tune`.
        """
        full_rank = self.full_rank_steps
        return not (is_share(full_rank) and full_rank + self.tune >= 1 - 1e-9)

    @property
    def tuned_ranks(self) -> list[int]:
        """list of int. The ranks whose cuts are tuned if none are named.

        They are the ranks of a `Categorical` distribution, otherwise the powers
        of two, and always below the maximum.
        """
        ranks: Iterable[int] = (2**i for i in range(self.rank.bit_length()))
        if isinstance(self.distribution, Categorical):
            ranks = self.distribution.by_rank
        return [b for b in ranks if b < self.rank]

    def at_maximum(self, rank: int) -> Self:
        """The config of the same adapters, cut to a maximum rank."""
        distribution = self.rank_distribution
        if isinstance(distribution, Categorical):
            weights = {
                b: w for b, w in distribution.by_rank.items() if b <= rank
            }
            distribution = (
                Categorical(weights) if any(weights.values()) else "uniform"
            )
        alpha = self.alpha
        if self.scaling == "constant":  # the scale stays, alpha / rank
            alpha *= rank / self.rank
        pattern = self.rank_pattern or {}
        cut = dataclasses.replace(
            self,
            rank=rank,
            rank_pattern={name: min(b, rank) for name, b in pattern.items()},
            alpha=alpha,
            min_rank=min(self.min_rank, rank),
            rank_distribution=distribution,
            tune=0.0,
        )
        tune = self.tune if cut.tuned_ranks else 0.0
        return dataclasses.replace(cut, tune=tune)

    def get_config(self) -> dict[str, Any]:
        config = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
        }
        if isinstance(self.rank_distribution, RankDistribution):
            config["rank_distribution"] = keras.saving.serialize_keras_object(
                self.rank_distribution
            )
        for name in ("target_layers", "trainable_layers"):
            if callable(config[name]):
                raise ValueError(
                    f"A callable `{name}` can't be written to a config. Use "
                    "names or regular expressions. "
                    f"Received: {name}={config[name]!r}"
                )
            if isinstance(config[name], (list, tuple)):
                config[name] = list(config[name])
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        config = dict(config)
        config["rank_distribution"] = _revived(config)
        return cls(**config)


def _revived(config):
    distribution = config.get("rank_distribution", "uniform")
    if isinstance(distribution, dict):
        return get_distribution(distribution)
    return distribution
