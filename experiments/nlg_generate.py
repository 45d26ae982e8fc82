"""The texts that GPT-2 writes after prompts."""

import numpy as np

from examples.nlg_model import token_lists


def encode_prompts(tokenizer, prompts, max_new_tokens=64, max_length=512):
    """Arrays of prompts with room for what is generated.

    They are padded with a token that isn't the end token, which would stop
    the generation.
    """
    end = tokenizer.end_token_id
    limit = max_length - max_new_tokens - 1
    rows = [[*t[:limit], end] for t in token_lists(tokenizer, prompts)]
    length = max(map(len, rows)) + max_new_tokens
    padding = 0 if end else 1
    ids = np.full((len(rows), length), padding, dtype="int32")
    mask = np.zeros((len(rows), length), dtype="int32")
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return {"token_ids": ids, "padding_mask": mask}


def generate(model, tokenizer, prompts, batch_size=16, max_new_tokens=64):
    """The text that beam search writes after each prompt."""
    x = encode_prompts(tokenizer, prompts, max_new_tokens)
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
