"""AdapterWeights: adapters in NumPy, between a live model and any file.

They are taken from a model, cut to ranks, checked against a model and put on
one.
"""

import dataclasses

import numpy as np

from keras_dylora import _keras, training
from keras_dylora import ranks as rank_functions
from keras_dylora.adapters.fitting import (
    check_float,
    check_shapes,
    tensor_names,
)
from keras_dylora.adapters.identity import Identity, renamed
from keras_dylora.config import DyLoRAConfig
from keras_dylora.layers.factors import Factors, float32_array
from keras_dylora.layers.kinds import adapted_class, matrix_shape
from keras_dylora.layers.tokens import NAME as TOKENS
from keras_dylora.layers.tuned import TunedCut, find
from keras_dylora.live.enable import upgrade
from keras_dylora.live.model import DyLoRAModel, adaptation_of
from keras_dylora.live.named import DEFAULT, check_name
from keras_dylora.live.targets import (
    Targets,
    check_targets,
    trained_by_default,
)
from keras_dylora.live.tokens import find_tokens


@dataclasses.dataclass(frozen=True)
class AdapterWeights:
    """The adapters of a model, and everything else that was trained.

    Each layer has its own rank and scale. The rank of the config is the highest
    of them, and its `rank_pattern` names only paths of layers. `trained` has
    the weights that were trained in full, with their moving averages, by path.
    `identity` is `None` if the model is unknown, as in an old file. `cuts` are
    for the columns of all layers at the highest rank.
    """

    layers: dict[str, Factors]
    trained: dict[str, np.ndarray]
    config: DyLoRAConfig
    identity: Identity | None = None
    cuts: tuple[TunedCut, ...] = ()

    @classmethod
    def of(cls, tree, name=None):
        """The adapter of a name in an enabled model, at its maximum rank.

        Without a name, it is the active adapter.
        """
        adaptation = adaptation_of(tree.model)
        adaptation.settle(tree)
        named, config = adaptation.named, adaptation.named_config
        name = named.active if name is None else name
        values, rank = named.values_of(name, tree), named.max_rank_of(name)
        layers = {
            path: Factors(
                *(float32_array(values[f"{path}/{x}"]) for x in ("down", "up")),
                config.scale.at(layer.rank),
            ).cut(min(rank, layer.rank), config.scale)
            for path, layer in adaptation.layers.items()
        }
        trained = adaptation.spec.head(tree)
        config = with_max_ranks(
            config, {p: x.rank for p, x in adaptation.layers.items()}
        )
        return cls(
            layers,
            {path: float32_array(values[path]) for path in trained},
            config if rank == config.rank else config.at_maximum(rank),
            Identity.of(tree, trained),
            tuple(cut.of_columns(rank) for cut in named.cuts_of(name)),
        )

    def __repr__(self):
        return (
            f"AdapterWeights({len(self.layers)} layers, maximum rank "
            f"{self.config.rank}, {len(self.trained)} weights trained in full)"
        )

    def cut(self, ranks):
        """A copy cut to a rank, by default the maximum, or to a dict of ranks.

        The arrays are smaller, too. If the rank has a tuned cut, its mixtures
        are the columns. The tuned cuts of lower ranks stay only if all columns
        do. Raises what `ranks.by_layer` raises.
        """
        ranks = rank_functions.by_layer(
            self.config.rank if ranks is None else ranks, self.ranks, 1
        )
        tuned, scale = find(self.cuts, ranks), self.config.scale
        whole = ranks == self.ranks
        return dataclasses.replace(
            self,
            layers={
                p: factors.cut(ranks[p], scale, tuned and tuned.sides(p))
                for p, factors in self.layers.items()
            },
            cuts=self.cuts if whole else (),
            config=self.config.at_maximum(max(ranks.values())),
        )

    def placed(self, tree, whole=True, strict=True, name=DEFAULT):
        """A copy with the paths of a model that it fits.

        Raises a `ValueError` if it doesn't fit, see `check`. If `strict`, it
        also raises one if the adapter is of another model.
        """
        if self.identity is None:
            self.check(tree, whole, name)
            return self
        try:
            paths = self.identity.paths_in(tree)
        except ValueError:
            self.check(tree, whole, name)  # its message may tell more
            if strict:
                raise
            return self
        placed = self.renamed(paths)
        placed.check(tree, whole, name)
        if strict:
            self.identity.check_base(tree, paths)
        return placed

    def renamed(self, paths):
        """A copy for a model with other paths, by a dict of old to new path."""
        return dataclasses.replace(
            self,
            layers={paths.get(p, p): x for p, x in self.layers.items()},
            trained={renamed(p, paths): x for p, x in self.trained.items()},
            cuts=tuple(cut.renamed(paths) for cut in self.cuts),
            config=with_max_ranks(
                self.config,
                {paths.get(p, p): b for p, b in self.max_ranks.items()},
            ),
        )

    def check(self, tree, whole=True, name=DEFAULT):
        """Raises a `ValueError` if the weights don't fit a model.

        An enabled model must have the same rank and layers. Any other model
        must have layers that can be adapted in this way. The message lists
        missing, extra and mis-shaped tensors. If `whole`, the other trained
        weights must be those that an enabled model trains. Under a new name,
        the adapter may have a lower rank than the model.
        """
        check_name(name)
        model = tree.model
        enabled = isinstance(model, DyLoRAModel)
        if enabled:
            adaptation = adaptation_of(model)
            adaptation.settle(tree)
            high, names = model.dylora_config.rank, model.adapter_names
            if name != DEFAULT:
                adaptation.named.check_free(name)
            rule = "the rank" if name in names else "at most the rank"
            rank = self.config.rank
            if rank > high or (name in names and rank != high):
                raise ValueError(
                    f"An adapter must have {rule} of the model it is loaded "
                    f"into. Received: rank {rank} for a model of rank {high}"
                )
        every, tokens = tree.weights, None
        if not enabled:
            tokens = self._token_rows(tree)
        elif self.has_tokens:
            self._check_tokens(model.dylora_config.trainable_tokens)
        # The file says what to adapt and which averages it holds; the model
        # must have them.
        trained = {p: v for p, v in every.items() if p in self.trained}
        if enabled:
            layers = adaptation.layers
            if whole:
                averages = adaptation.spec.statistics(tree)
                trained = {p: v for p, v in trained.items() if p in averages}
                trained |= adaptation.spec.full(tree)
        else:
            layers = {
                path: layer
                for path, layer in tree.layers.items()
                if adapted_class(layer) and path in self.layers
            }
        shapes = {f"head/{path}": tuple(v.shape) for path, v in trained.items()}
        if tokens:
            shapes[f"head/{tokens.weight}"] = tokens.shape
        for path, layer in layers.items():
            inputs, outputs = matrix_shape(layer)
            rank = self.layers[path].rank if path in self.layers else None
            shapes |= tensor_names(path, (inputs, rank), (rank, outputs))
            if enabled and rank is not None and rank > layer.rank:
                raise ValueError(
                    "An adapter must have at most the rank of each layer it "
                    f"is loaded into. Received: rank {rank} for {path!r} of "
                    f"rank {layer.rank}"
                )
        missing = sorted(set(layers) - set(self.layers))
        extra = sorted(set(self.layers) - set(layers))
        summary = f" without {missing} and with {extra}"
        check_shapes(
            shapes, self.tensors(), summary if missing or extra else ""
        )
        highest = max(factors.rank for factors in self.layers.values())
        if highest != self.config.rank:
            raise ValueError(
                "The highest rank of the layers must be that of the config. "
                f"Received: {highest} instead of {self.config.rank}"
            )
        check_float({p: v for p, v in every.items() if p in self.trained})

    def put_on(self, tree, whole=True, strict=True, name=DEFAULT):
        """Checks these weights and puts them on a model; enables it if needed.

        The weights get the paths of the model, as by `placed`, and become its
        active adapter, called `name`. A layer of a lower rank than the adapter
        gets columns of zeros, and the model computes at the ranks of the
        layers. An adapter of a lower rank than the model has fresh columns
        above its rank. Where the scale differs, it is multiplied into the rows.
        """
        self, model = self.placed(tree, whole, strict, name), tree.model
        if isinstance(model, DyLoRAModel):
            training.write_back(model)
            named = adaptation_of(model).named
            if name in named.names:
                named.activate(name, tree)
            else:
                named.add(name, tree)
        else:
            self._enable(tree, whole)
            adaptation_of(model).named.rename(name)
        adaptation, rank = adaptation_of(model), self.config.rank
        config = model.dylora_config
        for path, layer in adaptation.layers.items():
            factors = self.layers[path]
            scale = config.scale.at(max(factors.rank, 1))
            padded = factors.padded(layer.rank)
            fresh = float32_array(layer.down)[:, rank:]
            layer.down.assign(np.hstack([padded.down[:, :rank], fresh]))
            layer.up.assign(padded.up * np.float32(padded.scale / scale))
        adaptation.named.limit = None
        adaptation.set_tuned_cuts(
            [cut.of_columns(config.rank) for cut in self.cuts]
        )
        if rank < config.rank:
            adaptation.set_ranks(rank)
            adaptation.named.limit = rank
        if len(set(self.ranks.values())) > 1:
            adaptation.set_ranks(self.ranks)
        weights = tree.weights
        for path, value in self.trained.items():
            weights[path].assign(value)

    def _enable(self, tree, whole):
        """Enables a model for exactly these layers and what they train.

        The layers aren't found by a config, as a path in one could also match
        others.
        """
        layers = {p: x for p, x in tree.layers.items() if p in self.layers}
        check_targets(tree, layers)
        tokens = self._token_rows(tree)
        trained = trained_by_default(tree)
        if whole or self.trained:
            weights, trained = tree.weights, {}
            for path in self.trained:
                if tokens and path == tokens.weight:
                    continue
                layer = path.rpartition("/")[0]
                averages = _keras.statistics(tree.every[layer])
                mine = trained.setdefault(layer, [])
                if all(weights[path] is not v for v in averages):
                    mine.append(weights[path])
        config = dataclasses.replace(
            self.config,
            target_layers=list(layers),
            trainable_tokens=tokens and tokens.tokens,
        )
        targets = Targets(layers, trained, {}, self.max_ranks, tokens)
        upgrade(tree, config, targets)

    @property
    def has_tokens(self):
        """Whether the other trained weights include rows of tokens."""
        return any(path.endswith(f"/{TOKENS}") for path in self.trained)

    def _token_rows(self, tree):
        """The `TokenRows` of a model that isn't enabled, or `None`."""
        wanted = self.config.trainable_tokens if self.has_tokens else None
        return find_tokens(tree, wanted, self.layers)

    def _check_tokens(self, here):
        """Raises a `ValueError` if a model trains other tokens."""
        if here != self.config.trainable_tokens:
            raise ValueError(
                "An adapter must have the `trainable_tokens` of the model it "
                f"is loaded into. Received: {self.config.trainable_tokens} "
                f"for a model of {here}"
            )

    @property
    def max_ranks(self):
        """The maximum rank of each layer in a model of the config, by path."""
        lower = self.config.rank_pattern or {}
        return {path: lower.get(path, self.config.rank) for path in self.layers}

    @property
    def ranks(self):
        """The rank of each layer, by its path."""
        return {path: factors.rank for path, factors in self.layers.items()}

    def tensors(self):
        """All arrays, by their names in our own files."""
        named = {f"head/{path}": x for path, x in self.trained.items()}
        for path, factors in self.layers.items():
            named |= tensor_names(path, factors.down, factors.up)
        return named

    def cut_tensors(self):
        """The tuned cuts, by their names in our own files."""
        return {
            f"tuned/{i}/{path}/{side}": x
            for i, cut in enumerate(self.cuts)
            for side in ("left", "right")
            for path, x in getattr(cut, side).items()
        }

    @classmethod
    def of_tensors(cls, tensors, config, identity=None, ranks=None):
        """Undoes `tensors` and `cut_tensors`, or raises a `ValueError`.

        `ranks` has the rank of each layer, if it isn't that of the config for
        all.
        """
        kinds = {"adapter": {}, "head": {}}
        numbers = {x.split("/")[1] for x in tensors if x.startswith("tuned/")}
        for name in tensors:
            kind, _, path = name.partition("/")
            if kind == "adapter":
                path = path.removesuffix("/down").removesuffix("/up")
            kinds.get(kind, {})[path] = name
        shapes = dict.fromkeys(kinds["head"].values())
        ranks = rank_functions.by_layer(
            config.rank if ranks is None else ranks,
            dict.fromkeys(kinds["adapter"], config.rank),
        )
        for path, b in ranks.items():
            shapes |= tensor_names(path, (None, b), (b, None))
        sides, high = {}, config.rank
        for left in (f"tuned/{i}/{p}/left" for i in numbers for p in ranks):
            b = tensors[left].shape[-1] if left in tensors else None
            sides[left] = high, b
            sides[f"{left.removesuffix('left')}right"] = b, high
        check_shapes(shapes | sides, tensors)
        cuts = tuple(
            TunedCut(
                *(
                    {p: tensors[f"tuned/{i}/{p}/{side}"] for p in ranks}
                    for side in ("left", "right")
                )
            )
            for i in sorted(numbers, key=int)
        )
        layers = {
            path: Factors(
                *(tensors[x] for x in tensor_names(path, 0, 0)),
                config.scale.at(max(b, 1)),
            )
            for path, b in ranks.items()
        }
        trained = {path: tensors[x] for path, x in kinds["head"].items()}
        return cls(layers, trained, config, identity, cuts)


def with_max_ranks(config, ranks):
    """The config, with a `rank_pattern` of the maximum ranks by path."""
    lower = {path: b for path, b in ranks.items() if b < config.rank}
    return dataclasses.replace(config, rank_pattern=lower)
