"""SavedModels: one for each rank, or one for all ranks.

They need the TensorFlow backend. Every parameter is tracked, and so stored,
only once.
"""

import dataclasses

import keras
import tensorflow as tf

from keras_dylora.export.tensorflow import stored_variables
from keras_dylora.export.tensorflow.gates import Gates
from keras_dylora.export.tensorflow.stacking import stack
from keras_dylora.export.tensorflow.text import Preprocessing
from keras_dylora.live.model import adaptation_of
from keras_dylora.live.plain import as_original

DEFAULT_SIGNATURE = "serving_default"


def write(model, folder, plan):
    """Writes the SavedModels of a plan, like `writers.write`."""
    writer = _write_shared if plan.layout == "shared" else _write_merged
    yield from writer(model, folder, plan)


@dataclasses.dataclass
class _Endpoint:
    """The function of a signature, before its rank is chosen.

    Args:
        name: str. The name of the signature without a fixed rank.
        rank_prefix: str or `None`. The text before the name of a rank in the
            names of the signatures with a fixed rank.
        run: callable from a dict of tensors to a dict of tensors.
        specs: dict of name to `tf.TensorSpec`. The inputs of `run`.
        text: `Preprocessing` or `None`. It makes these inputs from strings.
    """

    name: str
    rank_prefix: str | None
    run: object
    specs: dict
    text: Preprocessing | None = None

    @property
    def signature(self):
        """The specs of the tensors that the signature takes."""
        if self.text is None:
            return self.specs
        return {"text": tf.TensorSpec((None,), tf.string, name="text")}

    def prepare(self, tensors):
        """The inputs of `run`, from those of the signature."""
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
    named = adaptation.named
    names = [x.name for x in plan.adapters] or [named.active]
    cuts = [named.cuts_of(name) for name in names]
    gates = Gates(plan, adaptation.config.scale, adaptation.layers, cuts)
    heads = stack(model, plan.adapters, plan.dtype) if plan.adapters else None
    stored = stored_variables.create(model.weights, plan.dtype)
    endpoints = _endpoints(model, plan)
    artifact = _Artifact([model, *(x.text.layer for x in endpoints if x.text)])
    choice = {}  # the inputs of a signature besides those of the model
    if plan.adapters:
        choice["adapter"] = tf.TensorSpec(None, tf.string, name="adapter")
    rank_spec = tf.TensorSpec(None, tf.int32, name="rank")

    def traced(endpoint, *batch):
        return _traced(endpoint, adaptation, stored, gates, heads, batch)

    rows = {x.run: traced(x, None) for x in endpoints}

    def chosen(endpoint, rank_of=None):
        return _at_any_rank(endpoint, rows[endpoint.run], gates, rank_of)

    for endpoint in endpoints:
        artifact.add(
            endpoint.name,
            chosen(endpoint),
            {**endpoint.signature, **choice, "rank": rank_spec},
        )
        if endpoint.rank_prefix is None:
            continue
        alone = None if plan.adapters else traced(endpoint)
        for served in plan.ranks:
            if plan.adapters:
                function = chosen(endpoint, lambda _, b=served.value: b)
            else:
                function = _at_rank(alone, gates.of(served))
            artifact.add(
                f"{endpoint.rank_prefix}{served.name}",
                function,
                {**endpoint.signature, **choice},
            )
            if endpoint.name == "serve":
                yield
    default = plan.ranks[-1].name
    if plan.adapters:
        default, serve = DEFAULT_SIGNATURE, endpoints[0]
        artifact.add(
            default,
            chosen(serve, gates.highest),
            {**serve.signature, **choice},
        )
    artifact.save(folder, default)
    yield


def _traced(endpoint, adaptation, stored, gates, heads, batch):
    """The function of an endpoint, as a graph that several signatures call."""

    def call(tensors, gate, index=None):
        if gates.by_layer:
            gate = gates.by_path(gate, batched=bool(batch))
        with stored_variables.reading(stored), adaptation.overridden(gate):
            if index is None:
                return endpoint.run(tensors)
            with heads.of(index, stored):
                return endpoint.run(tensors)

    spec = tf.TensorSpec((*batch, *gates.shape), tf.float32)
    signature = [endpoint.specs, spec]
    if heads is not None:
        signature.append(tf.TensorSpec(batch, tf.int32))
    return tf.function(call, input_signature=signature, autograph=False)


def _at_any_rank(endpoint, run, gates, rank_of):
    """The endpoint at the adapter and the rank that are inputs.

    If given, `rank_of` is a function of the indices of the adapters to ranks.
    """
    first = next(iter(endpoint.signature))

    def serve(**tensors):
        adapter = tensors.pop("adapter") if gates.names else None
        rank = tensors.pop("rank") if rank_of is None else None
        batch = tf.shape(tensors[first])[0]
        index = gates.index(adapter, batch)
        if rank_of is not None:
            rank = rank_of(index)
        chosen = [gates.rows(rank, index, batch)]
        if adapter is not None:
            chosen.append(index)
        return run(endpoint.prepare(tensors), *chosen)

    return serve


def _at_rank(run, gate):
    def serve(**tensors):
        return run(tensors, tf.constant(gate))

    return serve


def _write_merged(model, folder, plan):
    adaptation = adaptation_of(model)
    layers = adaptation.layers.values()
    adapters = {id(v) for x in layers for v in (x.down, x.up)}
    base = [w for w in model.weights if id(w) not in adapters]
    kernels = [layer.base_kernel for layer in layers]
    stored = stored_variables.create(base, plan.dtype, copies=kernels)
    endpoints = _endpoints(model, plan)
    artifact = _Artifact([model, *(x.text.layer for x in endpoints if x.text)])
    for endpoint in endpoints:
        function = _without_rank(endpoint, layers, stored)
        artifact.add(endpoint.name, function, endpoint.signature)
    for served in plan.ranks:
        factors = adaptation.factors(served.ranks(adaptation.layers)).values()
        for layer, kernel, x in zip(layers, kernels, factors, strict=True):
            _, target = stored[id(kernel)]
            merged = tf.cast(kernel.value, tf.float32) + layer.kernel_update(x)
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
        # A plain module, as a Keras model tracks each variable under two nodes,
        # and `tf.saved_model.save` would write two copies.
        module = tf.Module()
        module.parameters, module.tables = self._captured()
        for name, function in self.functions.items():
            setattr(module, name, function)
        signatures = {
            **self.functions,
            DEFAULT_SIGNATURE: self.functions[default],
        }
        try:
            tf.saved_model.save(module, str(path), signatures=signatures)
        except tf.errors.OpError as error:  # such as a full disk
            raise OSError(
                f"TensorFlow must be able to write the artifact. "
                f"Received: {error.message}"
            ) from error

    def _captured(self):
        """The variables and tables that the functions read, and no others.

        For example, the words in the tables of the model's own tokenizer must
        stay private.
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
