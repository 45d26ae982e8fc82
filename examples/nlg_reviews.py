"""A small GPT-2, pretrained on movie reviews, and the domain it adapts to."""

import dataclasses
import hashlib
import json
import pathlib
import shutil

import keras
import keras_hub
import numpy as np
import tokenizers

from examples import nlg_model
from examples.data import vader_corpus
from examples.training import fit

TEST_SIZE = 1_000


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """The small GPT-2 of the `reviews` task, and its two domains."""

    source: str = "movieReviewSnippets"
    target: str = "tweets"
    vocabulary_size: int = 2_000
    num_layers: int = 4
    num_heads: int = 4
    hidden_dim: int = 128
    dropout: float = 0.1
    max_length: int = 48
    epochs: int = 5
    batch_size: int = 32
    learning_rate: float = 2e-3
    seed: int = 0


def domain(corpus, seed=0):
    """Sentences of one corpus of `vader_corpus`, shuffled.

    Returns:
        `(train, test)`, lists of str; the last 1,000 are the test part.
    """
    texts, _ = vader_corpus(corpus)
    order = np.random.default_rng(seed).permutation(len(texts))
    texts = [texts[i] for i in order]
    return texts[:-TEST_SIZE], texts[-TEST_SIZE:]


def new_tokenizer(texts, size):
    """A GPT-2 tokenizer whose byte-level BPE is learned from `texts`."""
    learned = tokenizers.ByteLevelBPETokenizer()
    learned.train_from_iterator(
        texts,
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    model = json.loads(learned.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return keras_hub.models.GPT2Tokenizer(model["vocab"], merges)


def arrays(tokenizer, texts, max_length):
    """Texts as `nlg_model.encode` has them, without prompts."""
    return nlg_model.encode(tokenizer, [("", t) for t in texts], max_length)


def target_data(tokenizer, path):
    """Training and test arrays of the domain that a model adapts to."""
    settings = json.loads((pathlib.Path(path) / "settings.json").read_text())
    train, test = (
        arrays(tokenizer, texts, settings["max_length"])
        for texts in domain(settings["target"])
    )
    return train, test


def pretrained(folder, settings=None, verbose=1):
    """Trains the small GPT-2 unless it is there.

    Args:
        folder: path. The model goes into a folder of it that is named by its
            settings.
        settings: `Pretraining`. Defaults to `None`, its defaults.
        verbose: as in `fit`.

    Returns:
        The path of the model, which is a KerasHub preset.
    """
    settings = settings or Pretraining()
    text = json.dumps(dataclasses.asdict(settings), indent=2)
    name = hashlib.sha256(text.encode()).hexdigest()[:8]
    path = pathlib.Path(folder) / f"gpt2-{name}"
    if path.exists():
        return path
    train, test = domain(settings.source)
    target, target_test = domain(settings.target)
    tokenizer = new_tokenizer(train + target, settings.vocabulary_size)
    keras.utils.set_random_seed(settings.seed)
    model = keras_hub.models.GPT2CausalLM(
        keras_hub.models.GPT2Backbone(
            vocabulary_size=tokenizer.vocabulary_size(),
            num_layers=settings.num_layers,
            num_heads=settings.num_heads,
            hidden_dim=settings.hidden_dim,
            intermediate_dim=4 * settings.hidden_dim,
            dropout=settings.dropout,
            max_sequence_length=settings.max_length,
        )
    )
    data = arrays(tokenizer, train, settings.max_length)
    steps = settings.epochs * -(-len(train) // settings.batch_size)
    nlg_model.compile_model(model, settings.learning_rate, steps, steps // 10)
    print(f"pretraining on {settings.source}: {steps} steps", flush=True)
    fit(model, data, settings, settings.seed, verbose)
    for name, texts in (
        (settings.source, test),
        (settings.target, target_test),
    ):
        data = arrays(tokenizer, texts, settings.max_length)
        found = nlg_model.perplexity(model, *data)["perplexity"]
        print(f"  perplexity on {name}: {found:.1f}", flush=True)
    partial = path.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.backbone.save_to_preset(str(partial))
    tokenizer.save_to_preset(str(partial))
    (partial / "settings.json").write_text(text)
    partial.replace(path)
    return path
