"""The update of one matrix as a learned singular value decomposition (paper, section 3.1, equation 3).

    W = W0 + s·ρ·P Λ Q        P: [d_out, r]   Λ: diag(λ), λ: [r]   Q: [r, d_in]

Letters: P left vectors, Λ/λ singular values, Q right vectors, r rank, ρ constant gain of one matrix, s scaling of
LoRA (kept by the layer that adds the update to its output).
A *triplet* i is (P[:, i], λ[i], Q[i, :]).

The factors of a convolution keep the shapes of its two kernels, Q [r, in, *kernel] and P [out, r, 1, ...]: a triplet
is the same slice there, and all mathematics reads them as matrices, [r, in·kernel] and [out, r].
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's name for it)

from .errors import ConfigError
from .sharded import is_sharded, like

Initialization = Literal["orthonormal", "gaussian", "gradient"]
INITIALIZATIONS: tuple[str, ...] = get_args(Initialization)
TRIPLET_DIMS = (1, 0, 0)  # of P, Λ and Q: the dimension that counts triplets
GAUSSIAN_STD = 0.02  # the authors' initial standard deviation of P and Q


class Factors(NamedTuple):
    """The three parts of one update as plain tensors."""

    p: Tensor  # [d_out, r]
    lam: Tensor  # [r]
    q: Tensor  # [r, d_in]


class SingularProjection(nn.Module):
    """The right half of an update: x -> ρ·Λ Q x, in the place of LoRA's ``lora_A``.

    Args:
        right_vectors: Q, [r, d_in], or [r, in, *kernel] of a convolution.
        gain: ρ, a constant. Under Adam it acts as a ρ times larger learning rate for Λ alone.
        apply: (x, Q) -> Q x; a convolution brings its stride and padding along.
    """

    def __init__(
        self, right_vectors: Tensor, gain: float = 1.0, apply: Callable[[Tensor, Tensor], Tensor] = F.linear
    ) -> None:
        super().__init__()
        self.right_vectors = nn.Parameter(right_vectors)
        self.singular_values = nn.Parameter(right_vectors.new_zeros(right_vectors.shape[0]))
        self.gain = gain
        self.apply_vectors = apply
        self.allocator: Any = None  # whose budget the triplets are under, if any
        # of a fused layer: the type that it computes in -> Λ Q and P
        self.fused: Callable[[torch.dtype], tuple[Tensor, Tensor]] | None = None
        self.known: list[Tensor] | None = None  # of P, λ and Q, something from when they were made or loaded

    @property
    def weight(self) -> Tensor:
        """ρ·Λ Q, shaped as Q: what LoRA calls A. Whatever reads ``lora_A.weight`` (merge, DoRA, ...) stays right."""
        return self._along_triplets(self.right_vectors.ndim - 1) * self.right_vectors

    @property
    def in_features(self) -> int:
        return self.right_vectors.shape[1]

    @property
    def out_features(self) -> int:
        return self.right_vectors.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., d_in] -> [..., r]; of a convolution, [..., in, *size] -> [..., r, *size]."""
        return self.apply_vectors(x, self.right_vectors) * self._along_triplets(self.right_vectors.ndim - 2)

    def _along_triplets(self, trailing: int) -> Tensor:
        """ρ·λ with so many trailing dimensions of size 1: [r, 1, ...]."""
        return (self.gain * self.singular_values).view(-1, *[1] * trailing)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, rank={self.out_features}, gain={self.gain:.4g}"


class HasWeight(Protocol):
    """Anything whose ``weight`` is P: LoRA's ``lora_B``, a linear layer or a convolution of size 1."""

    @property
    def weight(self) -> Any: ...


@dataclass(eq=False)
class Triplets:
    """The triplets of one adapted matrix. Holds the modules, not the parameters, which wrappers may replace.

    Args:
        name: of the adapted module, unique in its allocator.
        left: its ``weight`` is P, [d_out, r] (LoRA's ``lora_B``).
        right: holds Q and Λ.
    """

    name: str
    left: HasWeight
    right: SingularProjection

    @property
    def parameters_each(self) -> int:
        """Parameters of one triplet as saved: a column of P and a row of Q, which λ is folded into."""
        return int(self.left.weight.shape[0] + self.right.right_vectors.shape[1:].numel())

    @classmethod
    def create(
        cls,
        name: str,
        d_out: int,
        d_in: int,
        rank: int,
        *,
        initialization: Initialization = "orthonormal",
        gain: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> Triplets:
        """A fresh update with Λ = 0, for models that are built without PEFT."""
        left = nn.Linear(rank, d_out, bias=False, dtype=dtype)
        triplets = cls(name, left, SingularProjection(torch.empty(rank, d_in, dtype=dtype), gain))
        triplets.reset(initialization)
        return triplets

    @property
    def p(self) -> nn.Parameter:
        return self.left.weight  # type: ignore[no-any-return]

    @property
    def lam(self) -> nn.Parameter:
        return self.right.singular_values

    @property
    def q(self) -> nn.Parameter:
        return self.right.right_vectors

    @property
    def parameters(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        return self.p, self.lam, self.q

    @property
    def factors(self) -> Factors:
        """P, λ, Q as matrices: [d_out, r], [r], [r, d_in] (views)."""
        return Factors(self.p.flatten(1), self.lam, self.q.flatten(1))

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the update as a matrix."""
        return self.p.shape[0], math.prod(self.q.shape[1:])

    @property
    def rank(self) -> int:
        return self.lam.shape[0]

    def delta(self, scale: float = 1.0) -> Tensor:
        """ΔW = s·ρ·P Λ Q, [d_out, d_in]."""
        p, lam, q = self.factors
        return scale * (p @ ((self.right.gain * lam).unsqueeze(1) * q))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """x: [..., d_in] -> s·ρ·P Λ Q x: [..., d_out]. The plain path that faster ones are tested against."""
        return scale * F.linear(self.right(x), self.p)

    @torch.no_grad()
    def reset(self, initialization: Initialization = "orthonormal", vector_norm: float = 1.0) -> None:
        """Λ = 0 (so that W = W0) and new P, Q: orthonormal by QR, or the authors' Gaussian(0, 0.02).

        Orthogonal vectors have the length ``vector_norm``. ``gradient`` is ``orthonormal`` until
        :mod:`adalora.core.start` has looked at the loss.
        """
        if initialization not in INITIALIZATIONS:
            raise ConfigError(
                f"initialization={initialization!r} is not known; choose one of {sorted(INITIALIZATIONS)}."
            )
        self.lam.zero_()
        for vectors in (self.p, self.q):
            if initialization == "gaussian":
                vectors.normal_(0.0, GAUSSIAN_STD)
            else:  # QR has no half-precision kernels
                vectors.copy_(nn.init.orthogonal_(torch.empty_like(vectors, dtype=torch.float32), vector_norm))

    @torch.no_grad()
    def assign(self, factors: Factors) -> None:
        """Take over these values, and their rank. Parameters stay the same objects; stale gradients are dropped.

        Matrices are brought to the shapes of a convolution's factors.
        """
        rank = len(factors.lam)
        for parameter, value, dim in zip(self.parameters, factors, TRIPLET_DIMS, strict=True):
            shape = [rank if d == dim else size for d, size in enumerate(parameter.shape)]
            value = value.detach().to(parameter.device, parameter.dtype).reshape(shape)
            parameter.grad = None
            if value.shape == parameter.shape:
                parameter.copy_(like(parameter, value))
            else:
                _replace(parameter, value.clone(memory_format=torch.contiguous_format), None)

    def remember(self) -> None:
        """P, Λ, Q are what they were made or loaded as: keeps λ and one entry of each vector; of shards, nothing."""
        self.right.known = None if self.is_sharded or self.lam.is_meta else [part.clone() for part in self._looked_at]

    @property
    def have_moved(self) -> bool:
        """Whether λ and the vectors are others than what was remembered, as after training. (λ alone may have been
        written by hand; a cast to a narrower type and back moves nothing.)"""
        if self.right.known is None or self.lam.is_meta:
            return False
        pairs = [
            (now.float(), was.to(now.device).float())
            for now, was in zip(self._looked_at, self.right.known, strict=True)
        ]
        if any(now.shape != was.shape for now, was in pairs):
            return False
        p, lam, q = (not torch.allclose(now, was, rtol=2**-7, atol=1e-7) for now, was in pairs)
        return lam and (p or q)

    @property
    def _looked_at(self) -> Factors:
        p, lam, q = (part.detach() for part in self.factors)
        return Factors(p[0], lam, q[:, 0])

    @property
    def is_sharded(self) -> bool:
        return any(map(is_sharded, self.parameters))

    def drop_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def is_resizable(self, optimizers: Sequence[torch.optim.Optimizer] = ()) -> bool:
        """Whether the rank can change in memory.

        Not while something else holds the parameters' storage (a retained graph), nor with a state of
        an optimizer that does not come apart by triplets: blocks of a flat tensor, as 8-bit optimizers and LBFGS keep.
        """
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers) or self.is_sharded:
            return False
        states = [
            (value, parameter.shape, dim)
            for parameter, dim in zip(self.parameters, TRIPLET_DIMS, strict=True)
            for kept in states_of(optimizers, parameter)
            for value in kept.values()
        ]
        return all(_is_free(parameter) for parameter in self.parameters) and all(
            _state_dim(*state) is not None for state in states
        )

    @torch.no_grad()
    def keep(self, index: Tensor, optimizers: Sequence[torch.optim.Optimizer] = ()) -> None:
        """Slice P, Λ, Q, their gradients and optimizers' states down to the triplets in ``index`` (int64, [k])."""
        for parameter, dim in zip(self.parameters, TRIPLET_DIMS, strict=True):

            def cut(tensor: Tensor, dim: int = dim) -> Tensor:
                return tensor.index_select(dim, index).contiguous()

            for state in states_of(optimizers, parameter):
                for key, value in state.items():
                    state_dim = _state_dim(value, parameter.shape, dim)
                    if isinstance(value, Tensor) and state_dim is not None and state_dim >= 0:
                        state[key] = cut(value, state_dim)
            _replace(parameter, cut(parameter.data), None if parameter.grad is None else cut(parameter.grad))


def states_of(optimizers: Sequence[torch.optim.Optimizer], parameter: Tensor) -> Iterator[dict[str, Any]]:
    """What optimizers keep about a parameter."""
    for optimizer in optimizers:
        if parameter in optimizer.state:  # looking it up would make one
            yield optimizer.state[parameter]


def _state_dim(value: object, shape: torch.Size, dim: int) -> int | None:
    """Along which dimension a value of an optimizer's state has one entry a triplet: -1 for none, None if unknown.

    Known are moments of the parameter's shape, and factored second moments of its rows and columns.
    """
    if not isinstance(value, Tensor):
        return None if isinstance(value, (list, tuple, dict)) else -1
    if value.numel() <= 1 and value.shape != shape:
        return -1  # a step counter
    if type(value) not in (Tensor, nn.Parameter) or not value.is_floating_point():
        return None  # packed or quantized
    if value.shape == shape:
        return dim
    if len(shape) == 2:
        rank, other = shape[dim], shape[1 - dim]
        along, across = torch.Size([rank]), torch.Size([other])
        kept = torch.Size([1, rank] if dim == 1 else [rank, 1]), torch.Size([other, 1] if dim == 1 else [1, other])
        if value.shape in (kept[0], along) and rank != other:
            return dim if value.ndim == 2 else 0
        if value.shape in (kept[1], across) and rank != other:
            return -1
    return None


def _replace(parameter: nn.Parameter, data: Tensor, gradient: Tensor | None) -> None:
    """Give a parameter another shape without changing which object it is.

    ``parameter.data = data`` would do until the next backward pass: a loop that still holds its last loss also holds
    the node that accumulates this parameter's gradient, which remembers the old shape.
    """
    # An empty one still requires a gradient: PEFT turns all of them on when an adapter was disabled for a while, and
    # activation checkpointing compares what was saved before with what is saved after.
    replacement = nn.Parameter(data, requires_grad=parameter.requires_grad)
    replacement.grad = gradient if data.numel() else None
    replacement.__dict__.update(parameter.__dict__)
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        setattr(replacement, hooks, getattr(parameter, hooks))
    torch.clear_autocast_cache()  # in a step under autocast it holds a weak reference, which swap_tensors refuses
    torch.utils.swap_tensors(parameter, replacement)  # type: ignore[no-untyped-call]
    hooks_after = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    if not data.numel() and parameter.requires_grad and _drop_empty_gradient not in hooks_after.values():
        parameter.register_post_accumulate_grad_hook(_drop_empty_gradient)  # type: ignore[no-untyped-call]


def _drop_empty_gradient(parameter: Tensor) -> None:
    """Some optimizers trip over empty tensors, and so does clipping by the infinity norm."""
    if not parameter.numel():
        parameter.grad = None


def _is_free(parameter: nn.Parameter) -> bool:
    """Whether nothing but its module and a gradient accumulator holds the tensor (what swap_tensors asks for)."""
    if weakref.getweakrefs(parameter):
        return False
    if parameter._use_count() == 2 and parameter.requires_grad:  # type: ignore[attr-defined]
        torch.autograd.graph.get_gradient_edge(parameter)  # would raise the count if it had to make the accumulator
        return bool(parameter._use_count() == 2)  # type: ignore[attr-defined]
    return bool(parameter._use_count() == 1)  # type: ignore[attr-defined]


def automatic_gain(d_out: int) -> float:
    """ρ = √(d_out / 3): Adam's first step of λ then moves ΔW as far as its first step of LoRA's B does.

    One Adam step moves every entry by the learning rate: LoRA's ΔW by lr·√d_out·‖A_i‖ with ‖A_i‖ = √(1/3), ours by
    lr·ρ·‖P_i‖‖Q_i‖ with unit vectors.
    """
    return math.sqrt(d_out / 3)


@torch.no_grad()
def from_product(b: Tensor, a: Tensor) -> Factors:
    """The singular value decomposition of B A without ever forming it: QR of both factors, SVD of the small core.

    Args:
        b: [d_out, r], or [out, r, 1, ...]
        a: [r, d_in], or [r, in, *kernel]

    Returns:
        P with orthonormal columns, λ in descending order, Q with orthonormal rows, so that P Λ Q = B A; their rank
        is min(r, d_out, d_in).
    """
    dtype = torch.promote_types(b.dtype, torch.float32)  # QR and SVD have no half-precision kernels
    left, left_core = torch.linalg.qr(b.flatten(1).to(dtype))
    right, right_core = torch.linalg.qr(a.flatten(1).to(dtype).T)
    u, lam, vh = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    return Factors(left @ u, lam, vh @ right.T)


@torch.no_grad()
def from_rows(b: Tensor, a: Tensor) -> Factors:
    """Read B A as triplets without mixing them: P = B, λ_i = ‖A_i‖, Q_i = A_i / ‖A_i‖ (inverse of :func:`to_product`).

    Rows that are zero keep λ = 0 and Q = 0.
    """
    rows = a.flatten(1).to(torch.promote_types(a.dtype, torch.float32))  # small norms underflow in half precision
    lam = rows.norm(dim=1)
    q = rows / lam.clamp_min(torch.finfo(rows.dtype).tiny).unsqueeze(1)
    return Factors(b.flatten(1), lam.to(a), q.to(a))


@torch.no_grad()
def to_product(factors: Factors, scale: float) -> tuple[Tensor, Tensor]:
    """An ordinary LoRA pair with scale 1: B = P, A = s·ρ·Λ Q, where ``scale`` is s·ρ."""
    return factors.p, (scale * factors.lam).unsqueeze(1) * factors.q
