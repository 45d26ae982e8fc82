"""Operations in any order, as a user may mix them (hypothesis).

The machine has an account of its own: which weights are trained, what each
adapter's are, at which ranks it computes. After each operation the model must
be as the account says, and compute what NumPy makes of it; an operation that
raises must have changed nothing.
"""

import copy
import dataclasses
import functools
import shutil
import tempfile
import warnings

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import keras_dylora as kd
from keras_dylora.layers.tuned import TunedCut
from tests import backend

ADAPTED = ("first", "second")
TRAINED = ("statistics", "out")
# Of a normalization, what no gradient trains.
STATISTICS = ("moving_mean", "moving_variance")
STEPS = 2  # the rows of a fresh adapter move first, then its columns
RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 6)).astype("float32")
Y = RNG.normal(size=(4, 2)).astype("float32")
IDS = RNG.integers(0, 9, size=(4, 6))


def dense(name, units, activation="tanh", **adapter):
    cls = kd.DyLoRADense if adapter else keras.layers.Dense
    return cls(units, activation, name=name, **adapter)


def statistics():
    """A normalization that has statistics alone, and no trained weight."""
    return keras.layers.BatchNormalization(
        center=False, scale=False, name="statistics"
    )


def functional():
    inputs = keras.Input((6,))
    x = dense("first", 8)(inputs)
    x = keras.layers.LayerNormalization(name="norm")(x)
    x = dense("plain", 5)(dense("second", 5)(x))
    head = keras.Sequential(
        [keras.Input((5,)), statistics(), dense("out", 2, None)], name="head"
    )
    return keras.Model(inputs, head(x), name="model")


@keras.saving.register_keras_serializable(package="tests")
class Classifier(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.body = keras.Sequential(
            [
                keras.Input((6,)),
                dense("first", 8),
                keras.layers.BatchNormalization(name="inner"),
                keras.layers.LayerNormalization(name="norm"),
                dense("second", 5),
            ],
            name="body",
        )
        self.statistics = statistics()
        self.out = dense("out", 2, None)

    def call(self, inputs, training=None):
        x = self.body(inputs, training=training)
        return self.out(self.statistics(x, training=training))


def subclassed():
    model = Classifier(name="model")
    model(X)
    return model


def hand_built(dropout, **adapter):
    inputs = keras.Input((6,))
    x = dense("first", 8, dropout=dropout, **adapter)(inputs)
    norm = keras.layers.LayerNormalization(name="norm", trainable=False)
    x = dense("second", 5, **adapter)(norm(x))
    outputs = dense("out", 2, None)(statistics()(x))
    return kd.DyLoRAModel(inputs, outputs, name="model")


def of_tokens():
    """An embedding and a convolution have the adapters."""
    inputs = keras.Input((6,), dtype="int32")
    x = keras.layers.Embedding(9, 8, name="first")(inputs)
    x = keras.layers.LayerNormalization(name="norm")(x)
    x = keras.layers.Conv1D(5, 3, 2, activation="tanh", name="second")(x)
    x = dense("plain", 5)(keras.layers.GlobalMaxPooling1D(name="most")(x))
    outputs = dense("out", 2, None)(statistics()(x))
    return keras.Model(inputs, outputs, name="model")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of model: its layers in order, and those that hold others."""

    build: object
    chain: tuple
    within: dict
    trainable_layers: tuple = TRAINED
    x: np.ndarray = dataclasses.field(default_factory=lambda: X)


KINDS = {
    "functional": Kind(
        functional,
        ("first", "norm", "second", "plain", "statistics", "out"),
        {"head": TRAINED},
        ("head",),
    ),
    "subclassed": Kind(
        subclassed,
        ("first", "inner", "norm", "second", "statistics", "out"),
        {"body": ("first", "inner", "norm", "second")},
    ),
    "of tokens": Kind(
        of_tokens,
        ("first", "norm", "second", "most", "plain", "statistics", "out"),
        {},
        x=IDS,
    ),
    "hand-built": Kind(
        hand_built, ("first", "norm", "second", "statistics", "out"), {}
    ),
}


def layers_of(model):
    """All layers by name; the machine's models give each one of its own."""
    found = {}
    for layer in model.layers:
        found[layer.name] = layer
        if isinstance(layer, keras.Model):
            found |= layers_of(layer)
    return found


def weights_of(model):
    """All weights by the names of their layer and of themselves."""
    return {
        f"{layer.name}/{weight.name}": weight
        for layer in layers_of(model).values()
        if not isinstance(layer, keras.Model)
        for weight in layer.weights
    }


def read(model):
    return {k: backend.to_numpy(v) for k, v in weights_of(model).items()}


def set_weights(model, values):
    for key, weight in weights_of(model).items():
        if key in values:
            weight.assign(values[key])


def random_value(key, shape, seed):
    value = np.random.default_rng([seed, *key.encode()]).normal(size=shape)
    if key.endswith(("moving_variance", "gamma")):
        value = 1 + np.abs(value)
    return (0.5 * value).astype("float32")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What a model's adapters have in common."""

    rank: int
    min_rank: int
    alpha: float
    scaling: str

    def scale(self, b):
        return self.alpha / {"rank": b, "constant": self.rank}[self.scaling]

    def cut(self, rank):
        alpha = self.alpha
        if self.scaling == "constant":
            alpha *= rank / self.rank
        return Arguments(rank, min(self.min_rank, rank), alpha, self.scaling)


def outputs(kind, values, arguments, ranks, cuts):
    """What a model computes at the ranks of its layers."""
    x, cut = kind.x, cuts.get(key_of(ranks), {})
    for name in kind.chain:
        b, sides = ranks.get(name, 0), cut.get(name)
        x = layer_outputs(name, x, values, arguments, b, sides)
    return x


def key_of(ranks):
    return tuple(ranks[name] for name in ADAPTED)


def layer_outputs(name, x, values, arguments, b, sides):
    own = {k.split("/")[1]: v for k, v in values.items() if k.startswith(name)}
    kernel = own.get("kernel", own.get("embeddings"))
    if kernel is not None:
        update = 0.0
        if b:
            down, up = cut_at(b, sides, own["down"], own["up"])
            update = arguments.scale(b) * (down @ up)
        if "embeddings" in own:
            return (kernel + update)[x]
        if kernel.ndim == 3:  # windows of three, two apart
            x = np.stack(
                [x[:, i : i + 3] for i in range(0, x.shape[1] - 2, 2)], 1
            )
            x = x.reshape(*x.shape[:2], -1)
            kernel = kernel.reshape(-1, kernel.shape[-1])
        x = x.astype("float64")
        y = x @ kernel
        if "kernel_scale" in own:  # both sides are rounded to int8
            step = np.max(np.abs(x), axis=-1, keepdims=True) / 127
            y = np.round(x / step) @ kernel.astype("float64")
            y = y * step / own["kernel_scale"]
        y = y + x @ update if b else y
        y = y + own["bias"]
        return y if name == "out" else np.tanh(y)
    if name == "most":
        return x.max(axis=1)
    if name == "norm":
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    else:
        mean, variance = own["moving_mean"], own["moving_variance"]
    y = (x - mean) / np.sqrt(variance + 1e-3)
    return y * own.get("gamma", 1.0) + own.get("beta", 0.0)


def cut_at(b, sides, down, up):
    """The factors at a rank, of a tuned cut with the sides or of none."""
    if sides is None:
        return down[:, :b], up[:b]
    left, right = sides
    return down @ left, right @ up


def of_columns(cuts, columns):
    """Tuned cuts of adapters with more or fewer columns."""
    return {
        ranks: {
            name: (resized(left, columns), resized(right.T, columns).T)
            for name, (left, right) in cut.items()
        }
        for ranks, cut in cuts.items()
    }


def resized(left, columns):
    wide = np.zeros((columns, left.shape[1]), left.dtype)
    wide[: len(left)] = left[:columns]
    return wide


@dataclasses.dataclass
class Adapter:
    """What an adapter has of its own; the limit is its highest rank.

    A tuned cut has a pair of sides for each layer, and goes by its ranks.
    """

    values: dict
    ranks: dict
    limit: int | None = None
    cuts: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Saved:
    """A file, and what it must bring back where the signature is the same."""

    signature: tuple
    account: dict


class Machine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.folder = tempfile.mkdtemp()
        self.adapter_file = self.weights_file = None
        self.seed, self.seen, self.state = 0, None, None

    # The account.

    @property
    def own(self):
        """The weights that are trained or were, with their statistics."""
        trained = self.chosen | self.joined
        layers = {key.split("/")[0] for key in trained}
        if self.has_statistics:
            layers.add("statistics")
        return trained | {
            f"{layer}/{name}"
            for layer in layers & {"statistics", "inner"}
            for name in STATISTICS
        }

    @property
    def live(self):
        return self.adapters[self.active]

    @property
    def highest(self):
        return self.live.limit or self.arguments.rank

    @property
    def values(self):
        return {**self.base, **self.live.values}

    def can_train(self, key):
        layer, name = key.split("/")
        if layer in ADAPTED:
            return self.enabled and name in ("down", "up")
        return name not in (*STATISTICS, "kernel_scale") and not (
            name == "kernel" and f"{layer}/kernel_scale" in self.base
        )

    def computed(self, b=None, values=None, arguments=None):
        """The outputs at a rank, or at those of the live adapter."""
        ranks = self.live.ranks if b is None else b
        if isinstance(ranks, int):
            ranks = dict.fromkeys(ADAPTED, ranks)
        return outputs(
            self.kind,
            self.values if values is None else values,
            self.arguments if arguments is None else arguments,
            ranks,
            self.live.cuts,
        )

    def allocation(self, ranks):
        return kd.RankAllocation.of(
            self.model,
            {
                self.paths[name]: b
                for name, b in zip(ADAPTED, ranks, strict=True)
            },
        )

    @property
    def paths(self):
        layers = layers_of(self.model)
        return {
            name: layers[name].path.removeprefix(f"{self.model.name}/")
            for name in ADAPTED
        }

    @property
    def quantized(self):
        return any("kernel_scale" in key for key in self.base)

    def assert_outputs(self, found, wanted):
        # A value between two integers may go to either.
        atol = 0.1 if self.quantized else 1e-5
        scale = max(1.0, np.abs(wanted).max())
        np.testing.assert_allclose(found, wanted, rtol=0, atol=atol * scale)

    def check_ranks(self):
        """Is as the account says, and computes so at every rank."""
        self.is_as_the_account_says()
        for b in range(1, self.highest + 1):
            if set(self.live.ranks.values()) == {b}:
                continue
            with self.model.rank_scope(b):
                found = backend.to_numpy(self.model(self.kind.x))
            self.assert_outputs(found, self.computed(b))

    def attempt(self, operation, refused=None):
        """Runs an operation; returns whether it took place.

        It may raise only if the rule says so, which `refused=None` leaves
        open, or with the way out: to compile again, or to choose a weight that
        joined late at enabling.
        """
        try:
            operation()
        except (TypeError, ValueError) as error:
            stale = self.stale and "compile" in str(error)
            late = self.joined and "trainable" in str(error)
            if refused is False and not stale and not late:
                raise
            self.seen = None
            self.is_as_the_account_says()
            self.visit()
            return False
        assert not refused, "what must be refused took place"
        return True

    def visit(self):
        """Makes each adapter the active one, and goes back."""
        before = self.active
        for name in [*self.adapters, before]:
            change = functools.partial(self.model.set_adapter, name)
            if not self.attempt(change, False):
                return
            self.active = name
            self.check_values()

    # The beginning and the end.

    @initialize(
        kind=st.sampled_from(list(KINDS)),
        norm=st.booleans(),
        rank=st.sampled_from([3, 2]),
        low=st.booleans(),
        scaling=st.sampled_from(["rank", "constant"]),
        dropout=st.sampled_from([0.5, 0.0]),
    )
    def begin(self, kind, norm, rank, low, scaling, dropout):
        self.kind = KINDS[kind]
        self.by_hand = kind == "hand-built"
        arguments = Arguments(rank, 1 if low else rank, 3.0, scaling)
        if self.by_hand:
            self.model = hand_built(dropout, **dataclasses.asdict(arguments))
        else:
            self.model = self.kind.build()
            layers_of(self.model)["norm"].trainable = norm
        for key, weight in weights_of(self.model).items():
            weight.assign(random_value(key, weight.shape, 0))
        self.enabled, self.epoch = False, 0
        self.compile()
        self.base = read(self.model)
        if self.by_hand:
            self.account_of_enabled(arguments, dropout)
        else:
            self.enable(arguments, dropout)

    def enable(self, arguments, dropout):
        layers = layers_of(self.model)
        self.before = {
            "class": type(self.model),
            "classes": {name: type(x) for name, x in layers.items()},
            "flags": self.all_flags(),
        }
        kd.enable_dylora(
            self.model,
            verbose=0,
            target_layers=list(ADAPTED),
            trainable_layers=list(self.kind.trainable_layers),
            dropout=dropout,
            **dataclasses.asdict(arguments),
        )
        self.account_of_enabled(arguments, dropout)

    def all_flags(self):
        tree = [*layers_of(self.model).values(), self.model]
        flags = {x.name: x.trainable for x in tree}
        weights = weights_of(self.model)
        return flags | {k: v.trainable for k, v in weights.items()}

    def account_of_enabled(self, arguments, dropout):
        self.enabled, self.arguments = True, arguments
        self.dropout = {"first": dropout, "second": dropout}
        if self.by_hand:
            self.dropout["second"] = 0.0
        factors = {f"{x}/{name}" for x in ADAPTED for name in ("down", "up")}
        self.chosen = factors | {"out/kernel", "out/bias"}
        self.joined, self.has_statistics = set(), True
        # Flags say what a hand-built model trains until it is trained.
        self.open = self.by_hand
        weights = weights_of(self.model)
        self.flags = {key: key in self.chosen for key in weights}
        self.layer_flags = {"statistics": True, "inner": False}
        self.model_flag = True
        for key in factors:
            weights[key].assign(random_value(key, weights[key].shape, 1))
        values = read(self.model)
        self.adapters = {
            "default": Adapter(
                {key: values[key] for key in self.own},
                dict.fromkeys(ADAPTED, arguments.rank),
            )
        }
        self.active = "default"
        self.adapter_file = self.weights_file = None

    def compile(self):
        self.model.compile(keras.optimizers.Adam(1e-2), "mse", run_eagerly=True)
        self.stale = False

    def teardown(self):
        shutil.rmtree(self.folder)
        keras.utils.clear_session(free_memory=False)

    # What always holds.

    @invariant()
    def is_as_the_account_says(self):
        if not hasattr(self, "model"):
            return
        model, layers = self.model, layers_of(self.model)
        assert isinstance(model, kd.DyLoRAModel) == self.enabled
        if not self.enabled:
            return
        self.check_flags()
        self.check_values()
        config = model.dylora_config
        for name in dataclasses.asdict(self.arguments):
            wanted = getattr(self.arguments, name)
            found = [getattr(x, name) for x in (config, *model.dylora_layers)]
            assert found == [pytest.approx(wanted)] * 3, name
        dropout = {name: layers[name].dropout for name in ADAPTED}
        assert dropout == self.dropout
        assert model.adapter_names == list(self.adapters)
        assert model.active_adapter == self.active
        ranks = {name: layers[name].active_rank for name in ADAPTED}
        assert ranks == self.live.ranks
        rank = model.rank
        if isinstance(rank, int):
            rank = dict.fromkeys(self.paths.values(), rank)
        assert dict(rank) == {
            self.paths[name]: b for name, b in self.live.ranks.items()
        }
        # Most of the time is that of calls.
        state = self.computed()
        if self.seen is not model or not np.array_equal(state, self.state):
            self.assert_outputs(backend.to_numpy(model(self.kind.x)), state)
        self.seen, self.state = model, state

    def check_flags(self):
        model, weights = self.model, weights_of(self.model)
        assert model.trainable == self.model_flag
        ids = {id(v) for v in model.trainable_variables}
        found = {key for key, v in weights.items() if id(v) in ids}
        wanted = {key for key, on in self.flags.items() if on}
        assert found == (wanted if self.model_flag else set())
        assert len(ids) == len(found)

    def check_values(self):
        found, wanted = read(self.model), self.values
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            np.testing.assert_array_equal(found[key], value, err_msg=key)

    # Training.

    @precondition(lambda self: self.enabled and self.model_flag)
    @rule()
    def fit(self):
        if not any(self.flags.values()):
            return
        if self.stale:
            self.compile()
        if self.attempt(
            lambda: self.model.fit(self.kind.x, Y, epochs=STEPS, verbose=0),
            False,
        ):
            self.check_moved(read(self.model))
            self.live.limit, self.open = None, False
            factors = [x for x in self.flags if x.endswith(("down", "up"))]
            if any(self.flags[x] for x in factors):
                self.live.cuts = {}

    def check_moved(self, found):
        """Every trained weight has moved, and no other."""
        before, still, moved = self.values, set(), set()
        for key, on in self.flags.items():
            layer, name = key.split("/")
            if name in STATISTICS:
                on = self.layer_flags[layer]
            if on and name in ("down", "up"):
                # Of an allocation; what is above may be drawn or not.
                on = self.columns(layer)[0] or None
                if on is None and self.columns(layer).any():
                    continue
            (moved if on else still).add(key)
        wrong = {k for k in moved if np.array_equal(found[k], before[k])}
        assert not wrong, f"trained, but haven't moved: {sorted(wrong)}"
        wrong = {k for k in still if not np.array_equal(found[k], before[k])}
        assert not wrong, f"not trained, but have moved: {sorted(wrong)}"
        for key in self.own:
            self.live.values[key] = found[key]

    def columns(self, layer):
        """Which columns of an adapter aren't zero, and so stay."""
        down, up = (self.live.values[f"{layer}/{x}"] for x in ("down", "up"))
        return down.any(axis=0) | up.any(axis=1)

    @precondition(lambda self: self.enabled)
    @rule()
    def assign(self):
        """Other values, as a run may leave them."""
        self.seed += 1
        for key in self.chosen:
            layer, name = key.split("/")
            shape = self.live.values[key].shape
            value = random_value(key, shape, self.seed)
            if name in ("down", "up"):
                used = self.columns(layer)
                used[self.highest :] = False
                value = value * (used if name == "down" else used[:, None])
            self.live.values[key] = value
        set_weights(self.model, self.live.values)

    @precondition(lambda self: self.enabled)
    @rule(which=st.integers(0, 9), value=st.booleans())
    def toggle(self, which, value):
        names = [
            "model",
            "model",
            *self.kind.within,
            *self.kind.within,
            *self.kind.chain,
        ]
        name = names[which % len(names)]
        if name == "model":
            self.model.trainable = value
            self.account_of_model_flag(value)
        else:
            layer = layers_of(self.model)[name]
            if backend.NAME == "tensorflow" and layer.trainable == value:
                return  # TensorFlow skips what is so already
            layer.trainable = value
            leaves = self.kind.within.get(name, (name,))
            for key in self.flags:
                if key.split("/")[0] in leaves and self.can_train(key):
                    self.flags[key] = value
            for layer in self.layer_flags.keys() & set(leaves):
                self.layer_flags[layer] = value
        self.stale = True
        if self.model_flag:
            self.account_of_chosen()
        late = {key for key, on in self.flags.items() if on} - self.own
        values = self.values
        self.joined |= late
        for adapter in self.adapters.values():
            for key in self.own - adapter.values.keys():
                adapter.values[key] = values[key]

    def account_of_chosen(self):
        on = self.layer_flags["statistics"]
        if self.open:
            factors = {key for key in self.chosen if key.startswith(ADAPTED)}
            flagged = {key for key, value in self.flags.items() if value}
            self.chosen, self.has_statistics = factors | flagged, on
        self.has_statistics |= on

    def account_of_model_flag(self, value):
        """What was chosen comes back, and what joined may.

        A weight of a hand-built model that was frozen by the user may too, as
        Keras has it.
        """
        self.model_flag = value
        weights = weights_of(self.model)
        for key in self.flags:
            open_ = self.can_train(key) and (key in self.joined or self.by_hand)
            self.flags[key] = value and (
                key in self.chosen or (open_ and weights[key].trainable)
            )
        inner = layers_of(self.model).get("inner")
        self.layer_flags["statistics"] = value and self.has_statistics
        if inner is not None:
            self.layer_flags["inner"] = value and self.flags["inner/gamma"]

    # Ranks.

    @precondition(lambda self: self.enabled)
    @rule(b=st.integers(0, 4))
    def set_rank(self, b):
        refused = b > self.highest
        if self.attempt(lambda: self.model.set_rank(b), refused):
            self.live.ranks = dict.fromkeys(ADAPTED, b)

    @precondition(lambda self: self.enabled)
    @rule(ranks=st.tuples(st.integers(0, 4), st.integers(0, 4)))
    def set_allocation(self, ranks):
        ranks = [min(b, self.highest) for b in ranks]
        self.model.set_rank(self.allocation(ranks))
        self.live.ranks = dict(zip(ADAPTED, ranks, strict=True))

    @precondition(lambda self: self.enabled)
    @rule(ranks=st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(any))
    def tune(self, ranks):
        """A cut as `tune_ranks` leaves it, without the time that it takes."""
        ranks = tuple(min(b, self.highest) for b in ranks)
        if set(ranks) == {self.highest}:
            return
        most, paths = self.arguments.rank, self.paths
        self.seed += 1
        cut = {}
        for name, b in zip(ADAPTED, ranks, strict=True):
            left, right = (
                random_value(side, (most, b), self.seed)
                for side in ("left", "right")
            )
            for side in (left, right):
                side[self.highest :] = 0
            cut[name] = left, right.T
        adaptation = self.model._dylora
        left, right = (
            {paths[name]: sides[i] for name, sides in cut.items()}
            for i in range(2)
        )
        known = [
            x
            for x in adaptation.named.cuts
            if tuple(x.ranks[paths[name]] for name in ADAPTED) != ranks
        ]
        adaptation.set_tuned_cuts([*known, TunedCut(left, right)])
        self.live.cuts[ranks] = cut
        self.check_ranks()

    @precondition(lambda self: self.enabled)
    @rule(
        rank=st.integers(1, 3)
        | st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(any)
    )
    def truncate(self, rank):
        most = self.arguments.rank
        kept = rank if isinstance(rank, tuple) else (rank, rank)
        kept = {x: min(b, most) for x, b in zip(ADAPTED, kept, strict=True)}
        given, ranks = min(rank, most) if isinstance(rank, int) else None, kept
        if given is None:
            given = self.allocation(kept.values())
        else:
            ranks = {x: min(b, given) for x, b in self.live.ranks.items()}
        wanted = self.computed(kept)
        alone = len(self.adapters) == 1 and self.live.limit is None
        if not self.attempt(lambda: kd.truncate(self.model, given), not alone):
            return
        rank = max(kept.values())
        self.arguments = self.arguments.cut(rank)
        self.live.ranks = ranks
        cut, values = self.live.cuts.get(key_of(kept), {}), self.live.values
        for name in ADAPTED:
            keys, b = (f"{name}/down", f"{name}/up"), kept[name]
            down, up = cut_at(b, cut.get(name), *(values[k] for k in keys))
            found = read(self.model)
            rest = rank - b
            down = np.pad(down, ((0, 0), (0, rest)))
            up = np.pad(up, ((0, rest), (0, 0)))
            for key, value in zip(keys, (down, up), strict=True):
                np.testing.assert_allclose(found[key], value, atol=1e-6)
                values[key] = found[key]
        if set(kept.values()) != {most}:
            self.live.cuts = {}
        self.assert_outputs(self.computed(kept), wanted)
        self.check_ranks()

    @precondition(lambda self: self.enabled)
    @rule()
    def order_ranks(self):
        wanted = self.computed(self.highest)
        tuned = {
            ranks: self.computed(dict(zip(ADAPTED, ranks, strict=True)))
            for ranks in self.live.cuts
        }
        alone = len(self.adapters) == 1 and self.live.limit is None
        refused = self.arguments.scaling != "constant" and not alone
        if not self.attempt(lambda: kd.order_ranks(self.model), refused):
            return
        self.arguments = dataclasses.replace(self.arguments, scaling="constant")
        found = read(self.model)
        for name in ADAPTED:
            for key in (f"{name}/down", f"{name}/up"):
                self.live.values[key] = found[key]
        self.assert_outputs(self.computed(self.highest), wanted)
        self.live.cuts = self.cuts_of_model()
        assert self.live.cuts.keys() == tuned.keys()
        for ranks, before in tuned.items():
            each = dict(zip(ADAPTED, ranks, strict=True))
            self.assert_outputs(self.computed(each), before)
        self.check_ranks()

    def cuts_of_model(self):
        paths = self.paths
        return {
            tuple(cut.ranks[paths[name]] for name in ADAPTED): {
                name: cut.sides(paths[name]) for name in ADAPTED
            }
            for cut in self.model._dylora.named.cuts
        }

    @precondition(lambda self: self.enabled)
    @rule(b=st.integers(0, 4))
    def merge(self, b):
        b = min(b, self.highest)
        merged = kd.merge(self.model, b)
        assert not isinstance(merged, kd.DyLoRAModel)
        for name in ADAPTED:
            original = type(layers_of(self.model)[name]).original_class
            assert type(layers_of(merged)[name]) is original
        if not self.quantized:
            found = backend.to_numpy(merged(self.kind.x))
            self.assert_outputs(found, self.computed(b))

    # Adapters.

    @precondition(lambda self: self.enabled)
    @rule(name=st.sampled_from(["a", "b", "default"]))
    def add_adapter(self, name):
        if not self.attempt(
            lambda: self.model.add_adapter(name), name in self.adapters
        ):
            return
        found, fresh = read(self.model), dict(self.live.values)
        for layer in ADAPTED:
            for key in (f"{layer}/down", f"{layer}/up"):
                fresh[key] = found[key]
            assert not fresh[f"{layer}/up"].any()
        ranks = dict.fromkeys(ADAPTED, self.arguments.rank)
        self.adapters[name] = Adapter(fresh, ranks)
        self.active, self.open = name, False
        self.check_ranks()

    @precondition(lambda self: self.enabled)
    @rule(name=st.sampled_from(["a", "b", "default"]))
    def set_adapter(self, name):
        refused = name not in self.adapters
        if self.attempt(lambda: self.model.set_adapter(name), refused):
            self.active = name
            self.is_as_the_account_says()
            self.check_ranks()

    @precondition(lambda self: self.enabled and len(self.adapters) > 1)
    @rule()
    def visit_all(self):
        self.visit()

    @precondition(lambda self: self.enabled)
    @rule(name=st.sampled_from(["a", "b", "default"]))
    def delete_adapter(self, name):
        refused = name not in self.adapters or name == self.active
        if self.attempt(lambda: self.model.delete_adapter(name), refused):
            del self.adapters[name]

    # Files.

    @precondition(lambda self: self.enabled)
    @rule(
        rank=st.none()
        | st.integers(1, 4)
        | st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(any)
    )
    def save_adapter(self, rank):
        high = self.highest
        if isinstance(rank, tuple):
            ranks = [min(b, high) for b in rank]
            given, rank = self.allocation(ranks), max(ranks)
            each = dict(zip(ADAPTED, ranks, strict=True))
        else:
            rank = high if rank is None else min(rank, high)
            given, each = rank, dict.fromkeys(ADAPTED, rank)
        if not self.attempt(
            lambda: kd.save_adapter(
                self.model, f"{self.folder}/adapter", given
            ),
            False,
        ):
            return
        self.adapter_file = Saved(
            (self.epoch, self.arguments.scaling, self.own),
            {
                "rank": rank,
                "ranks": each,
                "uniform": len(set(each.values())) == 1,
                "alpha": self.arguments.cut(high).cut(rank).alpha,
                "values": copy.deepcopy(self.live.values),
                "cuts": self.live.cuts if set(each.values()) == {high} else {},
                "outputs": self.computed(each),
                "base": self.base,
            },
        )

    @precondition(lambda self: self.enabled and self.adapter_file)
    @rule(name=st.sampled_from(["a", "b", "default"]))
    def load_adapter(self, name):
        saved, arguments = self.adapter_file.account, self.arguments
        signature = self.epoch, arguments.scaling, self.own
        rank, new = saved["rank"], name not in self.adapters
        refused = (
            arguments.scaling != self.adapter_file.signature[1]
            or rank > arguments.rank
            or (not new and rank != arguments.rank)
            or (not new and name != "default")
            or (not new and saved["alpha"] != pytest.approx(arguments.alpha))
        )
        if not refused and signature != self.adapter_file.signature:
            return  # of another base, or of other weights
        if not self.attempt(
            lambda: kd.load_adapter(
                self.model, f"{self.folder}/adapter", name=name
            ),
            refused,
        ):
            return
        ranks = saved["ranks"]
        if not new and saved["uniform"]:
            ranks = self.adapters[name].ranks
        values, found = dict(saved["values"]), read(self.model)
        for layer in ADAPTED:
            for key in (f"{layer}/down", f"{layer}/up"):
                values[key] = found[key]
        limit = rank if rank < arguments.rank else None
        cuts = of_columns(saved["cuts"], arguments.rank)
        self.adapters[name] = Adapter(values, dict(ranks), limit, cuts)
        self.active = name
        self.open = self.open and not new
        self.assert_outputs(self.computed(saved["ranks"]), saved["outputs"])
        self.check_ranks()

    @precondition(lambda self: self.adapter_file and not self.by_hand)
    @rule()
    def load_into_a_plain_model(self):
        if self.quantized:
            return
        saved, model = self.adapter_file.account, self.kind.build()
        set_weights(model, saved["base"])
        kd.load_adapter(model, f"{self.folder}/adapter")
        found = backend.to_numpy(model(self.kind.x))
        self.assert_outputs(found, saved["outputs"])

    @precondition(lambda self: self.enabled)
    @rule()
    def save_and_load(self):
        path = f"{self.folder}/model.keras"
        # Keras couldn't load it either.
        refused = self.quantized and self.kind.build is subclassed
        if not self.attempt(lambda: self.model.save(path), refused):
            return
        self.model, self.open = keras.saving.load_model(path), False
        if self.kind.build is subclassed:
            # Keras keeps no flag of a layer that a class makes itself.
            for name in self.before["flags"]:
                if name.split("/")[0] == "norm":
                    self.before["flags"][name] = True
        self.check_ranks()
        self.visit()

    @precondition(lambda self: self.enabled)
    @rule()
    def save_weights(self):
        path = f"{self.folder}/model.weights.h5"
        if self.attempt(lambda: self.model.save_weights(path), False):
            self.weights_file = Saved(
                (self.epoch, self.arguments, self.own),
                copy.deepcopy((self.adapters, self.active)),
            )

    @precondition(lambda self: self.enabled and self.weights_file)
    @rule()
    def load_weights(self):
        saved = self.weights_file
        if saved.signature != (self.epoch, self.arguments, self.own):
            return
        adapters, active = copy.deepcopy(saved.account)
        same = list(adapters) == list(self.adapters)
        path = f"{self.folder}/model.weights.h5"
        if not self.attempt(
            lambda: self.model.load_weights(path), False if same else None
        ):
            return
        if self.model.adapter_names == list(adapters):
            self.adapters, self.active = adapters, active
        else:  # the one of the file may take the place of the live one
            assert len(adapters) == 1
            self.adapters[self.active] = adapters[active]
        self.check_ranks()
        self.visit()

    # The base.

    @precondition(lambda self: self.enabled and not self.quantized)
    @rule()
    def quantize(self):
        if not self.attempt(lambda: self.model.quantize("int8"), False):
            return
        found = read(self.model)
        self.base = {k: v for k, v in self.base.items() if k in self.own}
        for adapter in self.adapters.values():
            for key in adapter.values.keys() - self.own:
                del adapter.values[key]  # frozen before it was ever trained
        for key, value in found.items():
            if key not in self.own:
                self.base[key] = value
                self.flags.setdefault(key, False)
        quantized = {k.split("/")[0] for k in found if "kernel_scale" in k}
        layers = layers_of(self.model)
        linear = {x for x in ADAPTED if isinstance(layers[x], kd.DyLoRADense)}
        assert quantized >= linear
        in_full = {key.split("/")[0] for key in self.own} - set(ADAPTED)
        assert quantized <= {*ADAPTED, "plain", "out"} - in_full
        self.epoch += 1

    @precondition(lambda self: self.enabled)
    @rule()
    def disable(self):
        if not self.attempt(
            lambda: kd.disable_dylora(self.model), self.by_hand
        ):
            return
        values, layers = self.values, layers_of(self.model)
        self.base = {
            k: v for k, v in values.items() if not k.endswith(("down", "up"))
        }
        self.enabled, self.epoch = False, self.epoch + 1
        found = read(self.model)
        assert found.keys() == self.base.keys()
        for key, value in self.base.items():
            np.testing.assert_array_equal(found[key], value, err_msg=key)
        assert type(self.model) is self.before["class"]
        classes = {name: type(x) for name, x in layers.items()}
        assert classes == self.before["classes"]
        flags = self.all_flags()
        for name, flag in self.before["flags"].items():
            if name in flags and self.could_be(name):
                assert flags[name] == flag, name

    def could_be(self, name):
        """Whether a quantized kernel isn't meant, which can't be trained."""
        layer = name.split("/")[0]
        return (
            not name.endswith("/kernel")
            or f"{layer}/kernel_scale" not in self.base
        )

    @precondition(lambda self: not self.enabled)
    @rule(
        rank=st.sampled_from([3, 2]),
        low=st.booleans(),
        scaling=st.sampled_from(["rank", "constant"]),
        dropout=st.sampled_from([0.5, 0.0]),
    )
    def enable_again(self, rank, low, scaling, dropout):
        arguments = Arguments(rank, 1 if low else rank, 3.0, scaling)
        self.enable(arguments, dropout)

    @precondition(lambda self: self.enabled)
    @rule(
        wrong=st.sampled_from(
            [
                lambda model: model.set_rank(-1),
                lambda model: model.set_rank("2"),
                lambda model: kd.truncate(model, 0),
                lambda model: kd.truncate(model, 9),
                lambda model: model.add_adapter(""),
                lambda model: model.add_adapter(3),
                lambda model: model.set_adapter("unknown"),
                lambda model: model.quantize("int2"),
                lambda model: kd.enable_dylora(model),
                lambda model: kd.load_adapter(model, "/nowhere"),
                lambda model: kd.merge(model, 9),
                lambda model: model.save("model.h5"),
            ]
        )
    )
    def refuse(self, wrong):
        self.attempt(lambda: wrong(self.model), True)


def run(sequences):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=sequences,
                stateful_step_count=10,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )


def test_operations_in_any_order():
    run(100)


@pytest.mark.long
@pytest.mark.skipif(backend.NAME != "jax", reason="one backend is enough")
def test_operations_in_any_order_at_length():
    run(2000)
