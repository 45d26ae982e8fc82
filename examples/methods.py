"""What the examples compare: each method as the config of a run."""

import keras_dylora as kd

# Fixed-rank LoRA. Below its rank it is cut off: as its columns come, at
# `alpha / b`, or in the order of their singular values, at its own scale.
FIXED = ("lora", "lora-svd")
FIELDS = {
    "dylora": {},
    "dylora-frozen": {"frozen": True},
    "lora": {},
    "lora-svd": {},
    "summed": {"objective": "summed"},
    "matryoshka": {"objective": "matryoshka", "scaling": "sqrt"},
}
METHODS = (*FIELDS, "progressive")
# The share of the steps of a progressive run that is at the maximum rank.
FULL_RANK_SHARE = 0.5


def config(method, steps, rank, alpha, **fields):
    """The `DyLoRAConfig` of a run.

    Args:
        method: str. One of `METHODS`.
        steps: int. Steps in all.
        rank: int. The maximum.
        alpha: float. The scale of the maximum rank is `alpha / rank`.
        **fields: further fields of the config.
    """
    fields = {"rank": rank, "alpha": alpha, **fields}
    if method == "progressive":
        full = round(FULL_RANK_SHARE * steps)
        return kd.DyLoRAConfig.progressive(full, **fields)
    if method in FIXED:
        fields["min_rank"] = rank
    if method == "matryoshka":
        # Its paper's ranks and scales, of which that of the maximum is ours.
        ranks = {2**i: 1 for i in range(rank.bit_length())} | {rank: 1}
        fields["rank_distribution"] = kd.Categorical(ranks)
        fields["alpha"] = alpha / rank**0.5
    return kd.DyLoRAConfig(**{**fields, **FIELDS[method]})


def described(method):
    """What a kept run must agree in, besides the name of its method."""
    return {
        "progressive": {"full_rank_share": FULL_RANK_SHARE},
        "matryoshka": {"gate": "sum"},  # 0.1.0 had the mean
    }.get(method, {})


def finish(model, method):
    """What a method does after the training."""
    if method == "lora-svd":
        kd.order_ranks(model)
