"""The families of causal language models that PEFT adapters fit."""

from keras_dylora.adapters.peft.layout import (
    LAYER,
    Blocks,
    Layout,
    attention,
    feedforward,
    fused,
    rows,
    stack,
)


def opt(keras):
    """The layers of the blocks of OPT and BART."""
    names = "q_proj k_proj v_proj out_proj"
    names = " ".join(f"self_attn.{x}" for x in names.split())
    return attention(keras, names) | feedforward("fc1", "fc2")


_PROJECTIONS = (
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
)

_LLAMA = attention("self_attention", _PROJECTIONS) | {
    "mlp.gate_proj": ("feedforward_gate_dense",),
    **feedforward("mlp.up_proj", "mlp.down_proj"),
}

_LINEAR_ATTENTION = {
    f"linear_attn.{name}": (f"linear_attn/{name}",)
    for name in (
        "in_proj_qkv",
        "in_proj_z",
        "in_proj_b",
        "in_proj_a",
        "out_proj",
    )
}

_GEMMA = attention("attention", _PROJECTIONS) | {
    "mlp.gate_proj": ("ffw_gating",),
    "mlp.up_proj": ("ffw_gating_2",),
    "mlp.down_proj": ("ffw_linear",),
}


def _decoder(family, linear, keras=LAYER, optional=(), outside=None, **task):
    """The rows of a decoder like Llama, by the name of its family.

    `optional` names layers that not every block has, and `outside` has layers
    outside of the blocks that not every model has.
    """
    backbone = f"{family}Backbone"
    blocks = Blocks("layers.{}", keras, linear, optional=optional)
    bare = Layout(
        backbone, (blocks,), optional=outside or {}, embedding="embed_tokens"
    )
    return rows(bare, f"{family}CausalLM", "model.", "CAUSAL_LM", **task)


def _holders(family, held_from):
    """Arguments for a decoder that is published within a class for images."""
    return {
        "architectures": {
            f"{family}ForCausalLM": "model.",
            f"{family}ForConditionalGeneration": "model.language_model.",
        },
        "held_from": held_from,
    }


DECODERS = {
    **rows(
        stack(
            "GPT2Backbone",
            {
                "attn.c_attn": fused("self_attention", "query", "key", "value"),
                "attn.c_proj": ("self_attention/attention_output",),
                **feedforward("mlp.c_fc", "mlp.c_proj"),
            },
            name="h.{}",
            transposed=True,
            embedding="wte",
        ),
        "GPT2CausalLM",
        "transformer.",
        "CAUSAL_LM",
    ),
    **_decoder("Llama", _LLAMA),  # and Llama 3, a subclass
    **_decoder("Mistral", _LLAMA),
    **_decoder("Mixtral", attention("self_attention", _PROJECTIONS)),
    **_decoder("Qwen", _LLAMA),  # Qwen 2 and 2.5
    **_decoder("Qwen3", _LLAMA),
    **_decoder("Gemma", _GEMMA, "decoder_block_{}"),  # 1 and 2
    **_decoder(
        "Gemma3",
        _GEMMA,
        "decoder_block_{}",
        **_holders("Gemma3", 2560),  # that of 4B
    ),
    **_decoder(
        "Gemma4",
        _GEMMA
        | {
            "per_layer_input_gate": ("per_layer_input_gate",),
            "per_layer_projection": ("per_layer_up_proj",),
        },
        "decoder_block_{}",
        # Some blocks take keys or values from others.
        optional=(
            "self_attn.k_proj",
            "self_attn.v_proj",
            "per_layer_input_gate",
            "per_layer_projection",
        ),
        outside={"per_layer_model_projection": ("per_layer_model_projection",)},
        **_holders("Gemma4", 1),
    ),
    **_decoder(
        "Qwen3_5",
        _LLAMA | _LINEAR_ATTENTION,
        # A block has one of both.
        optional=(*_PROJECTIONS.split(), *_LINEAR_ATTENTION),
        **_holders("Qwen3_5", 1),
    ),
    **_decoder(
        "Phi3",
        {
            "self_attn.qkv_proj": fused("attention", "query", "key", "value"),
            "self_attn.o_proj": ("attention/attention_output",),
            "mlp.gate_up_proj": (
                "feedforward_gate_dense",
                "feedforward_intermediate_dense",
            ),
            "mlp.down_proj": ("feedforward_output_dense",),
        },
    ),
    **_decoder(
        "SmolLM3",
        {
            "self_attn.q_proj": ("self_attn/q_proj",),
            "self_attn.k_proj": ("self_attn/k_proj",),
            "self_attn.v_proj": ("self_attn/v_proj",),
            "self_attn.o_proj": ("/o_proj",),
            "mlp.gate_proj": ("mlp/gate_proj",),
            "mlp.up_proj": ("mlp/up_proj",),
            "mlp.down_proj": ("mlp/down_proj",),
        },
    ),
    **rows(
        stack("OPTBackbone", opt("self_attention"), name="decoder.layers.{}"),
        "OPTCausalLM",
        "model.",
        "CAUSAL_LM",
    ),
    **rows(
        stack(
            "BloomBackbone",
            {
                "self_attention.query_key_value": fused(
                    "self_attention", "query_dense", "key_dense", "value_dense"
                ),
                "self_attention.dense": ("self_attention/output_dense",),
                "mlp.dense_h_to_4h": ("mlp_intermediate_dense",),
                "mlp.dense_4h_to_h": ("mlp_output_dense",),
            },
            name="h.{}",
            interleaved=True,
        ),
        "BloomCausalLM",
        "transformer.",
        "CAUSAL_LM",
    ),
    **rows(
        stack(
            "FalconBackbone",  # as falcon-rw, a key and value for each head
            {
                "self_attention.query_key_value": fused(
                    "attention", "query_dense", "key_dense", "value_dense"
                ),
                "self_attention.dense": ("attention/output_dense",),
                "mlp.dense_h_to_4h": ("dense_h_to_4h",),
                "mlp.dense_4h_to_h": ("dense_4h_to_h",),
            },
            name="h.{}",
            interleaved=True,
        ),
        "FalconCausalLM",
        "transformer.",
        "CAUSAL_LM",
    ),
    **rows(
        stack(
            "GPTNeoXBackbone",  # fused in Keras too, in the same order
            {
                "attention.query_key_value": (
                    "self_attention/query_key_value",
                ),
                "attention.dense": ("self_attention/attention_output",),
                **feedforward("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
            },
            name="layers.{}",
        ),
        "GPTNeoXCausalLM",
        "gpt_neox.",
        "CAUSAL_LM",
    ),
}
