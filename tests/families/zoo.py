"""A tiny model of each of KerasHub's model families, with inputs."""

import dataclasses
from collections.abc import Callable
from functools import partial

import keras
import numpy as np
from keras_hub import models as hub
from keras_hub.layers import (
    SAM3DetrDecoder,
    SAM3DetrEncoder,
    SAM3GeometryEncoder,
    SAM3MaskDecoder,
    SAM3TextEncoder,
    SAM3VisionEncoder,
    SAMMaskDecoder,
    SAMPromptEncoder,
)
from keras_hub.src.models.vae.vae_backbone import VAEBackbone

BATCH = 4
LENGTH = 8
VOCABULARY = 97


def numbers(*shape):
    """Images, audio: a batch of what isn't text."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(BATCH, *shape)).astype("float32")


def text(*names, length=LENGTH):
    """The named inputs of a batch of texts.

    Each has padding, which generate() fills.
    """
    rng = np.random.default_rng(0)
    lengths = rng.integers(length - 3, length, BATCH)
    mask = np.arange(length) < lengths[:, None]
    ids = rng.integers(1, VOCABULARY, (BATCH, length)) * mask
    batch = {
        "token_ids": ids.astype("int32"),
        "padding_mask": mask.astype("int32"),
        # The second half of each text is its response.
        "response_mask": np.where(np.arange(length) < length // 2, 0, mask),
        "segment_ids": rng.integers(0, 2, (BATCH, length)).astype("int32"),
        "position_ids": np.tile(np.arange(length, dtype="int32"), (BATCH, 1)),
        "mask_positions": np.tile(np.int32([0, 2]), (BATCH, 1)),
    }
    # Places 1 to 4 of each text are those of an image.
    batch["vision_indices"] = np.tile(np.int32([1, 2, 3, 4]), (BATCH, 1))
    batch["vision_mask"] = np.tile(
        np.int32((np.arange(length) >= 1) & (np.arange(length) <= 4)),
        (BATCH, 1),
    )
    return {name: batch[name] for name in names}


TOKENS = partial(text, "token_ids", "padding_mask")
SEGMENTS = partial(text, "token_ids", "padding_mask", "segment_ids")


def pairs_of_texts():
    """Texts for an encoder, and for a decoder."""
    batch = text("token_ids", "padding_mask")
    return {
        "encoder_token_ids": batch["token_ids"],
        "encoder_padding_mask": batch["padding_mask"],
        "decoder_token_ids": batch["token_ids"][::-1].copy(),
        "decoder_padding_mask": batch["padding_mask"][::-1].copy(),
    }


# Encoders of text.

SIZES = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 2,
    "hidden_dim": 16,
    "intermediate_dim": 24,
}


def text_backbone(cls, **kwargs):
    return cls(**{**SIZES, "num_heads": 2, "dropout": 0.0, **kwargs})


def text_classifier(cls, backbone_cls, **kwargs):
    backbone = text_backbone(backbone_cls, **kwargs)
    return cls(backbone, num_classes=3, preprocessor=None, dropout=0.0)


def text_model(cls, backbone_cls, **kwargs):
    """A task that has no arguments of its own."""
    return cls(text_backbone(backbone_cls, **kwargs), preprocessor=None)


def f_net():
    backbone = hub.FNetBackbone(**SIZES, dropout=0.0)
    return hub.FNetTextClassifier(
        backbone, num_classes=3, preprocessor=None, dropout=0.0
    )


def electra():
    return hub.ElectraBackbone(
        vocab_size=VOCABULARY,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        embedding_dim=8,
        intermediate_dim=24,
        dropout=0.0,
    )


# Causal language models.


def causal_lm(cls, backbone_cls, **kwargs):
    return cls(backbone=backbone_cls(**SIZES, **kwargs), preprocessor=None)


HEADS = {"num_heads": 2}
GROUPED_HEADS = {"num_query_heads": 4, "num_key_value_heads": 2}


# Linear attention in the first layer, attention in the second.
LINEAR_ATTENTION = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}


def gemma3n():
    backbone = hub.Gemma3nBackbone(
        text_vocab_size=VOCABULARY,
        text_hidden_size=16,
        num_hidden_layers=2,
        pad_token_id=0,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        intermediate_size=[24, 24],
        hidden_activation="gelu_approximate",
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=4,
        rope_theta=10000.0,
        max_position_embeddings=2 * LENGTH,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=4,
        altup_num_inputs=2,
        laurel_rank=2,
        # Its scale starts at zero, which no gradient passes.
        altup_correct_scale=False,
    )
    return hub.Gemma3nCausalLM(backbone=backbone, preprocessor=None)


def qwen3_5_moe():
    backbone = hub.Qwen3_5MoeBackbone(
        vocabulary_size=VOCABULARY,
        num_layers=2,
        hidden_dim=16,
        **GROUPED_HEADS,
        **LINEAR_ATTENTION,
        moe_intermediate_dim=8,
        shared_expert_intermediate_size=8,
        num_experts=2,
        top_k=1,
    )
    return hub.Qwen3_5MoeCausalLM(backbone, preprocessor=None)


def rwkv7():
    backbone = hub.RWKV7Backbone(
        hidden_size=16,
        head_size=4,
        num_layers=2,
        vocabulary_size=VOCABULARY,
        intermediate_dim=24,
        gate_lora=4,
        mv_lora=4,
        aaa_lora=4,
        decay_lora=4,
    )
    return hub.RWKV7CausalLM(backbone, preprocessor=None)


def smollm3():
    backbone = hub.SmolLM3Backbone(
        **SIZES,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=False,
        attention_dropout=0.0,
        rope_layer_enabled_list=[True, False],
        layer_types=["attention", "attention"],
        mlp_bias=False,
        layer_norm_epsilon=1e-5,
        max_position_embeddings=2 * LENGTH,
        rope_theta=10000.0,
        partial_rotary_factor=1.0,
    )
    return hub.SmolLM3CausalLM(backbone, preprocessor=None)


# Encoders and decoders of text.


def edrec():
    backbone = hub.EdRecBackbone(
        vocab_size=VOCABULARY,
        num_layers_enc=2,
        num_layers_dec=2,
        hidden_dim=16,
        intermediate_dim=24,
        num_heads=2,
    )
    return hub.EdRecSeq2SeqLM(backbone, preprocessor=None)


def t5gemma(cls, backbone_cls):
    backbone = backbone_cls(
        vocabulary_size=VOCABULARY,
        encoder_hidden_dim=16,
        encoder_intermediate_dim=24,
        encoder_num_layers=2,
        encoder_num_attention_heads=4,
        encoder_num_key_value_heads=2,
        encoder_head_dim=4,
        encoder_layer_types=["sliding_attention", "full_attention"],
        decoder_hidden_dim=16,
        decoder_intermediate_dim=24,
        decoder_num_layers=2,
        decoder_num_attention_heads=4,
        decoder_num_key_value_heads=2,
        decoder_head_dim=4,
        decoder_layer_types=["sliding_attention", "full_attention"],
        sliding_window=4,
        cross_attention_hidden_size=16,
    )
    return cls(backbone, preprocessor=None)


# Audio in, text out.


def moonshine():
    backbone = hub.MoonshineBackbone(
        vocabulary_size=VOCABULARY,
        filter_dim=16,
        encoder_num_layers=2,
        decoder_num_layers=2,
        hidden_dim=16,
        intermediate_dim=24,
        encoder_num_heads=2,
        decoder_num_heads=2,
    )
    return hub.MoonshineAudioToText(backbone, preprocessor=None)


def audio_with_text():
    batch = text("token_ids", "padding_mask")
    return {
        "encoder_input_values": numbers(1600, 1),
        "encoder_padding_mask": np.ones((BATCH, 1600), "bool"),
        "decoder_token_ids": batch["token_ids"],
        "decoder_padding_mask": batch["padding_mask"].astype("bool"),
    }


def spectra_with_text():
    batch = text("token_ids", "padding_mask")
    return {
        "encoder_features": numbers(2 * LENGTH, 8),
        "decoder_token_ids": batch["token_ids"],
        "decoder_padding_mask": batch["padding_mask"],
    }


# Images in.

IMAGE = (32, 32, 3)
IMAGES = partial(numbers, *IMAGE)


def image_classifier(cls, backbone_cls, head=None, **kwargs):
    """`head` are arguments of the task, `kwargs` of its backbone."""
    return cls(
        backbone=backbone_cls(image_shape=IMAGE, **kwargs),
        num_classes=3,
        preprocessor=None,
        **head or {},
    )


VIT = {"patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16}


def dinov2(**kwargs):
    return hub.DINOV2Backbone(
        **VIT,
        intermediate_dim=24,
        image_shape=IMAGE,
        position_embedding_shape=IMAGE,
        **kwargs,
    )


def depth_anything():
    backbone = hub.DepthAnythingBackbone(
        image_encoder=dinov2(apply_layernorm=True),
        reassemble_factors=[2, 1],
        neck_hidden_dims=[8, 16],
        fusion_hidden_dim=8,
        head_hidden_dim=8,
        head_in_index=-1,
        feature_keys=["stage1", "stage2"],
    )
    return hub.DepthAnythingDepthEstimator(
        backbone, depth_estimation_type="relative", preprocessor=None
    )


def vit_det():
    return hub.ViTDetBackbone(
        hidden_size=16,
        num_layers=2,
        intermediate_dim=24,
        num_heads=2,
        global_attention_layer_indices=[1],
        image_shape=IMAGE,
        patch_size=8,
        num_output_channels=8,
        window_size=2,
    )


def mit():
    return hub.MiTBackbone(
        layerwise_depths=[1, 1],
        num_layers=2,
        layerwise_num_heads=[1, 2],
        layerwise_sr_ratios=[2, 1],
        max_drop_path_rate=0.0,
        layerwise_patch_sizes=[7, 3],
        layerwise_strides=[4, 2],
        image_shape=IMAGE,
        hidden_dims=[8, 16],
    )


def mit_classifier():
    return hub.MiTImageClassifier(mit(), num_classes=3, preprocessor=None)


def segformer():
    backbone = hub.SegFormerBackbone(mit(), projection_filters=16)
    return hub.SegFormerImageSegmenter(
        backbone, num_classes=3, preprocessor=None
    )


def resnet():
    return hub.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64, 8],
        stackwise_num_blocks=[1, 1],
        stackwise_num_strides=[1, 2],
        block_type="basic_block",
        image_shape=IMAGE,
    )


def resnet_classifier():
    return hub.ResNetImageClassifier(resnet(), num_classes=3, preprocessor=None)


def deeplab_v3():
    backbone = hub.DeepLabV3Backbone(
        image_encoder=resnet(),
        spatial_pyramid_pooling_key="P3",
        upsampling_size=2,
        dilation_rates=[2],
        low_level_feature_key="P2",
        projection_filters=8,
        image_shape=IMAGE,
    )
    return hub.DeepLabV3ImageSegmenter(
        backbone, num_classes=3, preprocessor=None
    )


def retinanet():
    return hub.RetinaNetBackbone(
        image_encoder=resnet(),
        min_level=2,
        max_level=3,
        use_p5=False,
        image_shape=IMAGE,
    )


HGNET = {
    "depths": [1, 1],
    "embedding_size": 8,
    "hidden_sizes": [16, 16],
    "stem_channels": [3, 8, 8],
    "hidden_act": "relu",
    "use_learnable_affine_block": True,
    "stackwise_stage_filters": [[8, 8, 16, 1, 1, 3], [16, 8, 16, 1, 1, 3]],
    "apply_downsample": [False, True],
    "use_lightweight_conv_block": [False, False],
}


def d_fine():
    stages = ["stage1", "stage2"]
    return hub.DFineBackbone(
        backbone=hub.HGNetV2Backbone(
            **HGNET, image_shape=IMAGE, out_features=stages
        ),
        decoder_in_channels=[16, 16],
        encoder_hidden_dim=16,
        num_labels=3,
        num_denoising=0,
        learn_initial_query=False,
        num_queries=4,
        anchor_image_size=IMAGE[:2],
        feat_strides=[4, 8],
        num_feature_levels=2,
        hidden_dim=16,
        encoder_in_channels=[16, 16],
        encode_proj_layers=[1],
        num_attention_heads=2,
        encoder_ffn_dim=24,
        num_encoder_layers=1,
        hidden_expansion=0.5,
        depth_multiplier=0.5,
        eval_idx=-1,
        num_decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=24,
        decoder_n_points=[2, 2],
        lqe_hidden_dim=8,
        num_lqe_layers=1,
        image_shape=IMAGE,
        out_features=stages,
        seed=0,
    )


def basnet():
    backbone = hub.BASNetBackbone(
        image_encoder=hub.ResNetBackbone(
            input_conv_filters=[64],
            input_conv_kernel_sizes=[3],
            stackwise_num_filters=[64, 8, 8, 8],
            stackwise_num_blocks=[1, 1, 1, 1],
            stackwise_num_strides=[1, 2, 2, 2],
            block_type="basic_block",
        ),
        num_classes=1,
        image_shape=(32, 32, 3),
    )
    return hub.BASNetImageSegmenter(backbone, preprocessor=None)


def mobilenet():
    backbone = hub.MobileNetBackbone(
        stackwise_expansion=[[16], [16]],
        stackwise_num_blocks=[1, 1],
        stackwise_num_filters=[[8], [16]],
        stackwise_kernel_size=[[3], [3]],
        stackwise_num_strides=[[2], [1]],
        stackwise_se_ratio=[[None], [0.25]],
        stackwise_activation=[["relu"], ["hard_swish"]],
        stackwise_padding=[[1], [1]],
        output_num_filters=16,
        depthwise_filters=8,
        depthwise_stride=2,
        depthwise_residual=False,
        last_layer_filter=16,
        squeeze_and_excite=0.5,
        input_num_filters=8,
        image_shape=IMAGE,
    )
    return hub.MobileNetImageClassifier(
        backbone, num_classes=3, num_features=16, preprocessor=None
    )


def efficientnet():
    backbone = hub.EfficientNetBackbone(
        stackwise_width_coefficients=[1.0, 1.0],
        stackwise_depth_coefficients=[1.0, 1.0],
        stackwise_kernel_sizes=[3, 3],
        stackwise_num_repeats=[1, 1],
        stackwise_input_filters=[8, 8],
        stackwise_output_filters=[8, 16],
        stackwise_expansion_ratios=[1, 2],
        stackwise_squeeze_and_excite_ratios=[0.0, 0.25],
        stackwise_strides=[1, 2],
        stackwise_block_types=["fused", "unfused"],
        stackwise_force_input_filters=[0, 0],
        stackwise_nores_option=[False, False],
        dropout=0.0,
        # The number of features is the default: the config forgets another.
        input_shape=IMAGE,
    )
    return hub.EfficientNetImageClassifier(
        backbone, num_classes=3, preprocessor=None
    )


def mobilenet_v5():
    backbone = hub.MobileNetV5Backbone(
        stackwise_block_types=[["er"], ["uir", "mqa"]],
        stackwise_num_blocks=[1, 2],
        stackwise_num_filters=[[8], [16, 16]],
        stackwise_strides=[[2], [2, 1]],
        stackwise_act_layers=[["relu"], ["relu", "relu"]],
        stackwise_exp_ratios=[[2.0], [2.0, 2.0]],
        stackwise_se_ratios=[[0.0], [0.0, 0.0]],
        stackwise_dw_kernel_sizes=[[0], [3, 3]],
        stackwise_dw_start_kernel_sizes=[[0], [0, 0]],
        stackwise_dw_end_kernel_sizes=[[0], [0, 0]],
        stackwise_exp_kernel_sizes=[[3], [0, 0]],
        stackwise_pw_kernel_sizes=[[1], [0, 0]],
        stackwise_num_heads=[[0], [0, 2]],
        stackwise_key_dims=[[0], [0, 8]],
        stackwise_value_dims=[[0], [0, 8]],
        stackwise_kv_strides=[[0], [0, 1]],
        stackwise_use_cpe=[[False], [False, False]],
        stem_size=8,
        num_features=16,
        use_msfa=False,
        image_shape=IMAGE,
    )
    return hub.MobileNetV5ImageClassifier(
        backbone, num_classes=3, preprocessor=None, head_hidden_size=16
    )


def video_prism():
    return hub.VideoPrismBackbone(
        num_frames=2,
        patch_size=8,
        hidden_dim=16,
        intermediate_dim=24,
        num_heads=2,
        num_spatial_layers=1,
        num_temporal_layers=1,
        num_auxiliary_layers=1,
        vocabulary_size=VOCABULARY,
        num_text_layers=1,
        image_shape=IMAGE,
    )


def videos_with_text():
    return {
        "pixel_values": numbers(2, *IMAGE),
        **text("token_ids", "padding_mask"),
    }


# Images and text in.


def two_towers(cls, vision_cls, text_cls, **kwargs):
    """A vision and a text encoder; `kwargs` are the model's."""
    sizes = {
        "hidden_dim": 16,
        "num_layers": 2,
        "num_heads": 2,
        "intermediate_dim": 24,
    }
    return cls(
        vision_encoder=vision_cls(patch_size=8, image_shape=IMAGE, **sizes),
        text_encoder=text_cls(
            vocabulary_size=VOCABULARY,
            embedding_dim=16,
            max_sequence_length=LENGTH,
            **sizes,
        ),
        **kwargs,
    )


def images_with_text(*names):
    return {"images": IMAGES(), **text(*names)}


# An encoder that makes four tokens of an image.
FOUR_TOKENS = {
    "image_size": 16,
    "patch_size": 4,
    "pool_size": 2,
    "num_layers": 1,
    "num_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 24,
    "output_dim": 16,
}


def gemma3_vision():
    return causal_lm(
        hub.Gemma3CausalLM,
        hub.Gemma3Backbone,
        **GROUPED_HEADS,
        head_dim=4,
        image_size=16,
        vision_encoder=hub.Gemma3VisionEncoder(**FOUR_TOKENS),
    )


def texts_with_an_image():
    return {
        "images": numbers(1, 16, 16, 3),
        **text("token_ids", "padding_mask", "vision_indices", "vision_mask"),
    }


def gemma4_vision():
    return causal_lm(
        hub.Gemma4CausalLM,
        hub.Gemma4Backbone,
        **GROUPED_HEADS,
        head_dim=4,
        image_size=16,
        vision_encoder=hub.Gemma4VisionEncoder(**FOUR_TOKENS, head_dim=8),
    )


def texts_with_patches():
    """Texts with an image of four by four patches."""
    places = np.stack(np.meshgrid(np.arange(4), np.arange(4)), axis=-1)
    places = places.reshape(1, 1, 16, 2).astype("int32")
    return {
        "pixel_values": numbers(1, 16, 3 * 4 * 4),
        "pixel_position_ids": np.tile(places, (BATCH, 1, 1, 1)),
        **text(
            "token_ids",
            "padding_mask",
            "position_ids",
            "vision_indices",
            "vision_mask",
        ),
    }


def pali_gemma():
    backbone = hub.PaliGemmaBackbone(
        **SIZES,
        **GROUPED_HEADS,
        head_dim=4,
        image_size=32,
        vit_patch_size=8,
        vit_num_heads=2,
        vit_hidden_dim=16,
        vit_num_layers=2,
        vit_intermediate_dim=24,
    )
    return hub.PaliGemmaCausalLM(backbone=backbone, preprocessor=None)


def blip2(cls, language_model):
    backbone = hub.BLIP2Backbone(
        vision_encoder=hub.BLIP2VisionEncoder(
            image_size=32,
            **VIT,
            intermediate_dim=24,
            use_patch_bias=True,
            use_class_token=True,
            use_mha_bias=True,
            use_mlp_bias=True,
            dropout_rate=0.0,
            layer_norm_epsilon=1e-6,
            initializer_range=0.02,
        ),
        qformer=hub.BLIP2QFormer(
            num_query_tokens=2,
            num_layers=2,
            num_heads=2,
            hidden_dim=16,
            intermediate_dim=24,
            vision_dim=16,
            cross_attention_frequency=2,
            dropout=0.0,
            layer_norm_epsilon=1e-6,
        ),
        language_model=language_model,
    )
    return cls(backbone=backbone, preprocessor=None)


BLIP2_LANGUAGE_MODEL = {
    **SIZES,
    "num_heads": 2,
    "num_query_tokens": 2,
    "qformer_hidden_dim": 16,
    "dropout": 0.0,
}


def blip2_opt():
    language_model = hub.BLIP2CustomOPT(
        **BLIP2_LANGUAGE_MODEL, max_sequence_length=2 * LENGTH
    )
    return blip2(hub.BLIP2CausalLM, language_model)


def blip2_t5():
    language_model = hub.BLIP2FlanT5(**BLIP2_LANGUAGE_MODEL, key_value_dim=8)
    return blip2(hub.BLIP2Seq2SeqLM, language_model)


def images_with_pairs_of_texts():
    return {"images": IMAGES(), **pairs_of_texts()}


def parseq():
    return hub.PARSeqBackbone(
        image_encoder=hub.ViTBackbone(
            **VIT, mlp_dim=24, use_class_token=False, image_shape=IMAGE
        ),
        vocabulary_size=VOCABULARY,
        max_label_length=LENGTH,
        decoder_hidden_dim=16,
        num_decoder_layers=1,
        num_decoder_heads=2,
        decoder_mlp_dim=24,
        dropout_rate=0.0,
        attention_dropout=0.0,
    )


# Segmentation by prompts.


def sam():
    backbone = hub.SAMBackbone(
        image_encoder=vit_det(),
        prompt_encoder=SAMPromptEncoder(
            hidden_size=8,
            image_embedding_size=(4, 4),
            input_image_size=IMAGE[:2],
            mask_in_channels=8,
        ),
        mask_decoder=SAMMaskDecoder(
            num_layers=2,
            hidden_size=8,
            intermediate_dim=16,
            num_heads=2,
            embedding_dim=8,
            num_multimask_outputs=3,
            iou_head_depth=2,
            iou_head_hidden_dim=8,
        ),
    )
    # `SAMImageSegmenter` refuses to be trained.
    return backbone


def images_with_prompts():
    return {
        "images": IMAGES(),
        "points": np.full((BATCH, 1, 2), 8, "float32"),
        "labels": np.ones((BATCH, 1), "float32"),
        "boxes": np.tile(np.float32([[[4, 4], [20, 24]]]), (BATCH, 1, 1, 1)),
        "masks": np.zeros((BATCH, 0, 16, 16, 1), "float32"),
    }


def sam3():
    sizes = {
        "num_layers": 2,
        "hidden_dim": 16,
        "intermediate_dim": 24,
        "num_heads": 2,
    }
    return hub.SAM3PromptableConceptBackbone(
        vision_encoder=SAM3VisionEncoder(
            **sizes,
            image_shape=IMAGE,
            patch_size=8,
            fpn_hidden_dim=16,
            fpn_scale_factors=[4.0, 2.0, 1.0, 0.5],
            pretrain_image_shape=IMAGE,
            window_size=2,
            global_attn_indexes=[1],
        ),
        text_encoder=SAM3TextEncoder(
            **sizes,
            vocabulary_size=VOCABULARY,
            embedding_dim=16,
            max_sequence_length=LENGTH,
        ),
        geometry_encoder=SAM3GeometryEncoder(**sizes, roi_size=3),
        detr_encoder=SAM3DetrEncoder(**sizes),
        detr_decoder=SAM3DetrDecoder(
            **sizes, image_shape=IMAGE, patch_size=8, num_queries=4
        ),
        mask_decoder=SAM3MaskDecoder(
            num_upsampling_stages=3, hidden_dim=16, num_heads=2
        ),
    )


def images_with_concepts():
    """Images with a text and boxes each.

    KerasHub 0.32 takes the boxes' mask for one of queries and keys, so there
    is one box fewer than examples: the geometry encoder adds one.
    """
    box = np.float32([0, 0.5, 0.5, 0.25, 0.25])
    return {
        "pixel_values": IMAGES(),
        "token_ids": text("token_ids")["token_ids"],
        "padding_mask": text("padding_mask")["padding_mask"].astype("bool"),
        "boxes": np.tile(box, (BATCH, BATCH - 1, 1)),
        "box_labels": np.ones((BATCH, BATCH - 1), "int32"),
    }


# Images out.


def flux():
    return hub.FluxBackbone(
        input_channels=8,
        hidden_size=32,
        mlp_ratio=2.0,
        num_heads=2,
        depth=1,
        depth_single_blocks=1,
        axes_dim=[4, 6, 6],
        theta=10_000,
        use_bias=True,
        guidance_embed=True,
        image_shape=(4, 8),
        text_shape=(LENGTH, 16),
        image_ids_shape=(4, 3),
        text_ids_shape=(LENGTH, 3),
        y_shape=(16,),
    )


def latents_with_embedded_text():
    return {
        "image": numbers(4, 8),
        "image_ids": np.tile(np.float32([[0, 0, 1]]), (BATCH, 4, 1)),
        "text": numbers(LENGTH, 16),
        "text_ids": np.zeros((BATCH, LENGTH, 3), "float32"),
        "y": numbers(16),
        "timesteps": np.full(BATCH, 0.5, "float32"),
        "guidance": np.full(BATCH, 2, "float32"),
    }


def stable_diffusion_3():
    encoder = {
        "vocabulary_size": VOCABULARY,
        "num_layers": 2,
        "num_heads": 2,
        "intermediate_dim": 24,
        "intermediate_output_index": 0,
        "max_sequence_length": LENGTH,
    }
    return hub.StableDiffusion3Backbone(
        mmdit_patch_size=2,
        mmdit_hidden_dim=16,
        mmdit_num_layers=2,
        mmdit_num_heads=2,
        mmdit_position_size=8,
        mmdit_qk_norm=None,
        mmdit_dual_attention_indices=None,
        vae=VAEBackbone(
            encoder_num_filters=[32, 32],
            encoder_num_blocks=[1, 1],
            decoder_num_filters=[32, 32],
            decoder_num_blocks=[1, 1],
            sampler_method="mode",
        ),
        clip_l=hub.CLIPTextEncoder(embedding_dim=16, hidden_dim=16, **encoder),
        clip_g=hub.CLIPTextEncoder(embedding_dim=16, hidden_dim=16, **encoder),
        image_shape=IMAGE,
    )


def prompts_for_images():
    ids = text("token_ids")["token_ids"]
    return {
        "images": IMAGES(),
        "latents": numbers(4, 4, 16),
        "clip_l_token_ids": ids,
        "clip_l_negative_token_ids": ids[::-1].copy(),
        "clip_g_token_ids": ids,
        "clip_g_negative_token_ids": ids[::-1].copy(),
        "num_steps": np.full(BATCH, 2, "int32"),
        "guidance_scale": np.full(BATCH, 2, "float32"),
    }


@dataclasses.dataclass(frozen=True)
class Family:
    """A family: how to make a tiny model of it, and its inputs.

    `generate` says that `generate(inputs(), stop_token_ids=None)` works. The
    loss "auto" is that of a task which predicts classes.
    """

    build: Callable[[], keras.Model]
    inputs: Callable[[], object]
    loss: str = "mse"
    generate: bool = False

    def targets(self, model):
        """Targets for `fit`: class 0, or a ramp like each output.

        The squares of what a layer norm gives have a constant mean, so zeros
        would have no gradient.
        """
        outputs = model.predict(self.inputs(), verbose=0)
        if self.loss == "auto":
            return np.zeros(outputs.shape[:-1], "int32")
        return keras.tree.map_structure(
            lambda y: np.linspace(-1, 1, y.size, dtype="float32").reshape(
                y.shape
            ),
            outputs,
        )


def text_classifier_family(cls, backbone_cls, inputs, **kwargs):
    build = partial(text_classifier, cls, backbone_cls, **kwargs)
    return Family(build, inputs, loss="auto")


def causal_lm_family(cls, backbone_cls, **kwargs):
    build = partial(causal_lm, cls, backbone_cls, **kwargs)
    return Family(build, TOKENS, loss="auto", generate=True)


def image_classifier_family(cls, backbone_cls, **kwargs):
    build = partial(image_classifier, cls, backbone_cls, **kwargs)
    return Family(build, IMAGES, loss="auto")


FAMILIES = {
    "albert": text_classifier_family(
        hub.AlbertTextClassifier, hub.AlbertBackbone, SEGMENTS, embedding_dim=8
    ),
    "bert": text_classifier_family(
        hub.BertTextClassifier, hub.BertBackbone, SEGMENTS
    ),
    "deberta-v3": text_classifier_family(
        hub.DebertaV3TextClassifier,
        hub.DebertaV3Backbone,
        TOKENS,
        max_sequence_length=LENGTH,
        bucket_size=4,
    ),
    "distil-bert": Family(
        partial(text_model, hub.DistilBertMaskedLM, hub.DistilBertBackbone),
        partial(text, "token_ids", "padding_mask", "mask_positions"),
        loss="auto",
    ),
    "electra": Family(electra, SEGMENTS),
    "esm": text_classifier_family(
        hub.ESMProteinClassifier, hub.ESM2Backbone, partial(text, "token_ids")
    ),
    "f-net": Family(
        f_net, partial(text, "token_ids", "segment_ids"), loss="auto"
    ),
    "roberta": text_classifier_family(
        hub.RobertaTextClassifier, hub.RobertaBackbone, TOKENS
    ),
    "roformer-v2": text_classifier_family(
        hub.RoformerV2TextClassifier,
        hub.RoformerV2Backbone,
        partial(text, "token_ids", "segment_ids"),
        head_size=8,
    ),
    "xlm-roberta": Family(
        partial(text_model, hub.XLMRobertaTextEmbedder, hub.XLMRobertaBackbone),
        TOKENS,
    ),
    "xlnet": Family(partial(text_backbone, hub.XLNetBackbone), SEGMENTS),
    # Causal language models.
    "bloom": causal_lm_family(hub.BloomCausalLM, hub.BloomBackbone, **HEADS),
    "falcon": causal_lm_family(
        hub.FalconCausalLM, hub.FalconBackbone, num_attention_heads=2
    ),
    "gemma": causal_lm_family(
        hub.GemmaCausalLM, hub.GemmaBackbone, **GROUPED_HEADS, head_dim=4
    ),
    "gpt2": causal_lm_family(
        hub.GPT2CausalLM, hub.GPT2Backbone, **HEADS, dropout=0.0
    ),
    "gpt-neo-x": causal_lm_family(
        hub.GPTNeoXCausalLM, hub.GPTNeoXBackbone, **HEADS
    ),
    "gpt-oss": causal_lm_family(
        hub.GptOssCausalLM, hub.GptOssBackbone, **GROUPED_HEADS, num_experts=2
    ),
    "llama": causal_lm_family(
        hub.LlamaCausalLM, hub.LlamaBackbone, **GROUPED_HEADS
    ),
    "llama3": causal_lm_family(
        hub.Llama3CausalLM, hub.Llama3Backbone, **GROUPED_HEADS
    ),
    "mistral": causal_lm_family(
        hub.MistralCausalLM, hub.MistralBackbone, **GROUPED_HEADS
    ),
    "mixtral": causal_lm_family(
        hub.MixtralCausalLM, hub.MixtralBackbone, **GROUPED_HEADS, num_experts=2
    ),
    "opt": causal_lm_family(
        hub.OPTCausalLM, hub.OPTBackbone, **HEADS, dropout=0.0
    ),
    "phi3": causal_lm_family(
        hub.Phi3CausalLM, hub.Phi3Backbone, **GROUPED_HEADS
    ),
    "qwen2": causal_lm_family(
        hub.Qwen2CausalLM, hub.Qwen2Backbone, **GROUPED_HEADS
    ),
    "qwen3": causal_lm_family(
        hub.Qwen3CausalLM, hub.Qwen3Backbone, **GROUPED_HEADS, head_dim=4
    ),
    # Its `generate` fails without a preprocessor: it returns None for images.
    "gemma3": Family(
        partial(
            causal_lm,
            hub.Gemma3CausalLM,
            hub.Gemma3Backbone,
            **GROUPED_HEADS,
            head_dim=4,
            image_size=16,
        ),
        TOKENS,
        loss="auto",
    ),
    "gemma3n": Family(gemma3n, TOKENS, loss="auto", generate=True),
    "gemma4": Family(
        partial(
            causal_lm,
            hub.Gemma4CausalLM,
            hub.Gemma4Backbone,
            **GROUPED_HEADS,
            head_dim=4,
            image_size=16,
        ),
        partial(text, "token_ids", "padding_mask", "position_ids"),
        loss="auto",
        generate=True,
    ),
    "qwen-moe": causal_lm_family(
        hub.QwenMoeCausalLM,
        hub.QwenMoeBackbone,
        **GROUPED_HEADS,
        moe_intermediate_dim=8,
        shared_expert_intermediate_dim=8,
        num_experts=2,
        top_k=1,
    ),
    "qwen3-moe": causal_lm_family(
        hub.Qwen3MoeCausalLM,
        hub.Qwen3MoeBackbone,
        **GROUPED_HEADS,
        head_dim=4,
        moe_intermediate_dim=8,
        num_experts=2,
        top_k=1,
    ),
    "qwen3.5": causal_lm_family(
        hub.Qwen3_5CausalLM,
        hub.Qwen3_5Backbone,
        **GROUPED_HEADS,
        **LINEAR_ATTENTION,
    ),
    "qwen3.5-moe": Family(qwen3_5_moe, TOKENS, loss="auto", generate=True),
    # Its `generate` takes more than the model does.
    "rwkv7": Family(
        rwkv7,
        partial(text, "token_ids", "padding_mask", length=16),
        loss="auto",
    ),
    "smollm3": Family(smollm3, TOKENS, loss="auto", generate=True),
    # Encoders and decoders of text.
    "bart": Family(
        partial(text_model, hub.BartSeq2SeqLM, hub.BartBackbone),
        pairs_of_texts,
        loss="auto",
        generate=True,
    ),
    "edrec": Family(edrec, pairs_of_texts, loss="auto", generate=True),
    "t5": Family(
        partial(text_model, hub.T5Seq2SeqLM, hub.T5Backbone),
        pairs_of_texts,
        loss="auto",
        generate=True,
    ),
    "t5gemma": Family(
        partial(t5gemma, hub.T5GemmaSeq2SeqLM, hub.T5GemmaBackbone),
        pairs_of_texts,
        loss="auto",
        generate=True,
    ),
    "t5gemma2": Family(
        partial(t5gemma, hub.T5Gemma2Seq2SeqLM, hub.T5Gemma2Backbone),
        pairs_of_texts,
        loss="auto",
        generate=True,
    ),
    # Audio.
    "moonshine": Family(moonshine, audio_with_text, loss="auto", generate=True),
    "whisper": Family(
        partial(
            text_backbone,
            hub.WhisperBackbone,
            num_mels=8,
            max_encoder_sequence_length=2 * LENGTH,
            max_decoder_sequence_length=LENGTH,
        ),
        spectra_with_text,
    ),
    # Images.
    "deit": image_classifier_family(
        hub.DeiTImageClassifier, hub.DeiTBackbone, **VIT, intermediate_dim=24
    ),
    "dinov2": Family(dinov2, IMAGES),
    "dinov3": Family(
        partial(
            hub.DINOV3Backbone,
            **VIT,
            intermediate_dim=24,
            image_shape=IMAGE,
        ),
        IMAGES,
    ),
    "depth-anything": Family(depth_anything, IMAGES),
    "mit": Family(mit_classifier, IMAGES, loss="auto"),
    "segformer": Family(segformer, IMAGES),
    "swin-transformer": image_classifier_family(
        hub.SwinTransformerImageClassifier,
        hub.SwinTransformerBackbone,
        embed_dim=8,
        depths=(2, 1),
        num_heads=(2, 2),
        window_size=4,
        drop_path=0.0,
    ),
    "video-prism": Family(video_prism, videos_with_text),
    "vit": image_classifier_family(
        hub.ViTImageClassifier, hub.ViTBackbone, **VIT, mlp_dim=24
    ),
    "vit-det": Family(vit_det, IMAGES),
    # Images, by convolutions.
    "basnet": Family(basnet, partial(numbers, 32, 32, 3)),
    "cspnet": image_classifier_family(
        hub.CSPNetImageClassifier,
        hub.CSPNetBackbone,
        stem_filters=8,
        stem_kernel_size=3,
        stem_strides=2,
        stackwise_depth=[1, 1],
        stackwise_strides=[2, 2],
        stackwise_num_filters=[8, 16],
        block_type="dark_block",
        stage_type="csp",
        bottle_ratio=(0.5, 1.0),
        block_ratio=(1.0, 0.5),
        expand_ratio=(2.0, 1.0),
        down_growth=True,
    ),
    "deeplab-v3": Family(deeplab_v3, IMAGES),
    "d-fine": Family(d_fine, IMAGES),
    "densenet": image_classifier_family(
        hub.DenseNetImageClassifier,
        hub.DenseNetBackbone,
        stackwise_num_repeats=[1, 1],
        growth_rate=8,
    ),
    "efficientnet": Family(efficientnet, IMAGES, loss="auto"),
    "hgnetv2": image_classifier_family(
        hub.HGNetV2ImageClassifier,
        hub.HGNetV2Backbone,
        head={"head_filters": 16},
        **HGNET,
    ),
    "mobilenet": Family(mobilenet, IMAGES, loss="auto"),
    "mobilenetv5": Family(mobilenet_v5, IMAGES, loss="auto"),
    "resnet": Family(resnet_classifier, IMAGES, loss="auto"),
    "retinanet": Family(retinanet, IMAGES),
    "vgg": image_classifier_family(
        hub.VGGImageClassifier,
        hub.VGGBackbone,
        head={"pooling_hidden_dim": 16},
        stackwise_num_repeats=[1, 1],
        stackwise_num_filters=[8, 8],
    ),
    "xception": image_classifier_family(
        hub.XceptionImageClassifier,
        hub.XceptionBackbone,
        stackwise_conv_filters=[[8, 8], [16, 16], [16, 16]],
        stackwise_pooling=[False, True, False],
    ),
    # Images and text.
    "blip2-opt": Family(
        blip2_opt,
        partial(images_with_text, "token_ids", "padding_mask"),
        loss="auto",
        generate=True,
    ),
    "blip2-t5": Family(
        blip2_t5, images_with_pairs_of_texts, loss="auto", generate=True
    ),
    "clip": Family(
        partial(
            two_towers,
            hub.CLIPBackbone,
            hub.CLIPVisionEncoder,
            hub.CLIPTextEncoder,
            projection_dim=8,
        ),
        partial(images_with_text, "token_ids"),
    ),
    "gemma3-vision": Family(
        gemma3_vision, texts_with_an_image, loss="auto", generate=True
    ),
    "gemma4-vision": Family(
        gemma4_vision, texts_with_patches, loss="auto", generate=True
    ),
    "metaclip-2": Family(
        partial(
            two_towers,
            hub.MetaCLIP2Backbone,
            hub.MetaCLIP2VisionEncoder,
            hub.MetaCLIP2TextEncoder,
            projection_dim=8,
        ),
        partial(images_with_text, "token_ids"),
    ),
    "pali-gemma": Family(
        pali_gemma,
        partial(images_with_text, "token_ids", "padding_mask", "response_mask"),
        loss="auto",
        generate=True,
    ),
    "parseq": Family(
        parseq, partial(images_with_text, "token_ids", "padding_mask")
    ),
    "sam": Family(sam, images_with_prompts),
    "sam3": Family(sam3, images_with_concepts),
    "siglip": Family(
        partial(
            two_towers,
            hub.SigLIPBackbone,
            hub.SigLIPVisionEncoder,
            hub.SigLIPTextEncoder,
        ),
        partial(images_with_text, "token_ids"),
    ),
    # Images out.
    "flux": Family(flux, latents_with_embedded_text),
    "stable-diffusion-3": Family(stable_diffusion_3, prompts_for_images),
}

# Families that have convolutions alone outside of the head.
CONVOLUTIONS = {
    "basnet",
    "cspnet",
    "deeplab-v3",
    "densenet",
    "efficientnet",
    "hgnetv2",
    "mobilenet",
    "mobilenetv5",
    "resnet",
    "retinanet",
    "vgg",
    "xception",
}
