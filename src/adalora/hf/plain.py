"""A plain LoRA adapter as files: read, truncated, padded, cast and written, without a model.

    ΔW = scale · B A        B: [d_out, r]   A: [r, d_in]   scale = lora_alpha / r (/ √r with rsLoRA)

A convolution's pair is A [r, in, *kernel], B [out, r, 1, ...]; an embedding's A [r, vocabulary], B [dim, r] and
ΔW = scale · (B A)ᵀ. Everything here reads them as matrices, [r, in·kernel] and [out, r]. A *triplet* i is column i of B
with row i of A. What else is in the file (heads, biases, DoRA's magnitudes) is carried along as it is.
"""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig
from torch import Tensor

from ..core.errors import ConfigError
from ..core.policy import global_topk
from ..core.settings import check_rank
from ..core.triplets import Factors, from_product
from .checked import check_padding, check_pruned, check_rank_pattern, check_scores, short
from .files import ADAPTER_FILES, PRUNED, SCORES, read_json, read_settings, read_tensors, replacing, save_tensors
from .patterns import Patterns
from .plain_config import ONLY_AT_THE_START, including, plain_config, rank_owner

PREFIX = "base_model.model."
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_PAIR_KEY = re.compile(r"(?P<name>.+)\.lora_(?P<embedding>embedding_)?(?P<part>[AB])(?P<weight>\.weight)?")
# Initializations that change the base model's weights too: without that change the file is half of the truth.
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


class Pair(NamedTuple):
    """B and A of one module."""

    b: Tensor  # [d_out, r], [out, r, 1, ...] of a convolution, [dim, r] of an embedding
    a: Tensor  # [r, d_in], [r, in, *kernel], [r, vocabulary]
    embedding: bool = False

    @classmethod
    def empty(cls, b: Sequence[int], a: Sequence[int], embedding: bool) -> Pair:
        """Of rank 0, with these shapes."""
        return cls(torch.zeros(*b), torch.zeros(*a), embedding)

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def select(self, index: Tensor) -> Pair:
        """The triplets in ``index`` (int64, [k])."""
        return self._replace(b=self.b[:, index].contiguous(), a=self.a[index].contiguous())

    def padded(self, rank: int) -> Pair:
        """With triplets of zeros up to ``rank``."""
        missing = rank - self.rank
        b, a = (
            self.b.new_zeros(self.b.shape[0], missing, *self.b.shape[2:]),
            self.a.new_zeros(missing, *self.a.shape[1:]),
        )
        return self._replace(b=torch.cat([self.b, b], 1), a=torch.cat([self.a, a]))


@dataclass(frozen=True)
class PlainAdapter:
    """A LoRA adapter in memory; every operation returns a new one.

    Args:
        config: PEFT's configuration, whose ranks are those of the pairs.
        pairs: B and A of each module by its name in the base model.
        rest: every other tensor of the file by its key there, without ``base_model.model.``.
        pruned: modules of rank 0, as far as they are known, with B [d_out, 0] and A [0, d_in].
        scores: importance of each triplet when the budget was last allocated, [r] by module, if it is known.
    """

    config: LoraConfig
    pairs: dict[str, Pair]
    rest: dict[str, Tensor] = field(default_factory=dict)
    pruned: dict[str, Pair] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: str | os.PathLike[str]) -> PlainAdapter:
        """The adapter in a folder: ``adapter_config.json`` beside ``adapter_model.safetensors`` or ``.bin``.

        Raises:
            ConfigError: there is no such adapter, it is not LoRA, or its files do not belong together.
        """
        path = Path(directory)
        settings = read_settings(path)
        if settings.get("peft_type") == "ADALORA":
            raise ConfigError(
                f"{path} holds a checkpoint of PEFT's AdaLoRA, which is not plain LoRA yet: adalora convert {path} OUT"
                " makes it so."
            )
        if settings.get("peft_type") != "LORA":
            raise ConfigError(f"{path} holds an adapter of type {short(settings.get('peft_type'))}, not LORA.")
        check_rank_pattern(settings, path / ADAPTER_FILES[1])
        start = settings.get("init_lora_weights")
        if isinstance(start, str) and start.startswith(_CHANGES_THE_BASE):
            raise ConfigError(
                f"{path} was started by init_lora_weights={start!r}, which changes the base model's weights too, so it"
                " is not an adapter of the plain base model. Let PEFT make it one: save_pretrained(...,"
                " path_initial_model_for_weight_conversion=...)."
            )
        if settings.get("target_parameters"):
            raise ConfigError(
                f"{path} adapts target_parameters, whose factors are shared by experts; leave it as it is."
            )
        known = {f.name for f in fields(LoraConfig) if f.init} - ONLY_AT_THE_START
        given = {key: value for key, value in settings.items() if key in known and value is not None}
        try:
            config = LoraConfig(**given)
        except Exception as error:  # whatever PEFT stumbles over in fields that only it knows
            raise ConfigError(f"{path}/{ADAPTER_FILES[1]} is not a configuration of LoRA: {error}") from error
        tensors, metadata = read_tensors(path)
        file = path / ADAPTER_FILES[0]
        about = {key: read_json(metadata.get(key, "{}"), f"the metadata of {file}") for key in (PRUNED, SCORES)}
        pruned = {name: Pair.empty(*shapes) for name, shapes in check_pruned(about[PRUNED], file).items()}
        scores = {name: torch.tensor(values) for name, values in check_scores(about[SCORES], file).items()}
        found = cls.of(config, tensors, pruned, str(path))
        if twice := sorted(set(found.pairs) & set(pruned)):
            raise ConfigError(f"{file}: its metadata says that {twice[0]} was pruned, but it has tensors.")
        return replace(found, scores=scores)

    @classmethod
    def of(
        cls,
        config: LoraConfig,
        tensors: Mapping[str, Tensor],
        pruned: Mapping[str, Pair] | None = None,
        source: str = "",
    ) -> PlainAdapter:
        """Sort a LoRA state dict, with keys as in a file, into pairs and the rest."""
        parts: dict[str, dict[str, Tensor]] = {}
        rest: dict[str, Tensor] = {}
        embeddings: set[str] = set()
        for key, value in tensors.items():
            key = key.removeprefix(PREFIX)
            match = _PAIR_KEY.fullmatch(key)
            is_pair = match is not None and bool(match["embedding"]) != bool(match["weight"])
            here, part = (parts.setdefault(match["name"], {}), match["part"]) if match and is_pair else (rest, key)
            if part in here:
                raise ConfigError(f"{source or 'this state dict'} holds {key} twice: one of two layers would be lost.")
            here[part] = value
            embeddings |= {match["name"]} if match and is_pair and match["embedding"] else set()
        if not parts:
            shown = ", ".join(sorted(tensors)[:2]) or "nothing"
            raise ConfigError(
                f"{source or 'this state dict'} holds no pair of lora_A.weight and lora_B.weight: {shown}."
            )
        pairs = {}
        patterns = Patterns(config.rank_pattern)
        for name, found in parts.items():
            if found.keys() != {"A", "B"}:
                missing = "AB".replace(next(iter(found)), "")
                raise ConfigError(f"{source}: {name} has no lora_{missing}; was its writing interrupted?")
            pair = Pair(found["B"], found["A"], name in embeddings)
            if not (pair.a.is_floating_point() and pair.b.is_floating_point() and pair.a.numel() and pair.b.numel()):
                raise ConfigError(
                    f"{source}: {name} has lora_A {list(pair.a.shape)} of {pair.a.dtype} and lora_B"
                    f" {list(pair.b.shape)} of {pair.b.dtype}, which is no pair of matrices of numbers."
                )
            expected = patterns.get(rank_owner(name), config.r)
            if pair.b.ndim < 2 or pair.a.ndim != pair.b.ndim or pair.b.shape[1] != pair.rank or pair.rank != expected:
                raise ConfigError(
                    f"{source}: {name} has lora_A {list(pair.a.shape)} and lora_B {list(pair.b.shape)}, which is not a"
                    f" pair of rank {expected}, as adapter_config.json says."
                )
            pairs[name] = pair
        return cls(config, pairs, rest, dict(pruned or {}))

    @property
    def matrices(self) -> int:
        """How many matrices share the budget."""
        return len(self.pairs) + len(self.pruned)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each module."""
        return {name: pair.rank for name, pair in self.pairs.items()}

    @property
    def live(self) -> int:
        """Triplets that are not padding."""
        return sum(int(pair.a.flatten(1).any(1).sum()) for pair in self.pairs.values())

    @cached_property
    def _alphas(self) -> Patterns:
        return Patterns(self.config.alpha_pattern, "alpha_pattern")

    def alpha(self, name: str) -> float:
        """lora_alpha of a module."""
        found: float = self._alphas.get(rank_owner(name), self.config.lora_alpha)
        return found

    def scale(self, name: str) -> float:
        """What PEFT multiplies B A of a module by."""
        rank = self.pairs[name].rank
        return self.alpha(name) / (math.sqrt(rank) if self.config.use_rslora else rank)

    # -------------------------------------------------------------------------------------------------- operations

    def unscaled(self) -> PlainAdapter:
        """The same update with a scale of 1 everywhere: the scale is folded into A (and into a trained bias of B)."""
        pairs, rest = dict(self.pairs), dict(self.rest)
        for name, pair in self.pairs.items():
            if (scale := self.scale(name)) != 1.0:
                pairs[name] = pair._replace(a=_times(pair.a, scale))
                if (bias := f"{name}.lora_B.bias") in rest:
                    rest[bias] = _times(rest[bias], scale)
        return self._with(pairs, rest)

    def truncate(self, average_rank: float) -> PlainAdapter:
        """Keep the ``average_rank`` x ``matrices`` best triplets of all modules together.

        The best are those of the highest importance, where it is known; otherwise see :func:`ranked`.

        Args:
            average_rank: of a matrix, which may be a fraction; the matrices that have been pruned to rank 0 already
                count where that is known.

        Raises:
            ConfigError: a rank of not even one triplet, or above what is there.
        """
        there = sum(self.ranks.values())
        check_rank("rank", average_rank)
        budget = math.floor(round(average_rank * self.matrices, 6))
        if budget < 1:
            raise ConfigError(f"rank {average_rank:g} for each of {self.matrices} matrices leaves no triplet at all.")
        if budget > there:
            raise ConfigError(
                f"rank {average_rank:g} for each of {self.matrices} matrices makes {budget} triplets, but the adapter"
                f" has {there} ({there / self.matrices:.1f} a matrix): "
                + (f"choose {there // self.matrices} or less." if there >= self.matrices else "it is smaller already.")
            )
        if budget == there:
            return self
        whole = self.unscaled()
        known = {name: len(scores) for name, scores in self.scores.items()} == self.ranks
        candidates = {name: (pair, self.scores[name]) if known else ranked(pair) for name, pair in whole.pairs.items()}
        every = torch.cat([score.float() for _, score in candidates.values()])
        sizes = [len(score) for _, score in candidates.values()]
        chosen = torch.split(global_topk(every, budget, sizes, [1] * len(sizes)), sizes)
        pairs, scores = {}, {}
        for (name, (pair, score)), live in zip(candidates.items(), chosen, strict=True):
            pairs[name], scores[name] = pair.select(live.nonzero().flatten()), score[live]
        return replace(whole, scores=scores if known else {})._with(pairs, whole.rest)

    def padded(self, rank: int | None = None) -> PlainAdapter:
        """Every pair at one rank, by triplets of zeros: r = lora_alpha = rank, and no patterns.

        Modules that were pruned away are in it again, as zeros: SGLang stacks q, k and v of a layer, LoRAX and Text
        Generation Inference one kind of module over all layers, and they miss the one that is not there.

        Args:
            rank: by default the largest there is.

        Raises:
            ConfigError: a rank below the largest.
        """
        largest = max(self.ranks.values())
        rank = largest if rank is None else rank
        if rank < largest:
            raise ConfigError(f"padding to rank {rank} would cut modules of rank {largest}: truncate first.")
        shapes = {name: (p.b.shape, p.a.shape) for name, p in (self.pruned | self.pairs).items()}
        sizes = {name: math.prod(b[:1] + b[2:]) + math.prod(a[1:]) for name, (b, a) in shapes.items()}  # of one triplet
        held = sum(sizes[name] * pair.rank for name, pair in self.pairs.items())
        check_padding(sum(size * rank for size in sizes.values()) - held, held)
        whole = self.unscaled()
        like = next(iter(whole.pairs.values())).a
        pairs = whole.pairs | {name: Pair(p.b.to(like), p.a.to(like), p.embedding) for name, p in self.pruned.items()}
        config = copy.copy(whole.config)
        config.exclude_modules = including(config.exclude_modules, self.pruned)
        everything = replace(whole, config=config, pruned={})
        return everything._with({name: pair.padded(rank) for name, pair in pairs.items()}, whole.rest)

    def to(self, dtype: torch.dtype) -> PlainAdapter:
        """Every floating point tensor in this type.

        Raises:
            ConfigError: a value that the type cannot hold.
        """

        def cast(name: str, value: Tensor) -> Tensor:
            if not value.is_floating_point():
                return value
            result = value.to(dtype)
            if not bool(result.isfinite().all()) and bool(value.isfinite().all()):
                largest = float(value.abs().max())
                raise ConfigError(
                    f"{name} holds {largest:.3g}, more than {str(dtype).removeprefix('torch.')} can"
                    f" ({torch.finfo(dtype).max:.3g}): use bfloat16 or float32."
                )
            return result

        pairs = {
            name: pair._replace(a=cast(f"{name}.lora_A", pair.a), b=cast(f"{name}.lora_B", pair.b))
            for name, pair in self.pairs.items()
        }
        return replace(self, pairs=pairs, rest={key: cast(key, value) for key, value in self.rest.items()})

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor by its key in the file, without ``base_model.model.``."""
        tensors = dict(self.rest)
        for name, pair in self.pairs.items():
            for part, value in (("A", pair.a), ("B", pair.b)):
                tensors[f"{name}.lora_embedding_{part}" if pair.embedding else f"{name}.lora_{part}.weight"] = value
        return tensors

    def write(self, directory: str | os.PathLike[str]) -> Path:
        """Write the two files, whole or not at all; returns the directory."""
        config = copy.copy(self.config)
        config.inference_mode = True
        for name in ("target_modules", "exclude_modules"):  # PEFT keeps sets, whose order changes from run to run
            value = getattr(config, name)
            setattr(config, name, sorted(value) if isinstance(value, set) else value)
        with replacing(directory) as beside:
            tensors = {PREFIX + key: value for key, value in self.state_dict().items()}
            save_tensors(tensors, beside, {PRUNED: shapes_of(self.pruned), SCORES: listed(self.scores)})
            config.save_pretrained(str(beside))
        return Path(directory)

    def _with(self, pairs: dict[str, Pair], rest: dict[str, Tensor]) -> PlainAdapter:
        """These pairs at scale 1, those of rank 0 left out."""
        ranks: dict[str, int] = {}
        for name, pair in pairs.items():
            ranks[rank_owner(name)] = max(pair.rank, ranks.get(rank_owner(name), 0))
        kept = without_empty({name: pair.padded(ranks[rank_owner(name)]) for name, pair in pairs.items()}, rest)
        ranks |= {name: kept[name].rank if name in kept else 0 for name in ranks}
        empty = {name: pair for name, pair in pairs.items() if name not in kept}
        scores = {  # triplets of zeros come last and count nothing
            name: torch.cat([score, score.new_zeros(kept[name].rank - len(score))])
            for name, score in self.scores.items()
            if name in kept
        }
        return PlainAdapter(plain_config(self.config, ranks), kept, rest, self.pruned | empty, scores)


def shapes_of(pruned: Mapping[str, Pair]) -> dict[str, tuple[list[int], list[int], bool]]:
    """What :meth:`Pair.empty` makes them of again."""
    return {name: (list(pair.b.shape), list(pair.a.shape), pair.embedding) for name, pair in pruned.items()}


def listed(scores: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """As JSON can hold it."""
    return {name: score.tolist() for name, score in scores.items()}


def ranked(pair: Pair) -> tuple[Pair, Tensor]:
    """A pair's triplets in the order in which they matter, and how much each does: ‖ΔW_i‖_F, [r].

    Singular values: of all updates with so many triplets, the best ones by this score are the nearest to the whole in
    the Frobenius norm, whoever trained the pair. Triplets of AdaLoRA are nearly this already: P and Q are kept
    orthonormal, so ‖ΔW_i‖_F = s·ρ·|λ_i|.
    """
    p, lam, q = decomposed(pair)
    rows = lam.unsqueeze(1) * q
    b, a = p.reshape(len(p), len(lam), *pair.b.shape[2:]), rows.reshape(len(lam), *pair.a.shape[1:])
    return pair._replace(b=b.to(pair.b.dtype), a=a.to(pair.a.dtype)), lam


def decomposed(pair: Pair) -> Factors:
    """B A as singular triplets; ConfigError where its numbers are too large for it."""
    try:
        found = from_product(pair.b.flatten(1), pair.a.flatten(1))
        if all(bool(part.isfinite().all()) for part in found):
            return found
    except RuntimeError:  # of linear algebra, which found numbers that are not finite
        pass
    raise ConfigError("the adapter's numbers are too large: a product of A and B is not finite. Has training diverged?")


def without_empty(pairs: Mapping[str, Pair], rest: Collection[str]) -> dict[str, Pair]:
    """Leave out pairs of rank 0. One zero triplet stays where something else was trained in the module (a bias, a DoRA
    magnitude), and in the first module when nothing else is left: PEFT loads no adapter without layers."""
    nothing_left = not any(pair.rank for pair in pairs.values())
    kept = {}
    for index, (name, pair) in enumerate(pairs.items()):
        needed = any(key.startswith(f"{name}.") for key in rest) or (nothing_left and index == 0)
        if pair.rank or needed:
            kept[name] = pair if pair.rank else pair.padded(1)
    return kept


def _times(tensor: Tensor, factor: float) -> Tensor:
    return (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * factor).to(tensor.dtype)
