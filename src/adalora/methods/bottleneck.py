"""Bottleneck adapters: small networks of two layers behind the output projections of a transformer's layers."""

from __future__ import annotations

import difflib
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from ..recipe import Recipe, RecipeError
from .base import Adapted, Job, Precision, Section, register, train_only
from .saving import load_trained, save_trained
from .sizes import nearest

OUTPUTS = {
    "BERT, RoBERTa, DeBERTa, ELECTRA": ("attention.output.dense", "output.dense"),
    "BART, OPT, Pegasus": ("self_attn.out_proj", "fc2"),
    "T5": ("SelfAttention.o", "DenseReluDense.wo"),
    "GPT-2": ("attn.c_proj", "mlp.c_proj"),
    "Llama, Mistral, Qwen, Gemma": ("self_attn.o_proj", "mlp.down_proj"),
    "DistilBERT": ("attention.out_lin", "ffn.lin2"),
    "ModernBERT": ("attn.Wo", "mlp.Wo"),
    "GPT-NeoX": ("attention.dense", "mlp.dense_4h_to_h"),
    "Phi": ("self_attn.dense", "mlp.fc2"),
}
"""Ends of the names of two linear modules in each layer, the output projections of its attention (that to itself, where
there is another) and of its feed-forward network; models are known by having both, not by their class."""


class Bottleneck(nn.Module):
    """y + U a(D y), for y: [..., d]; D: m x d, U: d x m, both with biases: 2 d m + m + d parameters.

    Weights are drawn with standard deviation 0.01, truncated at two of them, and biases are 0, so that the model starts
    near what it was (Houlsby et al. 2019, sections 2.1 and 3.6).

    Args:
        features: d.
        width: m.
        activation: a, by its name in Transformers.
    """

    def __init__(self, features: int, width: int, activation: str) -> None:
        super().__init__()
        self.down = nn.Linear(features, width)
        self.activation = ACT2FN[activation]
        self.up = nn.Linear(width, features)
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=0.01, a=-0.02, b=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, y: Tensor) -> Tensor:
        added: Tensor = self.up(self.activation(self.down(y)))
        return y + added


class Extended(nn.Module):
    """An output projection with a bottleneck behind it, before dropout and the residual addition."""

    def __init__(self, projection: nn.Linear | Conv1D, bottleneck: Bottleneck) -> None:
        super().__init__()
        self.projection = projection
        self.bottleneck = bottleneck.to(projection.weight)  # its device and type

    @property
    def weight(self) -> Tensor:
        """The projection's: some models ask for its type."""
        return self.projection.weight

    def forward(self, x: Tensor) -> Tensor:
        extended: Tensor = self.bottleneck(self.projection(x))
        return extended


class Outputs(NamedTuple):
    """Names of the output projections of all layers."""

    attention: list[str]
    feed_forward: list[str]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Outputs:
        """RecipeError for a model whose layers are not as any in the table."""
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
        for attention_end, feed_forward_end in OUTPUTS.values():
            attention = [name for name in linear if name.endswith(f".{attention_end}")]
            feed_forward = [name for name in linear if name.endswith(f".{feed_forward_end}") and name not in attention]
            if attention and len(attention) == len(feed_forward):
                return cls(attention, feed_forward)
        raise RecipeError(
            f"bottleneck adapters: do not know where in a {type(model).__name__} they belong; known are models built "
            f"like {'; '.join(OUTPUTS)}. Use another method, such as lora"
        )


@register("houlsby", True)
@register("pfeiffer", False)
class Bottlenecks:
    """Adapters behind the feed-forward network of each layer (Pfeiffer et al. 2021, arXiv 2005.00247), and
    ``behind_attention`` too (Houlsby et al. 2019, arXiv 1902.00751).

    Layer norms stay frozen. Houlsby et al. train them as well, 4 d more parameters a layer; the AdaLoRA paper, whose
    0.31M and 0.61M for DeBERTaV3-base are those of widths 8 and 16 without them, does not. Pfeiffer et al. also apply
    the layer's pretrained norm once more, before the adapter; here it stays where it was.

    What is saved is ``adapter_model.safetensors``, the trained parameters alone.
    """

    section: ClassVar[Section | None] = "bottleneck"
    takes_budget: ClassVar[bool] = True
    base_precision: ClassVar[Precision] = "float32"

    def __init__(self, behind_attention: bool) -> None:
        self._behind_attention = behind_attention

    def with_budget(self, model: PreTrainedModel, recipe: Recipe, parameters: int) -> Recipe:
        """The recipe with the width that comes nearest; RecipeError when width 1 has twice as many."""
        features = [_out_features(model.get_submodule(name)) for name in self._places(model)]
        at_1, at_2 = (sum(2 * d * width + width + d for d in features) for width in (1, 2))
        width = nearest(recipe, "width", parameters, at_1, at_2)
        return recipe.model_copy(update={"bottleneck": recipe.bottleneck.model_copy(update={"width": width})})

    def adapt(self, model: PreTrainedModel, job: Job) -> Adapted:
        """RecipeError for a model that it does not know, or an activation that Transformers does not."""
        self._extend(model, job.recipe)
        return Adapted(model, partial(save_trained, model))

    def load(self, model: PreTrainedModel, recipe: Recipe, folder: Path) -> nn.Module:
        """The model with the adapters of the recipe's width; RecipeError when others were saved."""
        self._extend(model, recipe)
        return load_trained(model, folder)

    def _extend(self, model: PreTrainedModel, recipe: Recipe) -> None:
        width, activation = recipe.bottleneck.width, recipe.bottleneck.activation
        if activation not in ACT2FN:
            near = difflib.get_close_matches(activation, ACT2FN, n=1)
            advice = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(ACT2FN))}"
            raise RecipeError(f"bottleneck.activation: Transformers has no {activation!r}: {advice}")
        places = self._places(model)
        train_only(model, lambda name: False)
        for place in places:
            projection: Any = model.get_submodule(place)
            bottleneck = Bottleneck(_out_features(projection), width, activation)
            model.set_submodule(place, Extended(projection, bottleneck), strict=True)

    def _places(self, model: PreTrainedModel) -> list[str]:
        attention, feed_forward = Outputs.of(model)
        return [*attention, *feed_forward] if self._behind_attention else feed_forward


def _out_features(projection: Any) -> int:
    return int(projection.nf if isinstance(projection, Conv1D) else projection.out_features)
