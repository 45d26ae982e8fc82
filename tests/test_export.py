"""export_ranks: artifacts that are loaded in a process without Keras."""

import importlib.util
import json
import pathlib
import resource
import signal
import subprocess
import sys
import time
import types

import keras
import keras_hub
import numpy as np
import psutil
import pytest

import keras_dylora as kd
from keras_dylora.export import export_ranks
from keras_dylora.export.by_tensorflow import custom_modules
from keras_dylora.export.plan import Inputs, Plan, Served
from keras_dylora.export.verify import verify
from keras_dylora.files import sha256
from tests import backend
from tests.models import (
    VOCABULARY,
    mlp,
    randomize,
    randomize_adapters,
    roberta_classifier,
)
from tests.text import text_classifier

RANKS = (1, 2, 3, 4)
SHAPES = ((1, 5), (4, 17), (7, 48))
LENGTH = 48
TEXTS = [
    "",
    "the plot, a GOOD film 🙂👩‍🚀!",
    "good film " * 1000,
    "naïve café\n“never”",
]

# Runs the calls of a folder as a server would, and counts what is stored.
SERVER = """
import json, os, pathlib, sys
import numpy as np
folder = pathlib.Path(sys.argv[1])
request = json.loads((folder / "calls.json").read_text())
sys.modules["keras_dylora"] = sys.modules["keras_hub"] = None
if request["text"]:
    import tensorflow_text  # imports Keras, unlike TensorFlow itself
else:
    sys.modules["keras"] = None
import tensorflow as tf
loaded, stored = {}, {}
for i, (path, signature) in enumerate(request["calls"]):
    if path not in loaded:
        loaded[path] = tf.saved_model.load(path)
        found = tf.train.list_variables(f"{path}/variables/variables")
        stored[path] = sum(
            int(np.prod(shape)) for name, shape in found if name[0] != "_"
        )
    with np.load(folder / f"in{i}.npz") as inputs:
        inputs = {k: tf.constant(v) for k, v in inputs.items()}
    try:
        outputs = loaded[path].signatures[signature](**inputs)
    except tf.errors.InvalidArgumentError as error:
        outputs = {"error": np.array(error.message)}
    np.savez(folder / f"out{i}.npz", **outputs)
(folder / "stored.json").write_text(json.dumps(stored))
"""


def serve(folder, calls, text=False):
    """Outputs of `(artifact, signature, inputs)`, and stored parameters."""
    folder.mkdir()
    request = [[str(path), signature] for path, signature, _ in calls]
    (folder / "calls.json").write_text(
        json.dumps({"text": text, "calls": request})
    )
    for i, (_, _, inputs) in enumerate(calls):
        np.savez(folder / f"in{i}.npz", **inputs)
    backend.run_python(SERVER, folder)
    outputs = [dict(np.load(folder / f"out{i}.npz")) for i in range(len(calls))]
    return outputs, json.loads((folder / "stored.json").read_text())


def batch(size, length):
    rng = np.random.default_rng(size)
    lengths = rng.integers(2, length + 1, size)
    mask = np.arange(length) < lengths[:, None]
    ids = rng.integers(1, VOCABULARY, (size, length)) * mask
    return {
        "token_ids": ids.astype("int32"),
        "padding_mask": mask.astype("int32"),
    }


def enabled(model):
    kd.enable_dylora(randomize(model), rank=4, alpha=8)
    return randomize_adapters(model)


def roberta():
    return enabled(roberta_classifier(max_sequence_length=LENGTH))


def gpt2():
    model = keras_hub.models.GPT2CausalLM(
        keras_hub.models.GPT2Backbone(
            vocabulary_size=VOCABULARY,
            num_layers=2,
            num_heads=2,
            hidden_dim=16,
            intermediate_dim=24,
            max_sequence_length=LENGTH,
        )
    )
    enabled(model).compile(sampler="greedy")
    return model


def live(model, rank, inputs):
    with model.rank_scope(rank):
        return backend.to_numpy(model(inputs, training=False))


def prompts():
    inputs = batch(3, 12)
    mask = np.arange(12) < np.array([[3], [5], [4]])
    return {
        "token_ids": inputs["token_ids"] * mask,
        "padding_mask": mask.astype("int32"),
    }


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(roberta, marks=pytest.mark.long),
        pytest.param(gpt2, marks=pytest.mark.long),
    ],
    ids=["roberta", "gpt2"],
)
def exported(request, tmp_path_factory):
    """A model, both its layouts, and all that a server made of them."""
    folder = tmp_path_factory.mktemp("exported")
    model = request.param()
    is_lm = request.param is gpt2
    for layout in ("shared", "merged"):
        export_ranks(
            model,
            folder / layout,
            layout=layout,
            verify=False,
            verbose=False,
            generate_signature=is_lm,
        )
    shared, merged = folder / "shared", folder / "merged"
    calls = {}
    for shape in SHAPES:
        inputs = batch(*shape)
        for b in RANKS:
            calls["shared", shape, b] = shared, f"rank_{b}", inputs
            calls["merged", shape, b] = merged / f"rank_{b}", "serve", inputs
    rows = np.array([4, 1, 3, 2, 4, 1, 2], "int32")
    inputs = batch(*SHAPES[-1])
    calls["mixed"] = shared, "serve", {**inputs, "rank": rows}
    calls["scalar"] = shared, "serve", {**inputs, "rank": np.int32(3)}
    calls["default"] = shared, "serving_default", inputs
    for wrong in ([0], [5], [1, 2]):
        rank = np.array(wrong, "int32")
        calls[f"wrong {wrong}"] = shared, "serve", {**inputs, "rank": rank}
    if is_lm:
        for b in RANKS:
            for end in (-1, 7):
                inputs = {**prompts(), "end_token_id": np.int32(end)}
                key = "generate", end, b
                calls["shared", *key] = shared, f"generate_rank_{b}", inputs
                calls["merged", *key] = merged / f"rank_{b}", "generate", inputs
        inputs = {**prompts(), "end_token_id": np.int32(-1)}
        rank = np.array([4, 1, 2], "int32")
        calls["generate"] = shared, "generate", {**inputs, "rank": rank}
    outputs, stored = serve(folder / "server", list(calls.values()))
    return types.SimpleNamespace(
        model=model,
        folder=folder,
        outputs=dict(zip(calls, outputs, strict=True)),
        stored=stored,
    )


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("layout", ["shared", "merged"])
def test_artifact_gives_what_the_live_model_gives(exported, layout, rank):
    for shape in SHAPES:
        expected = live(exported.model, rank, batch(*shape))
        found = exported.outputs[layout, shape, rank]["output_0"]
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    other = live(exported.model, rank % 4 + 1, batch(*shape))
    assert np.abs(found - other).max() > 1e-3


def test_one_batch_may_mix_ranks(exported):
    single = {
        b: exported.outputs["shared", SHAPES[-1], b]["output_0"] for b in RANKS
    }
    mixed = exported.outputs["mixed"]["output_0"]
    for i, b in enumerate([4, 1, 3, 2, 4, 1, 2]):
        np.testing.assert_allclose(mixed[i], single[b][i], atol=1e-5, rtol=0)
    scalar = exported.outputs["scalar"]["output_0"]
    np.testing.assert_allclose(scalar, single[3], atol=1e-5, rtol=0)
    default = exported.outputs["default"]["output_0"]
    np.testing.assert_array_equal(default, single[4])


@pytest.mark.parametrize(
    "rank, message",
    [
        ([0], "`rank` must be between 1 and 4"),
        ([5], "`rank` must be between 1 and 4"),
        ([1, 2], "`rank` must be a scalar or one for each example"),
    ],
    ids=["zero", "above", "too_few"],
)
def test_server_is_told_of_a_wrong_rank(exported, rank, message):
    assert message in str(exported.outputs[f"wrong {rank}"]["error"])


def test_each_parameter_is_stored_once(exported):
    adapters = sum(
        layer.down.shape[0] * 4 + 4 * layer.up.shape[1]
        for layer in exported.model.dylora_layers
    )
    total = exported.model.count_params()
    for path, stored in exported.stored.items():
        merged = path.endswith(tuple(f"rank_{b}" for b in RANKS))
        assert stored == total - (adapters if merged else 0)


def test_live_model_is_left_as_it_was(exported):
    model = exported.model
    assert model.rank == 4
    assert all(isinstance(x, kd.DyLoRAEinsumDense) for x in model.dylora_layers)
    assert all(x._gate.override is None for x in model.dylora_layers)


@pytest.mark.long
@pytest.mark.parametrize("exported", [gpt2], indirect=True, ids=["gpt2"])
@pytest.mark.parametrize("end", [-1, 7], ids=["no_end", "end"])
@pytest.mark.parametrize("layout", ["shared", "merged"])
def test_generate_signature_equals_generate(exported, layout, end):
    stop = None if end == -1 else [end]
    for b in (1, 4):
        exported.model.set_rank(b)
        expected = exported.model.generate(prompts(), stop_token_ids=stop)
        found = exported.outputs[layout, "generate", end, b]
        for key, value in expected.items():
            np.testing.assert_array_equal(found[key], value)
    exported.model.set_rank(4)


@pytest.mark.long
@pytest.mark.parametrize("exported", [gpt2], indirect=True, ids=["gpt2"])
def test_generate_may_mix_ranks(exported):
    mixed = exported.outputs["generate"]["token_ids"]
    for i, b in enumerate([4, 1, 2]):
        single = exported.outputs["shared", "generate", -1, b]["token_ids"]
        np.testing.assert_array_equal(mixed[i], single[i])


@pytest.mark.long
def test_beam_search_may_mix_ranks(tmp_path):
    model = gpt2()
    model.compile(sampler=keras_hub.samplers.BeamSampler(num_beams=3))
    path = tmp_path / "artifact"
    export_ranks(
        model,
        path,
        ranks=[1, 2],
        generate_signature=True,
        verify=False,
        verbose=False,
    )
    inputs = {**prompts(), "end_token_id": np.int32(-1)}
    rows = np.array([2, 1, 2], "int32")
    calls = [
        (path, "generate", {**inputs, "rank": rows}),
        (path, "generate", {**inputs, "rank": np.int32(2)}),
        (path, "generate_rank_2", inputs),
    ]
    (mixed, scalar, alone), _ = serve(tmp_path / "server", calls)
    np.testing.assert_array_equal(scalar["token_ids"], alone["token_ids"])
    for i, b in enumerate(rows):
        model.set_rank(b)
        expected = model.generate(prompts(), stop_token_ids=None)["token_ids"]
        np.testing.assert_array_equal(mixed["token_ids"][i], expected[i])


def roberta_text():
    characters = [chr(i) for i in (*range(33, 127), 161, 288)]
    tokens = ["<s>", "<pad>", "</s>", "<mask>", *characters, "Ġg", "oo", "ood"]
    tokenizer = keras_hub.models.RobertaTokenizer(
        {token: i for i, token in enumerate(tokens)},
        ["Ġ g", "o o", "oo d"],
    )
    preprocessor = keras_hub.models.RobertaTextClassifierPreprocessor(
        tokenizer, sequence_length=12
    )
    return roberta_classifier(
        preprocessor=preprocessor, vocabulary_size=len(tokens)
    )


@pytest.mark.parametrize(
    "make, layout, ranks",
    [(roberta_text, "shared", (1, 4)), (text_classifier, "merged", (2,))],
    ids=["roberta_bpe", "bert_wordpiece"],
)
@pytest.mark.long
def test_serve_text_equals_predict_on_strings(tmp_path, make, layout, ranks):
    model = enabled(make())
    expected = {}
    for b in ranks:
        model.set_rank(b)
        expected[b] = model.predict(TEXTS, verbose=0)
    export_ranks(
        model,
        tmp_path / "artifact",
        ranks=ranks,
        layout=layout,
        preprocessing=True,
        verify=False,
        verbose=False,
    )
    path = tmp_path / "artifact"
    inputs = {"text": np.array(TEXTS)}
    if layout == "shared":
        calls = [
            (path, "serve_text", {**inputs, "rank": np.int32(b)}) for b in ranks
        ]
    else:
        calls = [(path / f"rank_{b}", "serve_text", inputs) for b in ranks]
    outputs, _ = serve(tmp_path / "server", calls, text=True)
    for b, found in zip(ranks, outputs, strict=True):
        np.testing.assert_allclose(
            found["output_0"], expected[b], atol=1e-5, rtol=0
        )
    # The words that the live tokenizer has seen stay at home.
    blob = b"".join(x.read_bytes() for x in path.rglob("variables.data*"))
    assert b"never" not in blob


@pytest.mark.long
def test_verified_export_with_a_manifest(tmp_path):
    model = roberta()
    metrics = {b: {"accuracy": b / 10} for b in RANKS}
    path = tmp_path / "new" / "artifact"
    path.mkdir(parents=True)
    old = {"versions": {"keras_dylora": "0.1"}}
    (path / "manifest.json").write_text(json.dumps(old))
    export_ranks(
        model,
        path,
        ranks=[4, 1],
        overwrite=True,
        dtype="float16",
        input_signature={
            "token_ids": keras.InputSpec(shape=(None, 16), dtype="int32"),
            "padding_mask": keras.InputSpec(shape=(None, 16), dtype="int32"),
        },
        report=types.SimpleNamespace(metrics=metrics),
        verbose=False,
    )
    manifest = json.loads((path / "manifest.json").read_text())
    readme = (path / "README.md").read_text()
    assert "| 1 | 1 |\n| 4 | 4 |\n" in readme
    assert "rank=tf.constant(4))" in readme
    assert manifest["ranks"] == [1, 4]
    assert manifest["alpha"] == 8
    assert list(manifest["signatures"]) == ["rank_1", "rank_4", "serve"]
    assert manifest["signatures"]["serve"]["token_ids"] == ["int32", [None, 16]]
    assert manifest["metrics"] == {
        "1": {"accuracy": 0.1},
        "4": {"accuracy": 0.4},
    }
    assert manifest["versions"]["backend"] == backend.NAME
    assert manifest["largest_difference"].keys() == {
        "rank_1",
        "rank_4",
        "serve",
    }
    assert 0 < max(manifest["largest_difference"].values()) < 1e-2
    files = {
        str(x.relative_to(path)): x
        for x in path.rglob("*")
        if x.is_file() and x.name != "manifest.json"
    }
    assert manifest["files"].keys() == files.keys()
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == sha256(files[name])
        assert entry["bytes"] == files[name].stat().st_size
    data = path / "variables" / "variables.data-00000-of-00001"
    assert data.stat().st_size < 3 * model.count_params()
    assert list(path.parent.iterdir()) == [path]


CUSTOM = """
import keras
import keras_dylora as kd

@keras.saving.register_keras_serializable("test")
def double(x):
    return 2 * keras.ops.tanh(x)

@keras.saving.register_keras_serializable("test")
class Noise(keras.layers.Layer):
    def call(self, x):
        return x + keras.random.normal(keras.ops.shape(x))

@keras.saving.register_keras_serializable("test")
class Native(keras.layers.Layer):
    def call(self, x):
        if keras.config.backend() != "tensorflow":
            return x
        raise NotImplementedError("written for another backend")

@keras.saving.register_keras_serializable("test")
class Table(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table = keras.ops.arange(600, dtype="float32")

    def call(self, x):
        return x + self.table[3:9]

@keras.saving.register_keras_serializable("test")
class Custom(kd.DyLoRAModel):
    def __init__(self, layer=None, **kwargs):
        super().__init__(**kwargs)
        self.adapted = kd.DyLoRADense(6, double, rank=4, alpha=8)
        self.layer = layer

    def build(self, input_shape):
        self.adapted.build(input_shape)
        self.built = True

    def call(self, x):
        x = self.adapted(x)
        return x if self.layer is None else self.layer(x)

    def get_config(self):
        layer = keras.saving.serialize_keras_object(self.layer)
        return {"layer": layer}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config["layer"]))
"""


@pytest.fixture
def custom(tmp_path, monkeypatch):
    """A module of a user, which a child process can import."""
    name = f"custom_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module(name)


def custom_model(custom, layer=None):
    model = custom.Custom(layer)
    model(np.zeros((2, 5), "float32"))
    model.set_rank(4)
    return randomize_adapters(model)


@pytest.mark.long
def test_subclassed_model_with_custom_parts(tmp_path, custom):
    model = custom_model(custom)
    export_ranks(
        model, tmp_path / "artifact", layout="merged", ranks=[2], verbose=False
    )
    manifest = json.loads((tmp_path / "artifact/manifest.json").read_text())
    assert max(manifest["largest_difference"].values()) <= 1e-5


@pytest.mark.long
def test_artifact_that_differs_is_not_kept(tmp_path, custom):
    model = custom_model(custom, custom.Noise())
    with pytest.raises(RuntimeError, match="must give the live model's"):
        export_ranks(
            model, tmp_path / "out" / "artifact", ranks=[2], verbose=False
        )
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.long
@pytest.mark.skipif(backend.NAME == "tensorflow", reason="runs in this process")
@pytest.mark.parametrize("importable", [True, False], ids=["fails", "missing"])
def test_layer_that_tensorflow_cannot_rebuild(
    tmp_path, custom, monkeypatch, importable
):
    model = custom_model(custom, custom.Native(name="mine"))
    if not importable:
        monkeypatch.setattr(custom.Native, "__module__", "__main__")
    with pytest.raises(ValueError, match="register_keras_serializable") as info:
        export_ranks(model, tmp_path / "artifact", ranks=[2], verbose=False)
    assert "Native" in str(info.value)
    expected = "another backend" if importable else "'mine'"
    assert expected in str(info.value)
    assert not (tmp_path / "artifact").exists()


def report():
    return types.SimpleNamespace(metrics=[0.5])


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"ranks": [0]}, ValueError, "between 1 and 4"),
        ({"ranks": [5]}, ValueError, "between 1 and 4"),
        ({"ranks": []}, ValueError, "at least one rank"),
        ({"ranks": [1, 1]}, ValueError, "each once"),
        ({"ranks": [1.5]}, TypeError, "must be an integer"),
        ({"ranks": 3}, TypeError, "list of integers"),
        ({"layout": "flat"}, ValueError, "`layout` must be one of"),
        ({"format": "gguf"}, ValueError, "`format` must be one of"),
        ({"format": "onnx"}, ValueError, "needs `layout='merged'`"),
        ({"dtype": "int8"}, ValueError, "`dtype` must be one of"),
        ({"preprocessing": True}, ValueError, "whose `preprocessor` has"),
        ({"generate_signature": True}, ValueError, "with a `sampler`"),
        ({"report": report()}, TypeError, "must be a `RankReport`"),
        ({"input_signature": [1]}, ValueError, "spec with a shape"),
        (
            {"input_signature": {"x": keras.InputSpec(shape=(None, 3))}},
            ValueError,
            "structure of the model's input",
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_argument(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message) as info:
        export_ranks(mlp(), tmp_path / "artifact", **arguments)
    assert "Received:" in str(info.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("overwrite", [False, True])
def test_directory_of_another_is_not_touched(tmp_path, overwrite):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="Received"):
        export_ranks(mlp(), tmp_path, overwrite=overwrite)
    assert [x.name for x in tmp_path.iterdir()] == ["notes.txt"]


def test_working_directory_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    for path in (".", ".."):
        with pytest.raises(ValueError, match="working directory"):
            export_ranks(mlp(), path)
    assert not any((tmp_path / "below").iterdir())


def named_input(structure):
    inputs = keras.Input((5,), name="my-input")
    outputs = kd.DyLoRADense(3, rank=2)(inputs)
    return kd.DyLoRAModel(structure(inputs), outputs)


@pytest.mark.long
def test_input_name_that_no_argument_can_have(tmp_path):
    path = tmp_path / "artifact"
    with pytest.raises(ValueError, match="identifiers. Received: 'my-input'"):
        export_ranks(named_input(lambda x: {"my-input": x}), path)
    assert not path.exists()
    export_ranks(named_input(lambda x: x), path, verbose=False)
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["signatures"]["serve"]) == {"inputs", "rank"}


def test_export_that_exists_is_not_replaced(tmp_path):
    path = tmp_path / "artifact"
    path.mkdir()
    manifest = {"versions": {"keras_dylora": "0.1"}, "files": {}}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="overwrite=True"):
        export_ranks(mlp(), path)
    assert json.loads((path / "manifest.json").read_text()) == manifest


def test_directory_with_a_manifest_of_another_is_not_touched(tmp_path):
    (tmp_path / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(ValueError, match="which holds 'manifest.json'"):
        export_ranks(mlp(), tmp_path, overwrite=True)
    assert [x.name for x in tmp_path.iterdir()] == ["manifest.json"]


def test_specs_without_a_dtype_are_of_the_models_own():
    signature = {
        name: keras.InputSpec(shape=(None, 6))
        for name in ("token_ids", "padding_mask")
    }
    model = kd.enable_dylora(roberta_classifier(), rank=2)
    found = Inputs.of(model, signature)
    assert {x.name: x.dtype for x in found.specs} == {
        "token_ids": "int32",
        "padding_mask": "int32",
    }


@keras.saving.register_keras_serializable(package="tests")
class Sampler(keras_hub.samplers.GreedySampler):
    """A sampler of the user's own."""


def test_module_of_a_custom_sampler_is_found():
    sampler = keras.saving.serialize_keras_object(Sampler())
    model = kd.enable_dylora(roberta_classifier(), rank=2)
    assert custom_modules(model, sampler) == [
        *custom_modules(model), Sampler.__module__,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [roberta_classifier, lambda: keras.Sequential([keras.layers.Dense(2)])],
    ids=["not_enabled", "unbuilt"],
)
def test_model_without_adapters(tmp_path, make):
    with pytest.raises(ValueError, match="must be enabled"):
        export_ranks(make(), tmp_path / "artifact")


def test_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        export_ranks(mlp(), tmp_path / "file" / "artifact")


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    # What is imported meanwhile would be kept as half of its bytecode.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError):
            export_ranks(mlp(), tmp_path / "artifact", verbose=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


EXPORT = """
import signal, sys
from keras_dylora.export import export_ranks
from tests.models import mlp
# A shell's background job starts with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
export_ranks(mlp(), sys.argv[1])
"""


@pytest.mark.long
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL], ids=str)
def test_interruption_leaves_no_artifact(tmp_path, monkeypatch, stop):
    for name in ("out", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    target = tmp_path / "out" / "artifact"
    process = subprocess.Popen(
        [sys.executable, "-c", EXPORT, target],
        cwd=pathlib.Path(__file__).parents[1],
        stderr=subprocess.PIPE,
        text=True,
    )
    # Once a child process is at work: TensorFlow, while it traces, may turn a
    # Ctrl-C into an error of its own.
    while process.poll() is None and not psutil.Process(process.pid).children():
        time.sleep(0.05)
    process.send_signal(stop)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    assert not target.exists()
    if stop == signal.SIGINT:
        assert "KeyboardInterrupt" in stderr
        assert not list(target.parent.iterdir())
        assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.long
@pytest.mark.parametrize(
    "format, file", [("onnx", "model.onnx"), ("litert", "model.tflite")]
)
def test_portable_formats(tmp_path, format, file):
    path = tmp_path / "artifact"
    export_ranks(
        roberta() if format == "onnx" else mlp(),
        path,
        ranks=[1, 4],
        layout="merged",
        format=format,
        verbose=False,
    )
    manifest = json.loads((path / "manifest.json").read_text())
    assert list(manifest["files"]) == [f"rank_1/{file}", f"rank_4/{file}"]
    assert max(manifest["largest_difference"].values()) <= 1e-5


@pytest.mark.long
@pytest.mark.parametrize("format", ["onnx", "litert"])
def test_a_tensor_that_a_layer_holds_is_no_input(tmp_path, custom, format):
    path = tmp_path / "artifact"
    export_ranks(
        custom_model(custom, custom.Table()),
        path,
        ranks=[2],
        layout="merged",
        format=format,
        verbose=False,
    )
    manifest = json.loads((path / "manifest.json").read_text())
    assert max(manifest["largest_difference"].values()) <= 1e-5


def test_artifact_that_cannot_run_is_told_for_what_it_is(tmp_path):
    pytest.importorskip("onnxruntime")
    model = mlp()
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "model.onnx").write_bytes(b"no model")
    ranks = (Served("two", 2, 2),)
    inputs = Inputs.of(model)
    plan = Plan(ranks, "merged", "onnx", None, inputs, False, False)
    with pytest.raises(RuntimeError, match="'onnx' must run on .* inputs"):
        verify(model, tmp_path, plan)


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"keras-dylora\[onnx\]"):
        export_ranks(mlp(), tmp_path / "x", layout="merged", format="onnx")
