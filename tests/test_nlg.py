"""The generation experiments: data, metrics, loss, beam search, whole runs."""

import dataclasses
import functools
import json
import math

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from examples import nlg_model, nlg_reviews
from experiments import (
    layer_ranks,
    nlg_data,
    nlg_generate,
    nlg_gpt2,
    nlg_metrics,
)
from experiments.beam_search import BeamSearch
from experiments.runs import Results
from tests.backend import to_numpy

pytestmark = pytest.mark.long

SENTENCES = [
    "the vaults is a cheap pub near the river",
    "a pub by the river, the vaults is cheap",
    "blue spice serves chinese food in the city centre",
    "the eagle is a family friendly coffee shop",
]
TABLES = {
    "e2e": (
        [("name", 1, "The Vaults"), ("eatType", 1, "pub"), ("near", 1, "")],
        "name : The Vaults | Type : pub",
    ),
    "dart": (
        [
            ("subject", 0, "Mars Hill College"),
            ("predicate", 0, "JOINED"),
            ("object", 0, "1973"),
            ("subject", 1, "[TABLECONTEXT]"),
            ("predicate", 1, "LOCATION"),
            ("object", 1, "Mars Hill"),
        ],
        "Mars Hill College : joined : 1973 | "
        "[TABLECONTEXT] : location : Mars Hill",
    ),
    "webnlg": (
        [
            ("subject", 0, "Aarhus_Airport"),
            ("predicate", 0, "cityServed"),
            ("object", 0, '"Aarhus, Denmark"'),
        ],
        'Aarhus_Airport : cityServed : "Aarhus, Denmark"',
    ),
}
TINY = dataclasses.replace(
    nlg_gpt2.REVIEWS, epochs=1, batch_size=4, rank=2, warmup_steps=1
)


def mocked(tables_and_references):
    """TFDS with these examples in every split, in the datasets' own schema."""

    def as_dataset(self, *args, **kwargs):
        def rows():
            for table, reference in tables_and_references:
                header, row, content = zip(*table, strict=True)
                cells = {
                    "column_header": list(header),
                    "row_number": np.array(row, "int16"),
                    "content": list(content),
                }
                example = {"table": cells}
                if self.name == "web_nlg":
                    example["context"] = "Airport"
                yield {"input_text": example, "target_text": reference}

        features = self.info.features
        signature = tf.nest.map_structure(
            lambda info: tf.TensorSpec(info.shape, info.dtype),
            features.get_tensor_info(),
            expand_composites=False,
        )
        return tf.data.Dataset.from_generator(rows, output_signature=signature)

    return tfds.testing.mock_data(as_dataset_fn=as_dataset)


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """A pretrained model of corpora of a few sentences."""
    texts = [f"{text} {i}" for i in range(8) for text in SENTENCES]
    corpus = (texts, np.zeros(len(texts)))
    settings = nlg_reviews.Pretraining(
        vocabulary_size=300,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        max_length=128,
        epochs=1,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nlg_reviews, "vader_corpus", lambda name: corpus)
        patch.setattr(nlg_reviews, "TEST_SIZE", 16)
        folder = tmp_path_factory.mktemp("pretrained")
        yield nlg_reviews.pretrained(folder, settings, verbose=0)
    nlg_gpt2.tokenized.cache_clear()


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "runs.jsonl")


@pytest.mark.parametrize("task", nlg_data.TASKS)
@pytest.mark.parametrize("split", nlg_data.SPLITS)
def test_load_reads_the_schema_of_tfds(task, split):
    with tfds.testing.mock_data(num_examples=3):
        data = nlg_data.load(task, split)
    assert sum(len(references) for _, references in data) == 3
    assert all(isinstance(meaning, str) for meaning, _ in data)


@pytest.mark.parametrize("task", TABLES)
def test_load_linearises_and_groups_references(task):
    table, line = TABLES[task]
    other = [("name", 1, "x"), ("food", 1, "y"), ("area", 1, "z")]
    with mocked([(table, "one"), (other, "two"), (table, "three ")]):
        data = nlg_data.load(task, "test")
        pairs = nlg_data.pairs(task)
    assert data[0] == (line, ["one", "three"])
    assert [references for _, references in data[1:]] == [["two"]]
    assert pairs[:2] == [(line, "one"), (line, "three")]


def test_missing_dataset_says_how_to_fetch_it(monkeypatch):
    def load(*args, **kwargs):
        raise ConnectionError("no network\nand more lines")

    monkeypatch.setattr(tfds, "load", load)
    with pytest.raises(RuntimeError, match=r"tfds.load\('dart'\)") as info:
        nlg_data.load("dart", "test")
    assert str(info.value).endswith("ConnectionError: no network")


@pytest.mark.parametrize(
    "arguments", [("sst2", "test"), ("e2e", "dev")], ids=["task", "split"]
)
def test_load_refuses_unknown_names(arguments):
    with pytest.raises(ValueError, match="must be one of.*Received"):
        nlg_data.load(*arguments)


def test_encode_weights_the_target_and_its_end():
    tokenizer = nlg_reviews.new_tokenizer(SENTENCES, 300)
    pairs = [("the vaults", "a pub"), ("x", SENTENCES[0])]
    x, y, weight = nlg_model.encode(tokenizer, pairs)
    end = tokenizer.end_token_id
    prompt, target = nlg_model.token_lists(tokenizer, ["the vaults", " a pub"])
    size = len(prompt) + len(target) + 1
    np.testing.assert_array_equal(
        x["token_ids"][0, :size], [*prompt, end, *target]
    )
    np.testing.assert_array_equal(y[0][weight[0] > 0], [*target, end])
    np.testing.assert_array_equal(
        y[0, : len(prompt) + 1], [*prompt[1:], end, target[0]]
    )
    assert x["padding_mask"].sum(axis=1).tolist()[0] == size
    assert nlg_model.encode(tokenizer, pairs, max_length=5)[1].shape == (2, 5)


def test_bleu_is_that_of_sacrebleu_s_readme():
    hypotheses = [
        "The dog bit the man.",
        "It wasn't surprising.",
        "The man had just bitten him.",
    ]
    references = [
        ["The dog bit the man.", "The dog had bit the man."],
        ["It was not unexpected.", "No one was surprised."],
        ["The man bit him first.", "The man had bitten the dog."],
    ]
    found = nlg_metrics.score(hypotheses, references, ["BLEU"])
    assert found["BLEU"] == pytest.approx(48.530827, abs=1e-5)


# The example of nltk's documentation.
GUIDE = (
    "It is a guide to action which ensures that the military always obeys "
    "the commands of the party"
)
GUIDE_REFERENCES = [
    "It is a guide to action that ensures that the military will forever "
    "heed Party commands",
    "It is the guiding principle which guarantees the military forces always "
    "being under the command of the Party",
    "It is the practical guide for the army always to heed the directions of "
    "the party",
]


def test_nist_is_that_of_nltk_s_documentation():
    # There, "Party" and "party" are two words.
    references = [text.replace("Party", "Partei") for text in GUIDE_REFERENCES]
    found = nlg_metrics.score([GUIDE], [references], ["NIST"])
    assert found["NIST"] == pytest.approx(3.3709, abs=1e-4)


def test_meteor_is_that_of_nltk_s_documentation(monkeypatch):
    class NoSynonyms:
        def synsets(self, word):
            return []

    monkeypatch.setattr(nlg_metrics, "_wordnet", NoSynonyms)
    found = nlg_metrics.score([GUIDE], [GUIDE_REFERENCES], ["METEOR"])
    assert found["METEOR"] == pytest.approx(69.44, abs=0.01)


def test_meteor_without_wordnet_is_left_out(monkeypatch, capsys):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    nltk.corpus.wordnet = nltk.corpus.LazyCorpusLoader(
        "wordnet", nltk.corpus.WordNetCorpusReader, None
    )
    with pytest.raises(RuntimeError, match="nltk.downloader wordnet"):
        nlg_metrics.score(["a"], [["a"]], ["METEOR"])
    assert "METEOR" not in nlg_metrics.available_metrics()
    assert "METEOR is left out" in capsys.readouterr().out


def test_rouge_l_and_ter_by_hand():
    found = nlg_metrics.score(
        ["The quick brown dog jumps on the log."],
        [["Nothing", "The quick brown fox jumps over the lazy dog."]],
        ["ROUGE-L"],
    )
    # "the quick brown jumps the": 5 of 8 and 5 of 9 words.
    assert found["ROUGE-L"] == pytest.approx(100 * 2 * 5 / (8 + 9))
    found = nlg_metrics.score(["a b c d"], [["a x c d e"]], ["TER"])
    assert found["TER"] == pytest.approx(2 / 5)


def test_cider_by_hand():
    references = [["the cat sat still"], ["one two three four"]]
    same = [texts[0] for texts in references]
    cider = nlg_metrics.score(same, references, ["CIDEr"])["CIDEr"]
    assert cider == pytest.approx(10)
    # One word of four, of equal weight: cosines 1/2, 0, 0, 0 where the word
    # is in a sentence of two others, and the length penalty of two bigrams.
    hypotheses = ["the dog", "one two three four"]
    cider = nlg_metrics.score(hypotheses, references, ["CIDEr"])["CIDEr"]
    cosine = math.log(2) ** 2 / math.sqrt(2 * 4) / math.log(2) ** 2
    first = 10 * cosine / 4 * math.exp(-(2**2) / (2 * 6**2))
    assert cider == pytest.approx((first + 10) / 2)


@pytest.mark.parametrize(
    "arguments",
    [(["a"], [["a"]], ["bleu"]), (["a"], []), ([], []), (["a"], [[]])],
    ids=["metric", "lengths", "empty", "no-reference"],
)
def test_score_refuses_bad_input(arguments):
    with pytest.raises(ValueError, match="must.*Received"):
        nlg_metrics.score(*arguments)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smoothed_loss_is_that_of_smoothed_one_hot_labels(smoothing):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 7)).astype("float32") * 3
    labels = rng.integers(0, 7, (2, 3))
    weight = np.array([[1, 0, 1], [1, 0, 0]], "float32")
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = (1 - smoothing) * np.eye(7)[labels] + smoothing / 7
    expected = -(target * log_probs).sum(-1)[weight > 0].mean()
    loss = nlg_model.SmoothedCrossEntropy(smoothing)
    found = loss(labels, logits, sample_weight=weight)
    np.testing.assert_allclose(to_numpy(found), expected, rtol=1e-5)


def searched(table, prompt, length, end, num_beams, penalty):
    """Beam search over a Markov chain, in plain Python."""
    beams = [(0.0, list(prompt))]
    for _ in range(length - len(prompt)):
        candidates = []
        for score, tokens in beams:
            if end in tokens[len(prompt) :]:
                candidates.append((score, tokens))
                continue
            log_probs = table[tokens[-1]]
            candidates += [
                (score + p, [*tokens, i]) for i, p in enumerate(log_probs)
            ]
        beams = sorted(candidates, key=lambda c: -c[0])[:num_beams]
    return max(
        beams, key=lambda c: c[0] / (len(c[1]) - len(prompt)) ** penalty
    )[1]


@pytest.mark.parametrize("penalty", [0.0, 0.8, 2.0])
def test_beam_search_is_that_of_plain_python(penalty):
    end, length = 0, 9
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(6, 6)).astype("float32")
    table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    prompts = [[2, end], [3, 1, 4, end], [5, 5, end]]
    tokens = np.ones((3, length), "int32")
    mask = np.zeros((3, length), "int32")
    for i, row in enumerate(prompts):
        tokens[i, : len(row)], mask[i, : len(row)] = row, 1

    def next(prompt, cache, index):
        last = keras.ops.take(prompt, index - 1, axis=1)
        return (
            keras.ops.take(keras.ops.convert_to_tensor(logits), last, 0),
            None,
            cache,
        )

    found = BeamSearch(3, penalty)(
        next,
        keras.ops.convert_to_tensor(tokens),
        index=2,
        mask=keras.ops.convert_to_tensor(mask),
        stop_token_ids=[end],
    )
    for row, prompt in zip(to_numpy(found), prompts, strict=True):
        expected = searched(table, prompt, length, end, 3, penalty)
        assert row[: len(expected)].tolist() == expected


def test_perplexity_is_exp_of_the_mean_over_real_tokens(preset):
    tokenizer, _, (x, y, weight) = nlg_gpt2.tokenized("reviews", str(preset))
    model = keras_hub.models.GPT2CausalLM.from_preset(
        str(preset), preprocessor=None
    )
    nlg_model.compile_model(model, 1e-3, steps=2, warmup=1)
    found = nlg_model.perplexity(model, x, y, weight)["perplexity"]
    logits = model.predict(x, verbose=0).astype("float64")
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_probs, y[..., None], -1)[..., 0]
    real = weight > 0
    np.testing.assert_allclose(found, np.exp(-picked[real].mean()), rtol=1e-4)
    assert real.sum() == x["padding_mask"].sum()


def test_reviews_run_is_kept_and_not_run_again(preset, results, monkeypatch):
    settings = dataclasses.replace(TINY, preset=str(preset))
    arguments = ("reviews", "dylora", 10, settings)
    first = nlg_gpt2.run(results, *arguments, verbose=0)
    assert list(first["metrics"]) == ["0", "1", "2"]
    assert first["trainable"] == 2 * 2 * 8 * 2
    values = [m["perplexity"] for m in first["metrics"].values()]
    assert len(set(values)) == 3 and np.isfinite(values).all()

    def build(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr(nlg_gpt2, "build", build)
    with open(results.path, "a") as file:
        file.write('{"key": {"task": "revi')  # cut short by a crash
    with pytest.warns(UserWarning, match="Line 2"):
        reopened = Results(results.path)
    assert nlg_gpt2.run(reopened, *arguments, verbose=0) == first
    with pytest.raises(AssertionError, match="trained again"):
        nlg_gpt2.run(reopened, "reviews", "lora", 10, settings, verbose=0)


def test_lora_at_each_rank(preset, results, tmp_path):
    settings = dataclasses.replace(
        TINY, preset=str(preset), target_layers="all-linear"
    )
    arguments = ("reviews", "lora-each", 10, settings)
    found = nlg_gpt2.run(results, *arguments, verbose=0)
    lines = results.path.read_text().splitlines()
    runs = [json.loads(line) for line in lines]
    assert [run["key"]["settings"]["rank"] for run in runs] == [1, 2]
    assert found["metrics"] == {
        b: run["result"]["metrics"][b]
        for b, run in zip("12", runs, strict=True)
    }
    nlg_gpt2.write(tmp_path, "reviews", {"lora-each": [found]}, rank=2)
    text = (tmp_path / "reviews.md").read_text()
    assert text.startswith("| perplexity at rank | 1 | 2 | time |")


def test_a_rank_for_each_layer_beside_one_for_all(preset, results, tmp_path):
    settings = dataclasses.replace(
        TINY, preset=str(preset), target_layers="all-linear"
    )
    found, size = layer_ranks.compare(
        "reviews", results, [10], True, settings, (0.5,), verbose=0
    )
    assert {row: list(x) for row, x in found.items()} == dict.fromkeys(
        layer_ranks.ROWS, ["50.0%", "100.0%"]
    )
    lines = results.path.read_text().splitlines()
    ours, *lora = (json.loads(line) for line in lines)
    assert ours["key"]["settings"]["budgets"] == [0.5]
    metrics = ours["result"]["metrics"]
    one, own, each = found.values()
    assert one["50.0%"] == [metrics["1"]["perplexity"]]
    assert one["100.0%"] == [metrics["2"]["perplexity"]]
    assert own["50.0%"] == [metrics["50.0%"]["perplexity"]]
    assert not own["100.0%"]
    assert each["50.0%"] == [lora[0]["result"]["metrics"]["1"]["perplexity"]]
    assert size == ours["result"]["trainable"]
    layer_ranks.write(tmp_path, "reviews", "all-linear", found, size)
    text = (tmp_path / "reviews-all-linear.md").read_text()
    assert text.startswith("| perplexity at | 50.0% | 100.0% |")
    assert (tmp_path / "reviews-all-linear.png").stat().st_size > 1000


def test_pretrained_model_is_trained_once(preset, monkeypatch):
    monkeypatch.delattr(nlg_reviews, "new_tokenizer")
    settings = json.loads((preset / "settings.json").read_text())
    settings = nlg_reviews.Pretraining(**settings)
    assert nlg_reviews.pretrained(preset.parent, settings, 0) == preset


def test_e2e_run_generates_at_every_rank(
    preset, results, tmp_path, monkeypatch
):
    table, _ = TABLES["e2e"]
    short = functools.partial(
        nlg_generate.generate, batch_size=2, max_new_tokens=8
    )
    monkeypatch.setattr(nlg_gpt2, "generate", short)
    settings = dataclasses.replace(TINY, preset=str(preset))
    with mocked([(table, SENTENCES[0]), (table, SENTENCES[1])]):
        found = nlg_gpt2.run(
            results, "e2e", "dylora", 10, settings, ["BLEU", "TER"], verbose=0
        )
    assert list(found["metrics"]) == ["1", "2"]
    assert list(found["metrics"]["1"]) == ["BLEU", "TER"]
    assert found["metrics"]["1"]["TER"] > 0
    # An older run, with less.
    full = {"metrics": {"full": {"BLEU": 1.0}}, "seconds": 2.0}
    runs = {"dylora": [found], "fine-tune": [full, full]}
    nlg_gpt2.write(tmp_path, "e2e", runs, rank=2)
    text = (tmp_path / "e2e.md").read_text()
    assert "| BLEU at rank | 1 | 2 | full | time |" in text
    assert "TER" not in text
    assert "| fine-tune |  |  | 1.00 ± 0.00 | 2 s |" in text
    assert (tmp_path / "e2e.png").exists()


def test_command_prints_one_line_for_what_is_missing(tmp_path, capsys):
    arguments = ["--preset", str(tmp_path / "gpt2"), "--verbose", "0"]
    arguments += ["--results", str(tmp_path / "r.jsonl"), "--task", "e2e"]
    nlg_gpt2.tokenized.cache_clear()
    with pytest.raises(SystemExit) as info:
        nlg_gpt2.main(arguments)
    assert info.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "GPT2CausalLM.from_preset" in error


@pytest.mark.parametrize("argument", ["task", "method"])
def test_run_refuses_unknown_names(argument, results):
    arguments = {"task": "e2e", "method": "lora", argument: "unknown"}
    with pytest.raises(ValueError, match=f"`{argument}` must.*'unknown'"):
        nlg_gpt2.run(results, seed=0, settings=TINY, **arguments)
