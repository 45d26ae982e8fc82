"""The families of PEFT's format: a transformers model of each, and its twin."""

from tests.models import VOCABULARY
from tests.peft.making import (
    DECODER,
    ENCODER_NORMS,
    LAYER,
    LENGTH,
    SIZES,
    by_hand,
    classifier,
    norms,
    of,
    resnet,
    t5,
    task,
)
from tests.peft.twins import ENCODER

FAMILIES = {
    "xlm-roberta": (
        of(
            "XLMRobertaForSequenceClassification",
            "XLMRobertaConfig",
            **ENCODER,
            max_position_embeddings=14,
            layer_norm_eps=1e-5,
        ),
        classifier(
            "XLMRobertaTextClassifier",
            "XLMRobertaBackbone",
            {
                "pooled_dense": "classifier.dense",
                "logits": "classifier.out_proj",
            },
        ),
    ),
    "distilbert": (
        of(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            vocab_size=VOCABULARY,
            dim=16,
            hidden_dim=24,
            n_layers=2,
            n_heads=2,
            max_position_embeddings=2 * LENGTH,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
            num_labels=3,
            sinusoidal_pos_embds=False,
        ),
        classifier(
            "DistilBertTextClassifier",
            "DistilBertBackbone",
            {"pooled_dense": "pre_classifier", "logits": "classifier"},
        ),
    ),
    "albert": (
        of(
            "AlbertForSequenceClassification",
            "AlbertConfig",
            **ENCODER,
            embedding_size=8,
            max_position_embeddings=2 * LENGTH,
            hidden_act="gelu_pytorch_tanh",
        ),
        classifier(
            "AlbertTextClassifier", "AlbertBackbone", {"logits": "classifier"}
        ),
    ),
    "mistral": (
        of("MistralForCausalLM", "MistralConfig", **DECODER),
        task("MistralCausalLM"),
    ),
    "mixtral": (
        of(
            "MixtralForCausalLM",
            "MixtralConfig",
            **DECODER,
            num_local_experts=2,
        ),
        task("MixtralCausalLM"),
    ),
    "qwen2": (
        of("Qwen2ForCausalLM", "Qwen2Config", **DECODER),
        task("QwenCausalLM"),
    ),
    "qwen3": (
        of(
            "Qwen3ForCausalLM",
            "Qwen3Config",
            **DECODER,
            head_dim=4,
            rms_norm_eps=1e-5,
        ),
        task("Qwen3CausalLM"),
    ),
    "gemma": (
        of(
            "GemmaForCausalLM",
            "GemmaConfig",
            **{**DECODER, "tie_word_embeddings": True},
            head_dim=4,
        ),
        task("GemmaCausalLM"),
    ),
    "gemma2": (
        of(
            "Gemma2ForCausalLM",
            "Gemma2Config",
            **{**DECODER, "tie_word_embeddings": True},
            head_dim=4,
            query_pre_attn_scalar=4,
        ),
        task("GemmaCausalLM"),
    ),
    "gemma3": (
        of(
            "Gemma3ForCausalLM",
            "Gemma3TextConfig",
            **{**DECODER, "tie_word_embeddings": True},
            head_dim=4,
            query_pre_attn_scalar=4,
        ),
        task("Gemma3CausalLM"),
    ),
    "smollm3": (
        of(
            "SmolLM3ForCausalLM",
            "SmolLM3Config",
            **{**DECODER, "tie_word_embeddings": True},
        ),
        task("SmolLM3CausalLM"),
    ),
    "phi3": (
        of("Phi3ForCausalLM", "Phi3Config", **DECODER),
        by_hand(
            "Phi3CausalLM",
            "Phi3Backbone",
            {
                "token_embedding/embeddings": "model.embed_tokens.weight",
                "token_embedding/reverse_embeddings": "lm_head.weight",
                **norms(
                    {
                        f"{LAYER}/pre_attention_layernorm": (
                            "model.layers.{}.input_layernorm"
                        ),
                        f"{LAYER}/post_attention_layernorm": (
                            "model.layers.{}.post_attention_layernorm"
                        ),
                        "sequence_output_layernorm": "model.norm",
                    },
                    "scale",
                ),
            },
            vocabulary_size=VOCABULARY,
            num_query_heads=4,
            num_key_value_heads=2,
            layer_norm_epsilon=1e-5,
        ),
    ),
    "opt": (
        of(
            "OPTForCausalLM",
            "OPTConfig",
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=24,
            word_embed_proj_dim=16,
            max_position_embeddings=2 * LENGTH,
            dropout=0.0,
        ),
        by_hand(
            "OPTCausalLM",
            "OPTBackbone",
            {
                "embeddings/token_embedding/embeddings": (
                    "model.decoder.embed_tokens.weight"
                ),
                "embeddings/position_embedding/embeddings": (
                    "model.decoder.embed_positions.weight"
                ),
                **norms(
                    {
                        f"{LAYER}/self_attention_layer_norm": (
                            "model.decoder.layers.{}.self_attn_layer_norm"
                        ),
                        f"{LAYER}/feedforward_layer_norm": (
                            "model.decoder.layers.{}.final_layer_norm"
                        ),
                        "layer_norm": "model.decoder.final_layer_norm",
                    }
                ),
            },
            vocabulary_size=VOCABULARY,
            num_heads=2,
            max_sequence_length=2 * LENGTH,
        ),
    ),
    "bloom": (
        of(
            "BloomForCausalLM",
            "BloomConfig",
            vocab_size=VOCABULARY,
            hidden_size=16,
            n_layer=2,
            n_head=2,
        ),
        by_hand(
            "BloomCausalLM",
            "BloomBackbone",
            {
                "token_embedding/embeddings": (
                    "transformer.word_embeddings.weight"
                ),
                **norms(
                    {
                        "embedding_layernorm": (
                            "transformer.word_embeddings_layernorm"
                        ),
                        f"{LAYER}/pre_attention_layernorm": (
                            "transformer.h.{}.input_layernorm"
                        ),
                        f"{LAYER}/post_attention_layernorm": (
                            "transformer.h.{}.post_attention_layernorm"
                        ),
                        "final_layernorm": "transformer.ln_f",
                    }
                ),
            },
            vocabulary_size=VOCABULARY,
            num_heads=2,
            intermediate_dim=64,
        ),
    ),
    "falcon": (
        of(
            "FalconForCausalLM",
            "FalconConfig",
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_hidden_size=24,
            multi_query=False,
            parallel_attn=False,
            alibi=True,
            bias=True,
        ),
        by_hand(
            "FalconCausalLM",
            "FalconBackbone",
            {
                "token_embedding/embeddings": (
                    "transformer.word_embeddings.weight"
                ),
                **norms(
                    {
                        f"{LAYER}/input_layernorm": (
                            "transformer.h.{}.input_layernorm"
                        ),
                        f"{LAYER}/post_attention_layernorm": (
                            "transformer.h.{}.post_attention_layernorm"
                        ),
                        "final_layernorm": "transformer.ln_f",
                    }
                ),
            },
            vocabulary_size=VOCABULARY,
            num_attention_heads=2,
        ),
    ),
    "gpt-neox": (
        of(
            "GPTNeoXForCausalLM",
            "GPTNeoXConfig",
            **SIZES,
            num_attention_heads=2,
            max_position_embeddings=2 * LENGTH,
            tie_word_embeddings=True,
            hidden_act="gelu_pytorch_tanh",
        ),
        by_hand(
            "GPTNeoXCausalLM",
            "GPTNeoXBackbone",
            {
                "token_embedding/embeddings": "gpt_neox.embed_in.weight",
                **norms(
                    {
                        f"{LAYER}/self_attention_layer_norm": (
                            "gpt_neox.layers.{}.input_layernorm"
                        ),
                        f"{LAYER}/feedforward_layer_norm": (
                            "gpt_neox.layers.{}.post_attention_layernorm"
                        ),
                        "layer_norm": "gpt_neox.final_layer_norm",
                    }
                ),
            },
            vocabulary_size=VOCABULARY,
            num_heads=2,
        ),
    ),
    "electra": (
        of(
            "ElectraModel",
            "ElectraConfig",
            **ENCODER,
            embedding_size=8,
            max_position_embeddings=2 * LENGTH,
            hidden_act="gelu_pytorch_tanh",
        ),
        by_hand(
            "ElectraBackbone",
            "ElectraBackbone",
            {
                "token_embedding/embeddings": (
                    "embeddings.word_embeddings.weight"
                ),
                "position_embedding/embeddings": (
                    "embeddings.position_embeddings.weight"
                ),
                "segment_embedding/embeddings": (
                    "embeddings.token_type_embeddings.weight"
                ),
                **norms(
                    {
                        "embeddings_layer_norm": "embeddings.LayerNorm",
                        **ENCODER_NORMS,
                    }
                ),
            },
            vocab_size=VOCABULARY,
            num_heads=2,
            embedding_dim=8,
            max_sequence_length=2 * LENGTH,
        ),
    ),
    "deberta-v3": (
        of(
            "DebertaV2ForSequenceClassification",
            "DebertaV2Config",
            **ENCODER,
            # KerasHub rounds the last distance otherwise on TensorFlow.
            max_position_embeddings=2 * LENGTH,
            relative_attention=True,
            position_buckets=4,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            position_biased_input=False,
            type_vocab_size=0,
            pooler_dropout=0.0,
            pooler_hidden_size=16,
            layer_norm_eps=1e-7,
        ),
        by_hand(
            "DebertaV3TextClassifier",
            "DebertaV3Backbone",
            {
                "token_embedding/embeddings": (
                    "deberta.embeddings.word_embeddings.weight"
                ),
                "rel_embedding/rel_embedding": (
                    "deberta.encoder.rel_embeddings.weight"
                ),
                **norms(
                    {
                        "embeddings_layer_norm": "deberta.embeddings.LayerNorm",
                        "rel_embedding/rel_embeddings_layer_norm": (
                            "deberta.encoder.LayerNorm"
                        ),
                        **{
                            f"disentangled_attention_encoder_{ours[12:]}": (
                                f"deberta.{name}"
                            )
                            for ours, name in ENCODER_NORMS.items()
                        },
                    }
                ),
                "pooled_dense/kernel": "pooler.dense.weight",
                "pooled_dense/bias": "pooler.dense.bias",
                "logits/kernel": "classifier.weight",
                "logits/bias": "classifier.bias",
            },
            vocabulary_size=VOCABULARY,
            num_heads=2,
            max_sequence_length=2 * LENGTH,
            bucket_size=4,
        ),
    ),
    "t5": t5(gated=False),
    "t5-gated": t5(gated=True),
    "bart": (
        of(
            "BartForConditionalGeneration",
            "BartConfig",
            vocab_size=VOCABULARY,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=2 * LENGTH,
            dropout=0.0,
        ),
        task("BartSeq2SeqLM"),
    ),
    "vit": (
        of(
            "ViTForImageClassification",
            "ViTConfig",
            **{k: v for k, v in ENCODER.items() if k != "vocab_size"},
            image_size=32,
            patch_size=8,
        ),
        classifier(
            "ViTImageClassifier", "ViTBackbone", {"predictions": "classifier"}
        ),
    ),
    "resnet-basic": resnet("basic", [64, 8]),
    "resnet-bottleneck": resnet("bottleneck", [256, 32]),
}
