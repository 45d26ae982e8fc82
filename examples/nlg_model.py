"""GPT-2 for the generation examples: its preset, loss, optimizer, output."""

import keras
import keras_hub
import numpy as np
from keras import ops

from examples import nlg_data
from examples.beam_search import BeamSearch
from examples.training import WarmupLinear


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
    **restart,
):
    """AdamW with linear warm-up and decay, the smoothed loss, beam search.

    `restart` is what `WarmupLinear` has beside them.
    """
    optimizer = keras.optimizers.AdamW(
        WarmupLinear(learning_rate, steps, min(warmup / steps, 0.5), **restart),
        beta_2=0.999,
        weight_decay=weight_decay,
    )
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    model.compile(
        optimizer=optimizer,
        loss=SmoothedCrossEntropy(label_smoothing),
        weighted_metrics=[keras_hub.metrics.Perplexity(from_logits=True)],
        sampler=BeamSearch(),
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


def generate(model, tokenizer, prompts, batch_size=16, max_new_tokens=64):
    """The text that beam search writes after each prompt."""
    x = nlg_data.encode_prompts(tokenizer, prompts, max_new_tokens)
    end, texts = tokenizer.end_token_id, []
    for start in range(0, len(prompts), batch_size):
        # The last batch is filled up: another size would compile again.
        rows = np.arange(start, start + batch_size) % len(prompts)
        batch = {name: array[rows] for name, array in x.items()}
        output = model.generate(dict(batch), stop_token_ids=(end,))
        keep = output["padding_mask"].astype(bool)
        keep &= batch["padding_mask"] == 0
        keep &= output["token_ids"] != end
        written = [
            ids[k].tolist()
            for ids, k in zip(output["token_ids"], keep, strict=True)
        ]
        texts += [text.strip() for text in tokenizer.detokenize(written)]
    return texts[: len(prompts)]
