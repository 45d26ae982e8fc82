"""What a user could train with instead: one model each, ready for steps.

All are RoBERTa classifiers of the same sizes with random weights, on the same
random tokens and labels, with AdamW and without dropout.
"""

import time

import numpy as np

BATCH, LENGTH, POSITIONS = 16, 64, 512
SIZES = {
    "minilm": {
        "vocabulary": 30522,
        "layers": 6,
        "heads": 12,
        "hidden": 384,
        "intermediate": 1536,
    },
    "roberta-base": {
        "vocabulary": 50265,
        "layers": 12,
        "heads": 12,
        "hidden": 768,
        "intermediate": 3072,
    },
}
ATTENTION = ("query", "key", "value", "attention_output")
FEEDFORWARD = ("feedforward_intermediate_dense", "feedforward_output_dense")
LINEAR = ATTENTION + FEEDFORWARD


def examples(size, steps):
    """Token ids, `(steps * batch, length)`, and a label for each row."""
    rng = np.random.default_rng(0)
    vocabulary = SIZES[size]["vocabulary"]
    tokens = rng.integers(5, vocabulary, (steps * BATCH, LENGTH))
    return tokens.astype("int32"), rng.integers(0, 2, len(tokens))


def classifier(size):
    """A KerasHub classifier without a preprocessor."""
    import keras_hub

    sizes = SIZES[size]
    backbone = keras_hub.models.RobertaBackbone(
        vocabulary_size=sizes["vocabulary"],
        num_layers=sizes["layers"],
        num_heads=sizes["heads"],
        hidden_dim=sizes["hidden"],
        intermediate_dim=sizes["intermediate"],
        dropout=0.0,
        max_sequence_length=POSITIONS,
    )
    return keras_hub.models.RobertaTextClassifier(backbone, num_classes=2)


class KerasTraining:
    """Steps of `fit`.

    Args:
        size: a key of `SIZES`.
        prepare: function that makes a classifier what is compared.
    """

    def __init__(self, size, prepare):
        import keras

        from examples.training import trainable_parameters

        self.size = size
        keras.utils.set_random_seed(0)
        self.model = classifier(size)
        prepare(self.model)
        self.model.compile(
            keras.optimizers.AdamW(1e-3),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        self.parameters = trainable_parameters(self.model)

    def data(self, steps):
        from examples.training import dataset

        tokens, labels = examples(self.size, steps)
        x = {"token_ids": tokens, "padding_mask": np.ones(tokens.shape, "bool")}
        return dataset((x, labels), BATCH, seed=0)

    def seconds(self, steps):
        """Seconds of one step, the mean of `steps` of them."""
        data = self.data(steps)
        start = time.perf_counter()
        self.run(data)
        return (time.perf_counter() - start) / steps

    def run(self, data):
        self.model.fit(data, shuffle=False, verbose=0)


class KerasForward(KerasTraining):
    """Steps of `predict`: what no training on this model can do without."""

    def run(self, data):
        self.model.predict(data, verbose=0)


class PeftTraining:
    """Steps of PEFT's LoRA on transformers, in a plain torch loop."""

    def __init__(self, size, targets, rank):
        import peft
        import torch
        import transformers

        self.size = size
        torch.manual_seed(0)
        sizes = SIZES[size]
        config = transformers.RobertaConfig(
            vocab_size=sizes["vocabulary"],
            num_hidden_layers=sizes["layers"],
            num_attention_heads=sizes["heads"],
            hidden_size=sizes["hidden"],
            intermediate_size=sizes["intermediate"],
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            # Its positions begin behind that of the padding.
            max_position_embeddings=POSITIONS + 2,
            num_labels=2,
        )
        self.model = peft.get_peft_model(
            transformers.RobertaForSequenceClassification(config),
            peft.LoraConfig(
                task_type="SEQ_CLS",
                r=rank,
                lora_alpha=16,
                target_modules=targets,
            ),
        )
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, 1e-3)
        self.parameters = sum(p.numel() for p in trained)

    def seconds(self, steps):
        import torch

        tokens, labels = (
            torch.tensor(a).long() for a in examples(self.size, steps)
        )
        mask = torch.ones_like(tokens)
        batches = zip(
            *(t.split(BATCH) for t in (tokens, mask, labels)), strict=True
        )
        start = time.perf_counter()
        for ids, mask, y in batches:
            loss = self.model(ids, attention_mask=mask, labels=y).loss
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss.item()
        return (time.perf_counter() - start) / steps


def dylora(targets=("query", "value"), rank=8, **config):
    def prepare(model):
        import keras_dylora as kd

        kd.enable_dylora(
            model, rank=rank, target_layers=list(targets), **config
        )

    return prepare


def keras_lora(rank, targets=None):
    def prepare(model):
        names = None if targets is None else list(targets)
        model.backbone.enable_lora(rank, target_layer_names=names)

    return prepare


def whole(model):
    """Fine-tuning: every parameter is trained."""


TRAINED = {
    "DyLoRA, q+v": dylora(),
    "DyLoRA frozen, q+v": dylora(frozen=True),
    "DyLoRA per example, q+v": dylora(draw="example", scaling="constant"),
    "LoRA of ours, q+v": dylora(min_rank=8),
    "Keras LoRA 8, q+v": keras_lora(8),
    "Keras LoRA 1, q+v": keras_lora(1),
    "DyLoRA, linear": dylora(LINEAR),
    "Keras LoRA 8, linear": keras_lora(8, LINEAR),
    "fine-tuning": whole,
    "DyLoRA 64, q+v": dylora(rank=64),
    "DyLoRA, 1 of 6 layers": dylora(("query",)),
    "DyLoRA, 4 of 6 layers": dylora(ATTENTION),
    # Goes back through all activations, with next to no weight gradients.
    "DyLoRA, first layer": dylora(("transformer_layer_0/.*(query|value)",)),
}
FORWARD = "forward"
PEFT = "PEFT LoRA 8, q+v"


def make(name, size):
    """The competitor of this name: it has `seconds(steps)`, `parameters`."""
    if name == FORWARD:
        return KerasForward(size, whole)
    if name == PEFT:
        return PeftTraining(size, ["query", "value"], rank=8)
    return KerasTraining(size, TRAINED[name])
