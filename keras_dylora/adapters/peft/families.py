"""The model families that PEFT adapters fit: one row each."""

from keras_dylora.adapters.peft.images import IMAGES
from keras_dylora.adapters.peft.layout import (
    LAYER,
    Blocks,
    Layout,
    attention,
    feedforward,
    fused,
    head,
    rows,
    stack,
    takes_more_than_text,
)


def layout_of(model):
    """Returns the `Layout` of a KerasHub model, or raises a `ValueError`."""
    names = _class_names(model)
    body = getattr(model, "backbone", model)
    backbone = _class_names(body)
    for name, layout in LAYOUTS.items():
        # Both must match, as another model may reuse the class of a task.
        if name in names and layout.backbone in backbone:
            if takes_more_than_text(body) and not layout.architectures:
                raise ValueError(
                    "PEFT adapters can be exchanged for models of one kind of "
                    f"input. Received: a {type(body).__name__}, which also "
                    "takes images or sounds"
                )
            layout.check_variant(model)
            return layout
    raise ValueError(
        "PEFT adapters can be exchanged for the KerasHub models "
        f"{sorted(LAYOUTS)} and their subclasses; another family needs a row "
        "in keras_dylora/adapters/peft/families.py. "
        f"Received: a {type(model).__name__}"
    )


def _class_names(instance):
    return {cls.__name__ for cls in type(instance).__mro__}


_BERT = attention(
    "self_attention_layer",
    "attention.self.query attention.self.key attention.self.value "
    "attention.output.dense",
) | feedforward("intermediate.dense", "output.dense")


# Arguments for the embedding of tokens.
_WORDS = {"embedding": "embeddings.word_embeddings"}
_TOKENS = {"embedding": "embed_tokens"}


def _opt(keras):
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


def _t5(keras, number, name):
    names = " ".join(f"layer.{number}.{name}.{x}" for x in "qkvo")
    return attention(
        keras,
        names,
        "query_projector key_projector value_projector output_projector",
    )


def _t5_blocks(half, attention, number):
    """Blocks of T5: with the gated layers of 1.1 and Flan, or without."""
    name = f"layer.{number}.DenseReluDense"
    gated = {
        f"{name}.wi_0": ("input_projector",),
        f"{name}.wi_1": ("gate_projector",),
        f"{name}.wo": ("output_projector",),
    }
    ungated = {
        f"{name}.wi": ("input_projector",),
        f"{name}.wo": ("output_projector",),
    }
    return Blocks(
        f"{half}.block.{{}}",
        f"transformer_{half}_layer_{{}}",
        attention | gated,
        ungated=attention | ungated,
    )


def _decoder(family, linear, keras=LAYER, optional=(), outside=None, **task):
    """The rows of a decoder like Llama, by the name of its family.

    `optional` names layers that not every block has, and `outside` has layers
    outside of the blocks that not every model has.
    """
    backbone = f"{family}Backbone"
    blocks = Blocks("layers.{}", keras, linear, optional=optional)
    bare = Layout(backbone, (blocks,), optional=outside or {}, **_TOKENS)
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


def _roberta(family):
    return rows(
        stack(f"{family}Backbone", _BERT, **_WORDS),
        f"{family}TextClassifier",
        "roberta.",
        "SEQ_CLS",
        head("classifier.dense classifier.out_proj", "pooled_dense logits"),
    )


LAYOUTS = {
    **_roberta("Roberta"),
    **_roberta("XLMRoberta"),
    **rows(
        stack(
            "BertBackbone",
            _BERT,
            outside={"pooler.dense": ("pooled_dense",)},
            **_WORDS,
        ),
        "BertTextClassifier",
        "bert.",
        "SEQ_CLS",
        head("classifier", "logits"),
    ),
    **rows(
        stack(
            "DistilBertBackbone",
            attention(
                "self_attention_layer",
                "attention.q_lin attention.k_lin attention.v_lin "
                "attention.out_lin",
            )
            | feedforward("ffn.lin1", "ffn.lin2"),
            name="transformer.layer.{}",
            **_WORDS,
        ),
        "DistilBertTextClassifier",
        "distilbert.",
        "SEQ_CLS",
        head("pre_classifier classifier", "pooled_dense logits"),
    ),
    **rows(
        stack(
            "AlbertBackbone",
            attention(
                "self_attention_layer",
                "attention.query attention.key attention.value attention.dense",
            )
            | feedforward("ffn", "ffn_output"),
            keras="group_{}_inner_layer_0",
            name="encoder.albert_layer_groups.{}.albert_layers.0",
            outside={
                "encoder.embedding_hidden_mapping_in": (
                    "embedding_projection",
                ),
                "pooler": ("pooled_dense",),
            },
        ),
        "AlbertTextClassifier",
        "albert.",
        "SEQ_CLS",
        head("classifier", "logits"),
    ),
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
        stack("OPTBackbone", _opt("self_attention"), name="decoder.layers.{}"),
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
    **rows(
        stack(
            "DebertaV3Backbone",
            attention(
                "self_attention_layer",
                "attention.self.query_proj attention.self.key_proj "
                "attention.self.value_proj attention.output.dense",
            )
            | feedforward("intermediate.dense", "output.dense"),
            keras="disentangled_attention_encoder_layer_{}",
        ),
        "DebertaV3TextClassifier",
        "deberta.",
        "SEQ_CLS",
        head("pooler.dense classifier", "pooled_dense logits"),
    ),
    "ElectraBackbone": stack(
        "ElectraBackbone",
        _BERT,
        outside={"embeddings_project": ("embeddings_projection",)},
    ),
    **rows(
        Layout(
            "T5Backbone",
            (
                _t5_blocks(
                    "encoder",
                    _t5("self_attention", 0, "SelfAttention"),
                    1,
                ),
                _t5_blocks(
                    "decoder",
                    _t5("self_attention", 0, "SelfAttention")
                    | _t5("cross_attention", 1, "EncDecAttention"),
                    2,
                ),
            ),
        ),
        "T5Seq2SeqLM",
        "",
        "SEQ_2_SEQ_LM",
    ),
    **rows(
        Layout(
            "BartBackbone",
            (
                Blocks(
                    "encoder.layers.{}",
                    "transformer_encoder_layer_{}",
                    _opt("self_attention_layer"),
                ),
                Blocks(
                    "decoder.layers.{}",
                    "transformer_decoder_layer_{}",
                    _opt("self_attention")
                    | attention(
                        "cross_attention",
                        "encoder_attn.q_proj encoder_attn.k_proj "
                        "encoder_attn.v_proj encoder_attn.out_proj",
                    ),
                ),
            ),
        ),
        "BartSeq2SeqLM",
        "model.",
        "SEQ_2_SEQ_LM",
    ),
    **IMAGES,
}
