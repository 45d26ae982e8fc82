"""The competitors: ways to train that a user has, a model each, built.

All of a size are the same model with random weights, a RoBERTa classifier or a
GPT-2 that writes, on the same random tokens, with AdamW and without dropout.
"""

import dataclasses
import time

import numpy as np

RANK = 8


@dataclasses.dataclass(frozen=True)
class Size:
    """A model, and the batches that it is trained on."""

    vocabulary: int
    layers: int
    heads: int
    hidden: int
    writes: bool = False  # whether it is a GPT-2, not a RoBERTa
    batch: int = 16
    length: int = 64
    positions: int = 512
    dtype: str = "float32"
    quantized: str | None = None  # a mode of the backbone's `quantize`
    remat: bool = False  # whether activations are computed again

    @property
    def intermediate(self):
        return 4 * self.hidden


SIZES = {
    "tiny": Size(1000, 2, 2, 32),
    # At which next to nothing but Python takes time.
    "small": Size(1000, 6, 4, 48, batch=2, length=8),
    "minilm": Size(30522, 6, 12, 384),
    "roberta-base": Size(50265, 12, 12, 768),
    "tiny-gpt2": Size(1000, 2, 2, 32, writes=True),
    "gpt2": Size(50257, 12, 12, 768, writes=True, batch=8, positions=1024),
    "gpt2-medium": Size(50257, 24, 16, 1024, writes=True, positions=1024),
}
ATTENTION = ("query", "key", "value", "attention_output")
FEEDFORWARD = ("feedforward_intermediate_dense", "feedforward_output_dense")
LINEAR = ATTENTION + FEEDFORWARD


def examples(size, steps):
    """Token ids, `(steps * batch, length)`, and labels.

    A label for each row, or for each token the one that follows.
    """
    rng = np.random.default_rng(0)
    rows = steps * size.batch
    shape = (rows, size.length + size.writes)
    tokens = rng.integers(5, size.vocabulary, shape).astype("int32")
    if size.writes:
        return tokens[:, :-1], tokens[:, 1:]
    return tokens, rng.integers(0, 2, rows)


def keras_task(size):
    """A KerasHub task without a preprocessor."""
    import keras
    import keras_hub

    backbone, task, arguments = (
        (keras_hub.models.GPT2Backbone, keras_hub.models.GPT2CausalLM, {})
        if size.writes
        else (
            keras_hub.models.RobertaBackbone,
            keras_hub.models.RobertaTextClassifier,
            {"num_classes": 2},
        )
    )
    # Those alone: "full" computes what is in a layer again within a layer that
    # is computed again.
    blocks = [f"transformer_layer_{i}" for i in range(size.layers)]
    with keras.RematScope(
        mode="list_of_layers" if size.remat else None, layer_names=blocks
    ):
        model = task(
            backbone=backbone(
                vocabulary_size=size.vocabulary,
                num_layers=size.layers,
                num_heads=size.heads,
                hidden_dim=size.hidden,
                intermediate_dim=size.intermediate,
                dropout=0.0,
                max_sequence_length=size.positions,
                dtype=size.dtype,
            ),
            preprocessor=None,
            **arguments,
        )
    if size.quantized:
        model.backbone.quantize(size.quantized)
    return model


class KerasTraining:
    """Steps of `fit`.

    Args:
        size: a `Size`.
        prepare: function that makes a task what is compared.
        jit_compile: as in `compile`.
    """

    def __init__(self, size, prepare, jit_compile="auto"):
        import keras

        self.size = size
        keras.utils.set_random_seed(0)
        self.model = keras_task(size)
        prepare(self.model)
        self.model.compile(
            optimizer=keras.optimizers.AdamW(1e-3),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=jit_compile,
            **({"sampler": "greedy"} if size.writes else {}),
        )
        self.parameters = sum(
            int(np.prod(v.shape)) for v in self.model.trainable_variables
        )

    def data(self, steps):
        """`(x, y)` as Keras takes them."""
        tokens, labels = examples(self.size, steps)
        mask = np.ones(tokens.shape, "bool")
        return {"token_ids": tokens, "padding_mask": mask}, labels

    def seconds(self, steps):
        """Seconds of one step, the mean of `steps` of them."""
        data = self.data(steps)
        start = time.perf_counter()
        self.run(data)
        return (time.perf_counter() - start) / steps

    # The tokens are ready, so Keras's methods are called and not KerasHub's,
    # which would make a `tf.data` pipeline of them.

    def run(self, data):
        import keras

        keras.Model.fit(
            self.model,
            *data,
            batch_size=self.size.batch,
            shuffle=False,
            verbose=0,
        )

    def evaluate(self, data, ranks):
        """Evaluates at each of the ranks; `None` is a model as it is."""
        import keras

        for rank in ranks:
            if rank is not None:
                self.model.set_rank(rank)
            keras.Model.evaluate(
                self.model, *data, batch_size=self.size.batch, verbose=0
            )

    def generate(self, prompts, length, rank=None):
        """Writes greedily after prompts, up to a length in tokens."""
        if rank is not None:
            self.model.set_rank(rank)
        rows, written = prompts.shape
        tokens = np.zeros((rows, length), "int32")
        tokens[:, :written] = prompts
        mask = np.zeros((rows, length), "bool")
        mask[:, :written] = True
        self.model.generate(
            {"token_ids": tokens, "padding_mask": mask}, stop_token_ids=None
        )


class KerasForward(KerasTraining):
    """Steps of `predict`: what no training on this model can do without."""

    def run(self, data):
        import keras

        keras.Model.predict(
            self.model, data[0], batch_size=self.size.batch, verbose=0
        )


class PeftTraining:
    """Steps of PEFT's LoRA on transformers, in a plain torch loop.

    Adapters have the base's dtype, which is faster than PEFT's default of
    float32, and the loss is waited for once, at the end.
    """

    def __init__(self, size, targets, compiled=False, rank=RANK):
        import peft
        import torch
        import transformers

        self.size = size
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        if size.writes:
            base = transformers.GPT2LMHeadModel(
                transformers.GPT2Config(
                    vocab_size=size.vocabulary,
                    n_layer=size.layers,
                    n_head=size.heads,
                    n_embd=size.hidden,
                    n_positions=size.positions,
                    resid_pdrop=0.0,
                    embd_pdrop=0.0,
                    attn_pdrop=0.0,
                )
            )
        else:
            base = transformers.RobertaForSequenceClassification(
                transformers.RobertaConfig(
                    vocab_size=size.vocabulary,
                    num_hidden_layers=size.layers,
                    num_attention_heads=size.heads,
                    hidden_size=size.hidden,
                    intermediate_size=size.intermediate,
                    hidden_dropout_prob=0.0,
                    attention_probs_dropout_prob=0.0,
                    # Its positions begin behind that of the padding.
                    max_position_embeddings=size.positions + 2,
                    num_labels=2,
                )
            )
        base = base.to(self.device, getattr(torch, size.dtype))
        self.model = peft.get_peft_model(
            base,
            peft.LoraConfig(
                task_type="CAUSAL_LM" if size.writes else "SEQ_CLS",
                r=rank,
                lora_alpha=16,
                target_modules=targets,
                fan_in_fan_out=size.writes,
            ),
            autocast_adapter_dtype=False,
        )
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, 1e-3)
        self.parameters = sum(p.numel() for p in trained)
        self.call = torch.compile(self.model) if compiled else self.model

    def seconds(self, steps):
        import torch

        tokens, labels = (
            torch.tensor(a).long() for a in examples(self.size, steps)
        )
        mask = torch.ones_like(tokens)
        batches = zip(
            *(t.split(self.size.batch) for t in (tokens, mask, labels)),
            strict=True,
        )
        start = time.perf_counter()
        for batch in batches:
            ids, mask, y = (t.to(self.device) for t in batch)
            if self.size.writes:
                # It shifts the labels itself.
                y = ids
            loss = self.call(ids, attention_mask=mask, labels=y).loss
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        loss.item()
        return (time.perf_counter() - start) / steps

    def generate(self, prompts, length, rank=None):
        import torch

        ids = torch.tensor(prompts).long().to(self.device)
        new = length - ids.shape[1]
        self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )


def dylora(targets=("query", "value"), rank=RANK, **config):
    def prepare(model):
        import keras_dylora as kd

        kd.enable_dylora(
            model,
            rank=rank,
            target_layers=list(targets),
            verbose=0,
            **config,
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
    "LoRA of ours, q+v": dylora(min_rank=RANK),
    "Keras LoRA 8, q+v": keras_lora(8),
    "Keras LoRA 1, q+v": keras_lora(1),
    "DyLoRA, linear": dylora(LINEAR),
    "Keras LoRA 8, linear": keras_lora(8, LINEAR),
    "fine-tuning": whole,
    "no adapters": whole,
    "DyLoRA 64, q+v": dylora(rank=64),
    "DyLoRA, 1 of 6 layers": dylora(("query",)),
    "DyLoRA, 4 of 6 layers": dylora(ATTENTION),
    # Goes back through all activations, with next to no weight gradients.
    "DyLoRA, first layer": dylora(("transformer_layer_0/.*(query|value)",)),
}
FORWARD = "forward"
# Of models with adapters, at a rank below the maximum.
FORWARDS = {
    f"{FORWARD} of DyLoRA{of}, q+v{how}": (rank, bool(how))
    for of, rank in (("", RANK), (" 64", 64))
    for how in ("", ", tuned")
}
PEFT = "PEFT LoRA 8, q+v"
PEFT_LINEAR = "PEFT LoRA 8, linear"
# What a name ends in that isn't eager on torch, with Keras's `jit_compile`.
TRACED, COMPILED = ", traced", ", compiled"
STAGES = {TRACED: "trace", COMPILED: True}


def make(name, size):
    """The competitor of this name: it has `seconds(steps)`, `parameters`."""
    stage = next((x for x in STAGES if name.endswith(x)), "")
    name = name.removesuffix(stage)
    if name == FORWARD:
        return KerasForward(size, whole)
    if name in FORWARDS:
        rank, tuned = FORWARDS[name]
        made = KerasForward(size, dylora(rank=rank, scaling="constant"))
        below_maximum(made, rank // 2, tuned)
        return made
    if "PEFT" in name:
        targets = PEFT_TARGETS[name == PEFT_LINEAR, size.writes]
        return PeftTraining(size, targets, compiled=stage == COMPILED)
    return KerasTraining(size, TRAINED[name], STAGES.get(stage, "auto"))


def below_maximum(training, rank, tuned):
    """Sets a rank of a trained model, whose cut is tuned or isn't."""
    import keras_dylora as kd

    model, rng = training.model, np.random.default_rng(0)
    for layer in model.dylora_layers:
        layer.up.assign(0.01 * rng.normal(size=layer.up.shape))
    if tuned:
        data = training.data(1)
        kd.tune_ranks(model, *data, [rank], steps=1, verbose=0)
    model.set_rank(rank)


def run_on(backend, *names):
    """Whether all of these run on a backend, which on torch any does."""
    of_torch = ("PEFT", *STAGES)
    return backend == "torch" or not any(
        word in name for name in names for word in of_torch
    )


# GPT-2's query, key and value are one layer there, whose adapter has as many
# weights as those of query and value alone.
PEFT_TARGETS = {
    (False, False): ["query", "value"],
    (False, True): ["c_attn"],
    (True, False): r".*\.layer\..*\.(query|key|value|dense)",
    (True, True): ["c_attn", "c_proj", "c_fc"],
}
