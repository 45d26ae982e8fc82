"""The model families that PEFT adapters fit: one row each."""

from keras_dylora.adapters.peft.decoders import DECODERS, opt
from keras_dylora.adapters.peft.images import IMAGES
from keras_dylora.adapters.peft.layout import (
    Blocks,
    Layout,
    attention,
    feedforward,
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


# The argument for the embedding of tokens.
_WORDS = {"embedding": "embeddings.word_embeddings"}


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
                    opt("self_attention_layer"),
                ),
                Blocks(
                    "decoder.layers.{}",
                    "transformer_decoder_layer_{}",
                    opt("self_attention")
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
    **DECODERS,
    **IMAGES,
}
