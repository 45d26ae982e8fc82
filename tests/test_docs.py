"""The documentation: its code runs, its names, messages and links are right."""

import ast
import dataclasses
import gc
import importlib.util
import pathlib
import re

import keras
import keras_hub
import numpy as np
import pytest
from keras_hub.src.utils import preset_utils

import keras_dylora as kd
from tests import backend, links
from tests.models import classification_loss, randomize_adapters
from tests.text import TEXTS, text_classifier

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
LINKING = [
    page
    for folder in (".", "docs", "examples", "experiments", "benchmarks")
    for page in sorted((ROOT / folder).glob("*.md"))
]
# How many blocks of a page may be marked as not to be run.
NOT_RUN = {"callbacks.md": 1, "devices.md": 1, "sharing.md": 5}
# What `DyLoRAModel` adds to a model.
MEMBERS = (
    "set_rank", "rank", "rank_scope", "draw_ranks", "dylora_summary",
    "dylora_config", "dylora_layers", "add_adapter", "set_adapter",
    "delete_adapter", "adapter_names", "active_adapter",
)  # fmt: skip

# What stands for the presets.
LETTERS = "abcdefghijklmnopqrstuvwxyz,Ġ"
LENGTH = 16
IMAGE = (32, 32, 3)
SIZES = {
    "num_layers": 1,
    "num_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 24,
    "max_sequence_length": 64,
}


@dataclasses.dataclass(frozen=True)
class Block:
    """Python code of a page, and what the comment above it says.

    `<!-- run: torch -->` runs it on that backend only, `<!-- run: long -->` in
    `make test-long` only, `<!-- not run: reason -->` never.
    """

    code: str
    line: int
    run: str | None
    not_run: str | None

    def runs(self, long):
        if self.not_run or (self.run == "long" and not long):
            return False
        return self.run in (None, "long", backend.NAME)


def blocks(page):
    found = re.finditer(
        r"^(?:<!-- (?P<key>run|not run): (?P<value>[^>]+) -->\n)?"
        r"```python\n(?P<code>.*?)^```$",
        page.read_text(),
        re.MULTILINE | re.DOTALL,
    )
    for block in found:
        marked = {block["key"]: block["value"]}
        line = block.string.count("\n", 0, block.start("code"))
        yield Block(
            block["code"], line, marked.get("run"), marked.get("not run")
        )


def cases():
    for page in PAGES:
        runs = {block.run for block in blocks(page) if not block.not_run}
        if runs - {"long"}:
            # On torch, where nothing is compiled, most of them take the least.
            marks = () if backend.NAME == "torch" else pytest.mark.long
            yield pytest.param(page, False, id=page.name, marks=marks)
        if "long" in runs:
            name = f"{page.name}-long"
            yield pytest.param(page, True, id=name, marks=pytest.mark.long)


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """Keras collects garbage for every layer that it quantizes."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def presets(tmp_path_factory):
    """Folders of tiny presets, by the names that the pages use."""
    folder = tmp_path_factory.mktemp("presets")
    hub, saved = keras_hub.models, {"bert_tiny_en_uncased": folder / "bert"}
    model = text_classifier()
    for part in (model.backbone, model.preprocessor):
        part.save_to_preset(folder / "bert")
    for name, special, backbone, tokenizer, preprocessor in (
        (
            "roberta_base_en",
            ("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
            hub.RobertaBackbone,
            hub.RobertaTokenizer,
            hub.RobertaTextClassifierPreprocessor,
        ),
        (
            "gpt2_base_en",
            ("<|endoftext|>",),
            hub.GPT2Backbone,
            hub.GPT2Tokenizer,
            hub.GPT2CausalLMPreprocessor,
        ),
    ):
        tokens = [*special, *LETTERS, "th"]
        vocabulary = {x: i for i, x in enumerate(tokens)}
        body = backbone(vocabulary_size=len(vocabulary), dropout=0.0, **SIZES)
        saved[name] = folder / name
        body.save_to_preset(saved[name])
        preprocessor(
            tokenizer(vocabulary, merges=["t h"]), sequence_length=LENGTH
        ).save_to_preset(saved[name])
    layers = keras_hub.layers
    vit = hub.ViTBackbone(
        image_shape=IMAGE,
        patch_size=8,
        num_layers=1,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=24,
    )
    resnet = hub.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64, 8],
        stackwise_num_blocks=[1, 1],
        stackwise_num_strides=[1, 2],
        block_type="basic_block",
        image_shape=IMAGE,
    )
    for name, body, preprocessor, converter in (
        (
            "vit_base_patch16_224_imagenet",
            vit,
            hub.ViTImageClassifierPreprocessor,
            layers.ViTImageConverter,
        ),
        (
            "resnet_18_imagenet",
            resnet,
            hub.ResNetImageClassifierPreprocessor,
            layers.ResNetImageConverter,
        ),
    ):
        saved[name] = folder / name
        body.save_to_preset(saved[name])
        preprocessor(
            converter(image_size=IMAGE[:2], scale=1 / 255)
        ).save_to_preset(saved[name])
    return saved


@pytest.fixture
def names(presets, tmp_path, monkeypatch):
    """The names that the pages use and don't define, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name, folder in presets.items():
        entry = {"kaggle_handle": str(folder)}
        monkeypatch.setitem(preset_utils.BUILTIN_PRESETS, name, entry)
    clf, other = text_classifier(), text_classifier()
    other.set_weights(clf.get_weights())
    kd.enable_dylora(clf, rank=8, alpha=16, verbose=0)
    randomize_adapters(clf)
    clf.compile(
        keras.optimizers.AdamW(1e-3),
        classification_loss(),
        metrics=["accuracy"],
    )
    rng = np.random.default_rng(0)
    return {
        "__name__": "page",
        "clf": clf,
        "other": other,
        "texts": TEXTS * 16,
        "labels": np.array([0, 1, 0, 1] * 16),
        "val_texts": TEXTS * 4,
        "val_labels": np.array([0, 1, 0, 1] * 4),
        "french_texts": [text[::-1] for text in TEXTS * 8],
        "french_labels": np.array([0, 1, 0, 1] * 8),
        "chosen": ["the film", "a plot", "the good plot", "a warm film"],
        "rejected": ["the bad", "a dull", "the plot bad", "a film dull"],
        "images": rng.integers(0, 256, (32, *IMAGE)).astype("float32"),
        "image_labels": np.array([0, 1] * 16),
        "epochs": 1,
        "x": rng.normal(size=(64, 16)).astype("float32"),
        "y": rng.normal(size=(64, 1)).astype("float32"),
    }


def save_for_transformers(folder):
    """A tiny twin of the model, where transformers looks first."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=SIZES["hidden_dim"],
        num_hidden_layers=SIZES["num_layers"],
        num_attention_heads=SIZES["num_heads"],
        intermediate_size=SIZES["intermediate_dim"],
    )
    transformers.BertForSequenceClassification(config).save_pretrained(
        folder / "google/bert_uncased_L-2_H-128_A-2"
    )


@pytest.mark.parametrize(("page", "long"), list(cases()))
def test_code_runs(page, long, names, tmp_path):
    chosen = [block for block in blocks(page) if block.runs(long)]
    if any("transformers" in block.code for block in chosen):
        save_for_transformers(tmp_path)
    for block in chosen:
        code = "\n" * block.line + block.code  # errors have the page's lines
        exec(compile(code, page, "exec"), names)


def test_few_blocks_are_not_run():
    found = {
        page.name: sum(block.not_run is not None for block in blocks(page))
        for page in PAGES
    }
    assert {name: n for name, n in found.items() if n} == NOT_RUN


def test_every_block_is_found():
    for page in PAGES:
        lines = page.read_text().splitlines()
        fences = [x for x in lines if x.lstrip().startswith("```py")]
        marks = [x for x in lines if re.match(r"<!-- (not )?run", x)]
        found = list(blocks(page))
        assert len(found) == len(fences), page
        assert len(marks) == sum(bool(x.run or x.not_run) for x in found), page
        known = {None, "long", *backend.BACKENDS}
        assert {block.run for block in found} <= known, page


def test_reference_has_every_public_name():
    reference = (DOCS / "api.md").read_text()
    found = re.findall(r"^::: keras_dylora\.(\w+)$", reference, re.MULTILINE)
    assert sorted(found) == sorted(set(kd.__all__) - {"__version__"})
    (model,) = re.findall(
        r"^::: keras_dylora\.DyLoRAModel$(.*?)^(?=:::|#)",
        reference,
        re.MULTILINE | re.DOTALL,
    )
    listed = re.findall(r"- (\w+)", model)
    assert set(MEMBERS) <= set(listed)
    assert all(hasattr(kd.DyLoRAModel, name) for name in listed)


def messages():
    """The texts in the source of the package, `…` for what differs."""

    def text(node):
        match node:
            case ast.Constant(value=str(value)):
                return value
            case ast.JoinedStr(values=parts):
                return "".join(map(text, parts))
        return "…"

    for path in pathlib.Path(kd.__file__).parent.rglob("*.py"):
        yield from map(text, ast.walk(ast.parse(path.read_text())))


def test_errors_are_those_that_the_code_raises():
    known = set(messages())
    _, tables = (DOCS / "errors.md").read_text().split("## ", 1)
    quoted = re.findall(r"^\| (`+) ?(.+?) ?\1 \|", tables, re.MULTILINE)
    assert quoted
    wrong = [
        quote
        for _, quote in quoted
        if not any(x.startswith(quote.removesuffix(" …")) for x in known)
    ]
    assert not wrong


def test_families_are_those_of_the_tests():
    spec = importlib.util.spec_from_file_location(
        "families", DOCS / "families.py"
    )
    families = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(families)
    page = (DOCS / "families.md").read_text()
    # Otherwise: python docs/families.py
    assert families.page(page) == page
    assert "| [roberta](#roberta) | 4 | 12 | `query`, `value` |" in page
    assert "| `transformer_layer/self_attention_layer/key` |  | 2 |" in page
    assert "densenet" in page


@pytest.mark.parametrize(
    "page", LINKING, ids=lambda page: str(page.relative_to(ROOT))
)
def test_links_lead_to_files(page):
    files = links.relative(page.read_text())
    missing = [x for x in files if not (page.parent / x).exists()]
    assert not missing
