"""GPT-2 on pairs of texts: its arrays, loss, optimizer and perplexity."""

import keras
import keras_hub
import numpy as np
from keras import ops

from examples.training import WarmupLinear


def token_lists(tokenizer, texts):
    """The tokens of every text, as lists of int."""
    tokens = tokenizer(list(texts))
    if hasattr(tokens, "to_list"):  # a ragged tensor
        tokens = tokens.to_list()
    return [list(map(int, row)) for row in tokens]


def encode(tokenizer, pairs, max_length=512):
    """Training arrays of `(prompt, target)` pairs, as long as the longest.

    A pair is the tokens of the prompt, the end token, the tokens of the target,
    the end token.

    Returns:
        `(x, y, sample_weight)`; the weight is 1 where `y` is a token of the
        target or its end, 0 in the prompt and the padding.
    """
    end = tokenizer.end_token_id
    prompts = token_lists(tokenizer, (prompt for prompt, _ in pairs))
    targets = token_lists(tokenizer, (f" {target}" for _, target in pairs))
    rows = [
        ([*prompt, end, *target, end][: max_length + 1], len(prompt))
        for prompt, target in zip(prompts, targets, strict=True)
    ]
    length = max(len(tokens) for tokens, _ in rows) - 1
    ids = np.full((len(rows), length + 1), end, dtype="int32")
    weight = np.zeros((len(rows), length), dtype="float32")
    mask = np.zeros((len(rows), length), dtype="int32")
    for i, (tokens, given) in enumerate(rows):
        ids[i, : len(tokens)] = tokens
        mask[i, : len(tokens) - 1] = 1
        weight[i, given : len(tokens) - 1] = 1.0
    x = {"token_ids": ids[:, :-1], "padding_mask": mask}
    return x, ids[:, 1:], weight


class SmoothedCrossEntropy(keras.losses.Loss):
    """Cross-entropy of sparse labels, label-smoothed, without one-hot labels.

    With p = softmax(logits) over V classes, in each place

        -(1 - s) log p[y] - s / V * sum(log p)

    The mean over a batch is that over its weighted places, as a token's mean.

    Args:
        label_smoothing: float. The share s that goes to all classes alike.
    """

    def __init__(self, label_smoothing=0.0):
        super().__init__(reduction="mean_with_sample_weight")
        self.label_smoothing = label_smoothing

    def call(self, y_true, y_pred):
        labels = ops.expand_dims(ops.cast(y_true, "int32"), -1)
        correct = ops.squeeze(ops.take_along_axis(y_pred, labels, -1), -1)
        total = ops.logsumexp(y_pred, axis=-1)
        smooth = self.label_smoothing
        return (
            total - (1 - smooth) * correct - smooth * ops.mean(y_pred, axis=-1)
        )


def compile_model(
    model,
    learning_rate,
    steps,
    warmup,
    weight_decay=0.01,
    label_smoothing=0.0,
    sampler="top_k",
    up=None,
    **restart,
):
    """AdamW with linear warm-up and decay, and the smoothed loss.

    `generate` writes with the sampler. With `up`, as in LoRA+, the rate of `up`
    is so many times that of `down`. `restart` is what `WarmupLinear` takes
    besides.
    """

    def adamw(rate):
        share = min(warmup / steps, 0.5)
        optimizer = keras.optimizers.AdamW(
            WarmupLinear(rate, steps, share, **restart),
            beta_2=0.999,
            weight_decay=weight_decay,
        )
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
        return optimizer

    optimizer = adamw(learning_rate)
    if up is not None:
        optimizers = keras.optimizers.OptimizerMap(optimizer)
        optimizers[".*/up"] = adamw(up * learning_rate)
        optimizer = keras.optimizers.MultiOptimizer(optimizers)
    model.compile(
        optimizer=optimizer,
        loss=SmoothedCrossEntropy(label_smoothing),
        weighted_metrics=[keras_hub.metrics.Perplexity(from_logits=True)],
        sampler=sampler,
    )


def perplexity(model, x, y, sample_weight):
    """Dict of `perplexity`: exp of the mean cross-entropy of a token."""
    found = model.evaluate(
        x,
        y,
        sample_weight=sample_weight,
        batch_size=100,
        verbose=0,
        return_dict=True,
    )
    return {"perplexity": found["perplexity"]}
