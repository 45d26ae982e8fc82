"""The import of the package, and the former name of KerasHub."""

import json
import pathlib

import keras_dylora as kd
from tests import backend

PUBLIC = {
    "Categorical", "DyLoRAConfig", "DyLoRAConv1D", "DyLoRAConv2D",
    "DyLoRAConv3D", "DyLoRADense", "DyLoRAEinsumDense",
    "DyLoRAEmbedding", "DyLoRAModel", "Geometric", "ProgressiveDecay",
    "RankAllocation",
    "RankEvaluation",
    "RankReport", "Uniform", "allocate_ranks", "combine_adapters",
    "disable_dylora",
    "enable_dylora", "evaluate_ranks", "export_ranks", "from_peft",
    "load_adapter", "to_peft",
    "merge", "order_ranks", "save_adapter", "truncate", "tune_ranks",
}  # fmt: skip


def test_public_names():
    assert all(hasattr(kd, name) for name in PUBLIC)
    assert all(getattr(kd, name).__doc__ for name in PUBLIC)


def test_dir_shows_the_public_names_and_nothing_else():
    assert set(dir(kd)) == PUBLIC | {"__version__"}


def test_importing_loads_neither_keras_hub_nor_another_backend():
    modules = json.loads(
        backend.run_python(
            "import json, sys, keras\n"
            "before = set(sys.modules)\n"
            "import keras_dylora\n"
            "print(json.dumps(sorted(set(sys.modules) - before)))",
        ).splitlines()[-1]
    )
    roots = {module.split(".")[0] for module in modules}
    foreign = {"keras_hub", "matplotlib", "peft", "transformers"}
    others = set(backend.BACKENDS) - {backend.NAME}
    assert not roots & (foreign | others)


def test_keras_nlp_is_the_same():
    import keras_hub
    import keras_nlp

    assert keras_nlp.models.RobertaTextClassifier is (
        keras_hub.models.RobertaTextClassifier
    )
    backbone = keras_nlp.models.RobertaBackbone(
        vocabulary_size=50,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=8,
        max_sequence_length=8,
    )
    model = keras_nlp.models.RobertaTextClassifier(
        backbone, num_classes=2, preprocessor=None
    )
    kd.enable_dylora(model, rank=2)
    assert len(model.dylora_layers) == 2


def test_backends_are_known_in_few_places_only():
    package = pathlib.Path(kd.__file__).parent
    knowing = {
        next(p for p in path.relative_to(package).parts if p != "layers")
        for path in package.rglob("*.py")
        if "backend.backend()" in path.read_text()
        or "keras.src" in path.read_text()
    }
    assert knowing <= {"training", "export", "torch_product.py", "_keras"}
