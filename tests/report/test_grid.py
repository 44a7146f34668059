"""Models that are not one stack of equal layers, arranged by the names of their modules."""

from __future__ import annotations

import pytest

from adalora.report.grid import arrange, cells

EXPERTS = [f"model.layers.{layer}.mlp.experts.{expert}.w1" for layer in range(2) for expert in range(64)]
SWITCH = [f"encoder.block.{layer}.layer.1.mlp.experts.expert_{expert}.wi" for layer in range(2) for expert in range(4)]
RESNET = ["conv1", *(f"layer{stage}.{block}.conv1" for stage in (1, 2) for block in (0, 1)), "layer2.0.downsample.0"]
UNET = [
    "conv_in",
    *(f"down_blocks.{block}.resnets.{index}.conv1" for block in (0, 1) for index in (0, 1)),
    *(f"down_blocks.{block}.attentions.{index}.transformer_blocks.0.to_q" for block in (0, 1) for index in (0, 1)),
    "mid_block.attentions.0.transformer_blocks.0.to_q",
    "mid_block.resnets.0.conv1",
    "mid_block.resnets.1.conv1",
]


@pytest.mark.parametrize(
    ("names", "columns", "kinds"),
    [
        (EXPERTS, ["0", "1"], ["mlp.experts.w1"]),
        (SWITCH, ["0", "1"], ["layer.1.mlp.experts.wi"]),
        (RESNET, ["layer1 0", "layer1 1", "layer2 0", "layer2 1", "-"], ["conv1", "downsample.0"]),
        (
            UNET,
            [*(f"down_blocks {block}" for block in ("0.0", "0.1", "1.0", "1.1")), "mid_block 0", "mid_block 1", "-"],
            ["conv_in", "resnets.conv1", "attentions.to_q"],
        ),
        (
            [f"encoder.stages.{a}.layers.{b}.layer.{c}.conv" for a in (0, 1) for b in (0, 1) for c in (0, 1)],
            ["0.0", "0.1", "1.0", "1.1"],
            ["layer.0.conv", "layer.1.conv"],
        ),
        (
            ["model.visual.blocks.0.attn.qkv", "model.language_model.layers.0.self_attn.q_proj", "model.merger.mlp.0"],
            ["visual 0", "language_model 0", "-"],
            ["attn.qkv", "self_attn.q_proj", "model.merger.mlp.0"],
        ),
        (
            ["vision_tower.vision_model.encoder.layers.0.q", "language_model.model.layers.0.q"],
            ["vision_tower 0", "language_model 0"],
            ["q"],
        ),
        (
            ["model.encoder.layers.0.q", "model.decoder.layers.0.q", "vision.layers.0.q"],
            ["model.encoder 0", "model.decoder 0", "vision 0"],
            ["q"],
        ),
    ],
    ids=["experts", "switch", "resnet", "unet", "stages", "vision and language", "llava", "three stacks"],
)  # fmt: skip
def test_columns_and_kinds(names: list[str], columns: list[str], kinds: list[str]) -> None:
    found = cells(names)
    assert [column.name for column in found.columns] == columns
    assert found.kinds == kinds
    assert sorted(name for row in found.names for cell in row for name in cell) == sorted(names), "each in one cell"


def test_a_cell_of_experts_is_their_mean() -> None:
    ranks = {name: place % 3 for place, name in enumerate(EXPERTS)}
    values = arrange(ranks).values
    assert len(values) == 1 and values[0] == [
        round(sum(list(ranks.values())[start : start + 64]) / 64, 1) for start in (0, 64)
    ]
    assert arrange({"h.0.q": 4}).values == [[4]] and isinstance(arrange({"h.0.q": 4}).values[0][0], int)


def test_a_block_that_is_alone_is_no_column() -> None:
    """One transformer block in each attention says nothing; ten do."""
    name = "down_blocks.{}.attentions.0.transformer_blocks.{}.to_q"
    assert [c.layer for c in cells([name.format(b, 0) for b in (0, 1)]).columns] == ["0", "1"]
    assert [c.layer for c in cells([name.format(b, i) for b in (0, 1) for i in (0, 1)]).columns][:2] == ["0.0", "0.1"]
