"""The families of image models that PEFT adapters fit."""

from keras_dylora.adapters.peft.layout import (
    Blocks,
    Layout,
    attention,
    head,
    rows,
)

_VIT = Layout(
    "ViTBackbone",
    (
        Blocks(
            "layers.{}",
            "vit_encoder/transformer_block_{}",
            attention(
                "mha",
                "attention.q_proj attention.k_proj attention.v_proj "
                "attention.o_proj",
            )
            | {
                "mlp.fc1": ("mlp/dense_1",),
                "mlp.fc2": ("mlp/dense_2",),
            },
            first=1,
        ),
    ),
    outside={
        "embeddings.patch_embeddings.projection": (
            "vit_patching_and_embedding/patch_embedding",
        )
    },
    task_type=None,
)


def _resnet_stage(number):
    """The blocks of a stage; basic blocks have no third convolution."""
    return Blocks(
        f"encoder.stages.{number}.layers.{{}}",
        f"stack{number}_block{{}}",
        {
            "shortcut.convolution": ("0_conv",),
            "layer.0.convolution": ("1_conv",),
            "layer.1.convolution": ("2_conv",),
            "layer.2.convolution": ("3_conv",),
        },
        optional=("shortcut.convolution", "layer.2.convolution"),
        separator="_",
    )


_RESNET = Layout(
    "ResNetBackbone",
    tuple(map(_resnet_stage, range(4))),
    outside={"embedder.embedder.convolution": ("conv1_conv",)},
    task_type=None,
    only={
        "block_type": ("basic_block", "bottleneck_block"),
        "use_pre_activation": (False,),
        "pooling": ("avg",),
    },
)

IMAGES = {
    **rows(
        _VIT,
        "ViTImageClassifier",
        "vit.",
        None,
        head("classifier", "predictions"),
    ),
    **rows(
        _RESNET,
        "ResNetImageClassifier",
        "resnet.",
        None,
        head("classifier.1", "predictions"),
    ),
}
