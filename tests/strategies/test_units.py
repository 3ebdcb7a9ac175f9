"""Units: grouping by path, checked against real architectures and by laws."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from loraloom.registry import UnknownName
from loraloom.strategies.units import depths, group, layer, role, tower

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IMAGE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
BOTH = {
    "vocab_size": 64,
    "d_model": 16,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 2}

# model and config class, the config's arguments, and how many blocks each tower of several has by the config
MODELS = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig, TEXT, {"model.layers": 3}),
    "mixtral": (tf.MixtralForCausalLM, tf.MixtralConfig, {**TEXT, "num_local_experts": 4}, {"model.layers": 3}),
    "qwen-moe": (
        tf.Qwen2MoeForCausalLM,
        tf.Qwen2MoeConfig,
        {**TEXT, "num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
        {"model.layers": 3},
    ),
    "bert": (tf.BertForSequenceClassification, tf.BertConfig, TEXT, {"bert.encoder.layer": 3}),
    "gpt2": (
        tf.GPT2LMHeadModel,
        tf.GPT2Config,
        {"vocab_size": 64, "n_embd": 16, "n_layer": 3, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2},
        {"transformer.h": 3},
    ),
    "t5": (tf.T5ForConditionalGeneration, tf.T5Config, T5, {"encoder.block": 3, "decoder.block": 2}),
    "switch": (
        tf.SwitchTransformersForConditionalGeneration,
        tf.SwitchTransformersConfig,
        {**T5, "num_experts": 3},
        {"encoder.block": 3, "decoder.block": 2},
    ),
    "bart": (
        tf.BartForConditionalGeneration,
        tf.BartConfig,
        {**BOTH, "forced_eos_token_id": 2},
        {"model.encoder.layers": 3, "model.decoder.layers": 2},
    ),
    "whisper": (
        tf.WhisperForConditionalGeneration,
        tf.WhisperConfig,
        BOTH,
        {"model.encoder.layers": 3, "model.decoder.layers": 2},
    ),
    "clip": (
        tf.CLIPModel,
        tf.CLIPConfig,
        {"text_config": {**TEXT, "bos_token_id": 1}, "vision_config": IMAGE},
        {"text_model.encoder.layers": 3, "vision_model.encoder.layers": 2},
    ),
    "swin": (
        tf.SwinModel,
        tf.SwinConfig,
        {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 3], "num_heads": [2, 2], "window_size": 4},
        {"encoder.layers.blocks": 5},
    ),
    "vit": (tf.ViTModel, tf.ViTConfig, IMAGE, {"layers": 2}),
    "dinov2": (
        tf.Dinov2Model,
        tf.Dinov2Config,
        {name: value for name, value in IMAGE.items() if name != "intermediate_size"},
        {"encoder.layer": 2},
    ),
    "segformer": (
        tf.SegformerModel,
        tf.SegformerConfig,
        {
            "num_encoder_blocks": 2,
            "depths": [2, 3],
            "sr_ratios": [2, 1],
            "hidden_sizes": [8, 16],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
        },
        {"stages.blocks": 5},
    ),
    "convnext": (
        tf.ConvNextModel,
        tf.ConvNextConfig,
        {"hidden_sizes": [8, 16], "depths": [2, 3], "num_stages": 2},
        {"encoder.stages.layers": 5},
    ),
    "albert": (
        tf.AlbertModel,
        tf.AlbertConfig,
        {**TEXT, "embedding_size": 8, "inner_group_num": 2},
        {"encoder.albert_layer_groups.albert_layers": 2},
    ),
}


def adaptable(model: nn.Module) -> list[str]:
    """Paths of what PEFT can target: matrices, convolutions, and the fused experts of today's MoE models."""
    matrices = (nn.Linear, nn.Conv1d, nn.Conv2d, tf.pytorch_utils.Conv1D)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, matrices) or "Experts" in type(module).__name__
    ]


@pytest.mark.parametrize("name", MODELS)
def test_as_many_layers_as_the_config_says(name):
    model_class, config_class, settings_, expected = MODELS[name]
    with torch.device("meta"):
        model = model_class(config_class(**settings_))
    paths = adaptable(model)
    units = group(paths)
    assert sorted(path for some in units.values() for path in some) == sorted(paths)
    for unit, some in units.items():
        assert all(path == unit or path.startswith(unit + ".") for path in some)
    towers: dict[str, int] = {}
    for unit in units:
        towers[tower(unit)] = towers.get(tower(unit), 0) + 1
    # Segformer's patch embeddings lie beside the blocks, one a stage: a tower of their own
    found = {name: count for name, count in towers.items() if count > 1 and name != "stages"}
    assert found == expected
    # every block holds the same roles, but for the parts that a stage's end has
    roles = [{role(path) for path in units[unit]} for unit in units if tower(unit) in expected]
    assert all(len(some) >= 3 for some in roles)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", "model.layers.3"),
        ("base_model.model.model.layers.3.self_attn.q_proj", "model.layers.3"),
        ("model.layers.3.mlp.experts.7.w1", "model.layers.3"),
        ("0.auto_model.encoder.layer.3.attention.self.query", "0.auto_model.encoder.layer.3"),
        ("encoders.1.layers.2.mlp.experts.0.w1", "encoders.1.layers.2"),
        ("0.mlp.2", "0"),
        ("model.layers.3.block_sparse_moe.experts.7.w1", "model.layers.3"),
        ("encoder.block.0.layer.1.DenseReluDense.wi", "encoder.block.0"),
        ("decoder.block.2.layer.1.mlp.experts.expert_0.wi", "decoder.block.2"),
        ("bert.encoder.layer.11.attention.self.query", "bert.encoder.layer.11"),
        ("transformer.h.0.attn.c_attn", "transformer.h.0"),
        ("vision_model.encoder.layers.5.mlp.fc1", "vision_model.encoder.layers.5"),
        ("visual.transformer.resblocks.4.mlp.c_fc", "visual.transformer.resblocks.4"),
        ("encoder.layers.0.blocks.1.attention.self.query", "encoder.layers.0.blocks.1"),
        ("encoder.block.0.1.attention.self.query", "encoder.block.0.1"),
        ("encoder.stages.0.layers.1.pwconv1", "encoder.stages.0.layers.1"),
        ("stages.2.blocks.5.mlp.fc1", "stages.2.blocks.5"),
        ("layer1.0.downsample.0", "layer1.0"),
        (
            "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
            "down_blocks.0.attentions.1.transformer_blocks.0",
        ),
        ("down_blocks.0.resnets.1.conv1", "down_blocks.0.resnets.1"),
        ("mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj", "mid_block.attentions.0.transformer_blocks.0"),
        ("single_transformer_blocks.12.attn.to_q", "single_transformer_blocks.12"),
        ("blocks.3.mlp.0", "blocks.3"),
        ("encoder.albert_layer_groups.0.albert_layers.1.ffn", "encoder.albert_layer_groups.0.albert_layers.1"),
        ("lm_head", "lm_head"),
        ("bert.pooler.dense", "bert.pooler.dense"),
        ("0", "0"),
    ],
)
def test_layer(path, expected):
    assert layer(path) == expected
    assert layer(expected) == expected, "the layer of a layer is itself"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", "self_attn.q_proj"),
        ("model.layers.3.mlp.experts.7.w1", "mlp.experts.w1"),
        ("encoder.block.2.layer.1.mlp.experts.expert_5.wi", "layer.1.mlp.experts.wi"),
        ("encoder.block.0.layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wi"),
        ("blocks.3.mlp.0", "mlp.0"),
        ("base_model.model.lm_head", "lm_head"),
        ("features.4", "features"),
        ("4", "4"),
    ],
)
def test_role(path, expected):
    assert role(path) == expected


def test_order_is_by_number_within_a_tower_and_by_appearance_between_them():
    names = ["dec.layers.10.q", "enc.layers.1.q", "dec.layers.2.q", "head", "dec.layers.2.v", "enc.layers.0.q"]
    assert list(group(names)) == ["dec.layers.2", "dec.layers.10", "enc.layers.0", "enc.layers.1", "head"]
    assert list(group(names, "module")) == [
        "dec.layers.2.q",
        "dec.layers.2.v",
        "dec.layers.10.q",
        "enc.layers.0.q",
        "enc.layers.1.q",
        "head",
    ]
    assert group(names, "projection") == {
        "q": ("dec.layers.10.q", "enc.layers.1.q", "dec.layers.2.q", "enc.layers.0.q"),
        "head": ("head",),
        "v": ("dec.layers.2.v",),
    }


def test_a_regular_expression_makes_units_and_leaves_the_rest_alone():
    names = [f"{side}.layers.{at}.{part}" for side in ("text", "image") for at in range(2) for part in ("q", "fc")]
    assert group(names, r"(text|image)\.layers\.(\d+)\.q") == {
        "text.0": ("text.layers.0.q",),
        "text.1": ("text.layers.1.q",),
        "image.0": ("image.layers.0.q",),
        "image.1": ("image.layers.1.q",),
    }
    assert list(group(names, r"text|image")) == ["text", "image"]
    # an optional group that took no part is left out; an empty match is no match
    assert list(group(names, r"layers\.(1)?")) == ["1"]
    with pytest.raises(ValueError, match="matches none of 8"):
        group(names, r"x*")


@pytest.mark.parametrize(
    ("unit", "error", "says"),
    [
        ("layers", UnknownName, "did you mean 'layer'"),
        ("projections", UnknownName, "did you mean 'projection'"),
        ("q_proj[", ValueError, "not a valid regular expression"),
        ("decoder", ValueError, "matches none of 1"),
        ("", ValueError, "regular expression"),
        (None, ValueError, "regular expression"),
    ],
)
def test_units_that_are_refused(unit, error, says):
    with pytest.raises(error, match=says):
        group(["model.layers.0.q_proj"], unit)


def test_no_modules_at_all():
    with pytest.raises(ValueError, match="no modules"):
        group([])


paths = st.lists(
    st.tuples(st.sampled_from(["enc", "dec"]), st.integers(0, 12), st.sampled_from(["q", "v", "mlp.experts.3.w"])).map(
        lambda parts: f"{parts[0]}.layers.{parts[1]}.{parts[2]}"
    ),
    min_size=1,
    max_size=30,
)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(names=paths, unit=st.sampled_from(["layer", "module", "projection", r"layers\.\d+", r"(enc|dec)"]))
def test_grouping_is_a_partition_that_ignores_pefts_prefix(names, unit):
    units = group(names, unit)
    flat = [name for some in units.values() for name in some]
    assert sorted(flat) == sorted(set(names))
    assert list(group([f"base_model.model.{name}" for name in names], unit)) == list(units)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(names=paths)
def test_depths_are_even_within_a_tower(names):
    units = list(group(names))
    found = dict(zip(units, depths(units), strict=True))
    for side in ("enc", "dec"):
        own = [found[unit] for unit in units if unit.startswith(side)]
        assert own == [0.5] if len(own) == 1 else own == pytest.approx([at / (len(own) - 1) for at in range(len(own))])
    # modules lie as high as their layers
    modules = list(group(names, "module"))
    assert list(depths(modules)) == [found[layer(name)] for name in modules]


def test_stages_are_one_tower():
    units = [f"encoder.layers.{stage}.blocks.{at}" for stage, count in enumerate((2, 3)) for at in range(count)]
    assert depths(units) == (0.0, 0.25, 0.5, 0.75, 1.0)
