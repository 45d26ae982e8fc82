"""SavedModels: one for each rank, or one for all ranks.

Needs the TensorFlow backend. Every parameter is tracked, and so stored, once.
"""

import dataclasses

import keras
import numpy as np
import tensorflow as tf

from keras_dylora.adaptation import as_original
from keras_dylora.export import stored_variables
from keras_dylora.export.text import Preprocessing
from keras_dylora.model import adaptation_of


def write(model, folder, plan):
    """Writes the SavedModels of a plan, as `writers.write`."""
    writer = _write_shared if plan.layout == "shared" else _write_merged
    yield from writer(model, folder, plan)


@dataclasses.dataclass
class _Endpoint:
    """What a signature computes, before its rank is chosen.

    Args:
        name: str. Name of the signature that has no fixed rank.
        rank_prefix: str or `None`. What comes before the name of a rank in
            those of the ones that have.
        run: callable from a dict of tensors to a dict of tensors.
        specs: dict of name to `tf.TensorSpec`. What `run` takes.
        text: `Preprocessing` or `None`. What makes it from strings.
    """

    name: str
    rank_prefix: str | None
    run: object
    specs: dict
    text: Preprocessing | None = None

    @property
    def signature(self):
        """Specs of the tensors that the signature takes."""
        if self.text is None:
            return self.specs
        return {"text": tf.TensorSpec((None,), tf.string, name="text")}

    def prepare(self, tensors):
        """The tensors of `run` from those of the signature."""
        if self.text is None:
            return tensors
        made = self.text(tensors["text"])
        return {k: tf.cast(made[k], x.dtype) for k, x in self.specs.items()}


def _endpoints(model, plan):
    specs = {
        spec.name: tf.TensorSpec(spec.shape, spec.dtype, name=spec.name)
        for spec in plan.inputs.specs
    }

    def forward(tensors):
        outputs = model(plan.inputs.pack(tensors), training=False)
        if isinstance(outputs, dict):
            return outputs
        flat = keras.tree.flatten(outputs)
        return {f"output_{i}": x for i, x in enumerate(flat)}

    def generate(tensors):
        prompt = {k: tensors[k] for k in ("token_ids", "padding_mask")}
        return model.generate_step(prompt, [tensors["end_token_id"]])

    endpoints = [_Endpoint("serve", "", forward, specs)]
    if plan.text:
        text = Preprocessing(model)
        endpoints.append(_Endpoint("serve_text", None, forward, specs, text))
    if plan.generate:
        end = tf.TensorSpec((), tf.int32, name="end_token_id")
        endpoints.append(
            _Endpoint(
                "generate",
                "generate_",
                generate,
                {**specs, "end_token_id": end},
            )
        )
    return endpoints


def _write_shared(model, folder, plan):
    adaptation = adaptation_of(model)
    config = adaptation.config
    stored = stored_variables.create(model.weights, plan.dtype)
    endpoints = _endpoints(model, plan)
    artifact = _Artifact([model, *(x.text.layer for x in endpoints if x.text)])
    rank_spec = tf.TensorSpec(None, tf.int32, name="rank")

    gates = _Gates(plan, config, len(adaptation.layers))

    def traced(endpoint, *batch):
        return _traced(endpoint, adaptation, stored, gates, batch)

    rows = {x.run: traced(x, None) for x in endpoints}
    for endpoint in endpoints:
        artifact.add(
            endpoint.name,
            _at_any_rank(endpoint, rows[endpoint.run], gates),
            {**endpoint.signature, "rank": rank_spec},
        )
        if endpoint.rank_prefix is None:
            continue
        run = traced(endpoint)
        for served in plan.ranks:
            artifact.add(
                f"{endpoint.rank_prefix}{served.name}",
                _at_rank(run, gates.of(served)),
                endpoint.signature,
            )
            if endpoint.name == "serve":
                yield
    artifact.save(folder, default=plan.ranks[-1].name)
    yield


def _traced(endpoint, adaptation, stored, gates, batch):
    """What an endpoint runs, as a graph that several signatures call."""

    def call(tensors, gate):
        if gates.by_layer:
            gate = {p: gate[..., i, :] for i, p in enumerate(adaptation.layers)}
        with stored_variables.reading(stored), adaptation.overridden(gate):
            return endpoint.run(tensors)

    spec = tf.TensorSpec((*batch, *gates.shape), tf.float32)
    signature = [endpoint.specs, spec]
    return tf.function(call, input_signature=signature, autograph=False)


def _at_any_rank(endpoint, run, gates):
    first = next(iter(endpoint.signature))

    def serve(rank, **tensors):
        batch = tf.shape(tensors[first])[0]
        gate = gates.rows(rank, batch)
        return run(endpoint.prepare(tensors), gate)

    return serve


def _at_rank(run, gate):
    def serve(**tensors):
        return run(tensors, tf.constant(gate))

    return serve


class _Gates:
    """The gates of a plan's ranks: one for all layers, or one for each."""

    def __init__(self, plan, config, layers):
        self.plan = plan
        self.by_layer = plan.by_layer
        self.shape = (config.rank,)
        if self.by_layer:
            self.shape = layers, config.rank
        self.own = [x.value for x in plan.ranks if x.by_layer]
        highest = max([plan.highest, *self.own])
        self.table = np.zeros((highest + 1, *self.shape), "float32")
        for b in range(1, plan.highest + 1):
            self.table[b] = config.scale.gate(b)
        for served in plan.ranks:
            self.table[served.value] = config.scale.gate(served.rank)

    def of(self, served):
        """The gate of a rank, in NumPy."""
        return self.table[served.value]

    def rows(self, rank, batch):
        """One for each example, from a scalar rank or one per example."""
        rank, high = tf.reshape(rank, [-1]), self.plan.highest
        size = tf.size(rank)
        known, rule = (rank >= 1) & (rank <= high), f"between 1 and {high}"
        if self.own:
            known |= tf.reduce_any(rank[:, None] == self.own, axis=-1)
            rule += f" or one of {self.own}"
        checks = [
            tf.debugging.Assert(
                tf.reduce_all(known),
                [f"`rank` must be {rule}. Received:", rank],
            ),
            tf.debugging.Assert(
                (size == 1) | (size == batch),
                ["`rank` must be a scalar or one for each example. Received:",
                 size, "ranks for a batch of", batch],
            ),
        ]  # fmt: skip
        with tf.control_dependencies(checks):
            rank = tf.broadcast_to(rank, [batch])
        return tf.gather(tf.constant(self.table), rank)


def _write_merged(model, folder, plan):
    layers = adaptation_of(model).layers.values()
    adapters = {id(v) for x in layers for v in (x.down, x.up)}
    base = [w for w in model.weights if id(w) not in adapters]
    kernels = [layer.kernel for layer in layers]
    stored = stored_variables.create(base, plan.dtype, copies=kernels)
    endpoints = _endpoints(model, plan)
    artifact = _Artifact([model, *(x.text.layer for x in endpoints if x.text)])
    for endpoint in endpoints:
        function = _without_rank(endpoint, layers, stored)
        artifact.add(endpoint.name, function, endpoint.signature)
    for served in plan.ranks:
        ranks = served.ranks(layers).values()
        for layer, kernel, b in zip(layers, kernels, ranks, strict=True):
            _, target = stored[id(kernel)]
            merged = tf.cast(kernel.value, tf.float32) + layer.delta_kernel(b)
            target.assign(tf.cast(merged, target.dtype))
        artifact.save(folder / served.name, default="serve")
        yield


def _without_rank(endpoint, layers, stored):
    def serve(**tensors):
        with stored_variables.reading(stored), as_original(layers):
            return endpoint.run(endpoint.prepare(tensors))

    return serve


class _Artifact:
    """Signatures, traced once, and the variables and tables that they read.

    Args:
        sources: list of objects whose lookup tables may be read.
    """

    def __init__(self, sources):
        self.sources = sources
        self.functions = {}

    def add(self, name, function, specs):
        function = tf.function(function, autograph=False)
        self.functions[name] = function.get_concrete_function(**specs)

    def save(self, path, default):
        # A plain module: a Keras model tracks each variable under two nodes,
        # which `tf.saved_model.save` writes as two copies.
        module = tf.Module()
        module.parameters, module.tables = self._captured()
        for name, function in self.functions.items():
            setattr(module, name, function)
        signatures = {
            **self.functions,
            "serving_default": self.functions[default],
        }
        try:
            tf.saved_model.save(module, str(path), signatures=signatures)
        except tf.errors.OpError as error:  # a full disk, for one
            raise OSError(
                f"TensorFlow must be able to write the artifact. "
                f"Received: {error.message}"
            ) from error

    def _captured(self):
        """Variables and tables that the functions read, and no others.

        The words in the tables of the model's own tokenizer, for one, are
        nobody's business.
        """
        functions = self.functions.values()
        variables = {id(v): v for f in functions for v in f.graph.variables}
        handles = {id(x) for f in functions for x in f.captured_inputs}
        tables = {
            id(x): x
            for source in self.sources
            for x in tf.train.TrackableView(source).descendants()
            if isinstance(x, tf.saved_model.experimental.TrackableResource)
            and id(x.resource_handle) in handles
        }
        return list(variables.values()), list(tables.values())
