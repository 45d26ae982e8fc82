"""Beam search for KerasHub's CausalLM that stops beams at their end."""

import keras_hub
from keras import ops


class BeamSearch(keras_hub.samplers.BeamSampler):
    """Beam search with finished beams and a length penalty.

    KerasHub's own goes on scoring a beam after its end token, and counts
    guesses of prompt tokens where the prompts of a batch differ in length.
    Here both steps are forced: they add nothing to the score of a beam. The
    best one has the highest score / length ** length_penalty.

    Args:
        num_beams: int. Defaults to `10`.
        length_penalty: float. Defaults to `0.8`.
    """

    def __init__(self, num_beams=10, length_penalty=0.8):
        super().__init__(num_beams, return_all_beams=True)
        self.length_penalty = length_penalty

    def __call__(
        self,
        next,
        prompt,
        cache=None,
        index=0,
        mask=None,
        stop_token_ids=None,
        hidden_states=None,
        model=None,
    ):
        (end,) = stop_token_ids
        given = ops.cast(mask, "bool")
        given_beams = ops.repeat(given, self.num_beams, axis=0)

        def forced_next(tokens, cache, index):
            logits, hidden, cache = next(tokens, cache, index)
            is_end = ops.logical_and(tokens == end, ~given_beams)
            forced = ops.where(ops.any(is_end, axis=-1), end, -1)
            forced = ops.where(given_beams[:, index], tokens[:, index], forced)
            forced = ops.expand_dims(forced, -1)
            only = ops.where(ops.arange(logits.shape[-1]) == forced, 0.0, -1e9)
            only = ops.cast(only, logits.dtype)
            return ops.where(forced >= 0, only, logits), hidden, cache

        beams, scores = super().__call__(
            forced_next,
            prompt,
            cache=cache,
            index=index,
            mask=mask,
            stop_token_ids=stop_token_ids,
            hidden_states=hidden_states,
            model=model,
        )
        new = ops.expand_dims(~given, 1)
        ends = ops.cast(ops.logical_and(beams == end, new), "int32")
        before_end = ops.logical_and(ops.cumsum(ends, axis=-1) == 0, new)
        length = ops.sum(ops.cast(before_end, "float32"), axis=-1) + 1.0
        best = ops.argmax(scores / length**self.length_penalty, axis=-1)
        best = ops.expand_dims(ops.expand_dims(best, -1), -1)
        return ops.squeeze(ops.take_along_axis(beams, best, axis=1), axis=1)

    def get_config(self):
        config = super().get_config()
        del config["return_all_beams"]
        return {**config, "length_penalty": self.length_penalty}
