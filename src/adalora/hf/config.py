"""The configuration: a ``peft.LoraConfig`` with a budget."""

from __future__ import annotations

import difflib
import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field, fields
from typing import Any, Literal, get_args

from peft import LoraConfig, PeftConfig

from ..core.errors import ConfigError, UnknownFieldError
from ..core.orthogonality import Orthogonality
from ..core.schedule import Span, initial_rank
from ..core.settings import Settings, check_rank
from ..core.start import BATCHES, SWEEPS
from ..core.triplets import INITIALIZATIONS, Initialization, automatic_gain
from .plain_config import plain_config

NOT_WITH_ADALORA = {
    "target_parameters": "PEFT keeps the factors of all experts in one pair of matrices, whose ranks cannot differ.",
    "use_bdlora": "block-diagonal factors have no singular vectors.",
    "kasa_config": "it has singular values and a regulariser of its own.",
    "monteclora_config": "it draws its factors at random.",
    "velora_config": "it compresses the input of lora_A, whose place is taken by Q and the singular values.",
    "arrow_config": "it routes among adapters that have been trained; train them with AdaLoRA, export them, and route.",
}
Kernel = Literal["fused", "reference"]
KERNELS: tuple[str, ...] = get_args(Kernel)


@dataclass
class AdaLoraConfig(LoraConfig):
    """AdaLoRA (arXiv 2303.10512) as a LoRA with singular values and a budget.

    All fields of ``peft.LoraConfig`` keep their meaning; PEFT builds the layers with ``init_r`` as their rank, so the
    scaling is lora_alpha / init_r (lora_alpha / √init_r with ``use_rslora``) and stays so when ranks shrink. Lengths of
    training are steps (int), a fraction of all steps (float below 1) or epochs (``"2 epochs"``).

    Args:
        target_r: average rank a matrix after pruning; ``r`` is read as this when it is not given. It may be a fraction:
            with 0.25, every fourth matrix keeps a triplet.
        init_r: rank before pruning; by default one and a half times ``target_r``, as in the paper, rounded up: a
            fraction starts at rank 1, the least at which every matrix can be tried.
        budget: what may live after pruning, all matrices together, as a number of ``budget_unit``; in the place of
            ``target_r``, and with an ``init_r``.
        budget_unit: ``triplets`` (paper) or ``parameters``, those that are saved of a triplet: ``target_r`` then stands
            for as many as LoRA of that rank has, and what is saved is never more. What is trained beside the triplets
            (``modules_to_save``, biases, DoRA's magnitudes) does not count.
        rank_by: ``score``, or ``score_per_parameter``: the score of a triplet over its number of parameters.
        tinit: warm-up before pruning starts.
        tfinal: final phase, trained with the ranks fixed.
        deltaT: distance between two allocations; ``delta_t`` is read as this.
        beta1: decay rate of the smoothed sensitivity.
        beta2: decay rate of the uncertainty.
        orth_reg_weight: weight γ of the orthogonality regulariser, which is never part of the reported loss.
        total_step: optimizer steps of the whole training. ``AdaLoraCallback`` fills it in under a Trainer.
        importance: metric that scores the triplets; see ``adalora.core.importance``.
        policy: ``global_topk`` ranks all matrices together; ``uniform`` gives each the same.
        schedule: ``cubic``, ``linear`` or ``constant``.
        orthogonality: ``squared`` (paper) or ``frobenius`` (mean of plain norms: the authors' code and PEFT).
        initialization: of P and Q: ``orthonormal``, ``gaussian`` (paper, standard deviation 0.02), or ``gradient``, the
            largest singular triplets of the loss's gradient on a few training batches (see ``adalora.start``).
        start_batches: training batches that ``gradient`` looks at, in each process.
        start_sweeps: how often it goes through them; an even number.
        singular_gain: constant ρ in W = W0 + s·ρ·P Λ Q; ``"auto"`` is √(d_out / 3), 1.0 the paper.
        vector_norm: length c of the vectors in P and Q, by which ρ is then divided, twice. ΔW is the same; under Adam,
            whose steps know no scale, directions turn 1/c times as fast beside Λ.
        sensitivity_at: weights at which sensitivity is taken: ``before_step`` (paper) or ``after_step`` (their code).
        compact: slice pruned triplets away when the final phase begins (False: only in what is saved).
        kernel: ``fused`` computes linear layers in few passes; ``reference`` as PEFT does, term by term.

    Raises:
        ConfigError: a value that cannot be meant, with what to do about it.
    """

    target_r: float | None = field(
        default=None, metadata={"help": "Average rank a matrix after pruning; may be a fraction."}
    )
    init_r: int | None = field(default=None, metadata={"help": "Rank of every matrix before pruning."})
    tinit: Span = field(default=0.1, metadata={"help": "Warm-up before pruning: steps, fraction or '2 epochs'."})
    tfinal: Span = field(default=0.3, metadata={"help": "Final phase with fixed ranks: steps, fraction or epochs."})
    deltaT: Span = field(  # noqa: N815 (PEFT's name)
        default=0.01, metadata={"help": "Distance between allocations: steps, fraction or epochs."}
    )
    beta1: float = field(default=0.85, metadata={"help": "Decay rate of the smoothed sensitivity."})
    beta2: float = field(default=0.85, metadata={"help": "Decay rate of the uncertainty."})
    orth_reg_weight: float = field(default=0.1, metadata={"help": "Weight of the orthogonality regulariser."})
    total_step: int | None = field(default=None, metadata={"help": "Optimizer steps of the whole training."})
    importance: str = field(default="sensitivity_uncertainty", metadata={"help": "Metric that scores triplets."})
    policy: str = field(default="global_topk", metadata={"help": "Who competes with whom for the budget."})
    budget: int | None = field(default=None, metadata={"help": "The target as a number of budget_unit."})
    budget_unit: Literal["triplets", "parameters"] = field(
        default="triplets", metadata={"help": "What the budget counts."}
    )
    rank_by: Literal["score", "score_per_parameter"] = field(
        default="score", metadata={"help": "What triplets are ranked by."}
    )
    schedule: str = field(default="cubic", metadata={"help": "Curve from the initial to the target budget."})
    orthogonality: Orthogonality = field(default="squared", metadata={"help": "Form of the regulariser."})
    initialization: Initialization = field(default="orthonormal", metadata={"help": "Initial P and Q."})
    start_batches: int = field(default=BATCHES, metadata={"help": "Batches that a gradient start looks at."})
    start_sweeps: int = field(default=SWEEPS, metadata={"help": "How often it goes through them."})
    singular_gain: float | Literal["auto"] = field(default="auto", metadata={"help": "Constant gain of the update."})
    vector_norm: float = field(default=1.0, metadata={"help": "Length of the vectors in P and Q."})
    sensitivity_at: Literal["before_step", "after_step"] = field(
        default="before_step", metadata={"help": "Weights at which sensitivity is taken."}
    )
    compact: bool = field(default=True, metadata={"help": "Slice pruned triplets away in the final phase."})
    kernel: Kernel = field(default="fused", metadata={"help": "How linear layers compute their update."})
    delta_t: InitVar[Span | None] = None

    @classmethod
    def paper(cls, **settings: Any) -> AdaLoraConfig:
        """The paper's choices throughout: Gaussian P and Q, no gain, squared penalty, full score, γ = 0.1, masks."""
        choices: dict[str, Any] = {
            "initialization": "gaussian",
            "singular_gain": 1.0,
            "vector_norm": 1.0,
            "orthogonality": "squared",
            "importance": "sensitivity_uncertainty",
            "policy": "global_topk",
            "budget_unit": "triplets",
            "rank_by": "score",
            "schedule": "cubic",
            "sensitivity_at": "before_step",
            "orth_reg_weight": 0.1,
            "beta1": 0.85,
            "beta2": 0.85,
            "compact": False,
        }
        return cls(**{**choices, **settings})

    def __new__(cls, *args: Any, **given: Any) -> AdaLoraConfig:
        known = list(inspect.signature(cls.__init__).parameters)[1:]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                advice = f"did you mean {near[0]}?" if near else "its fields are peft.LoraConfig's and a budget's."
                # PEFT knows files of later versions by these words, and leaves out what it does not know
                raise UnknownFieldError(f"{cls.__name__} got an unexpected keyword argument {name!r}: {advice}")
        return super().__new__(cls)

    def __post_init__(self, delta_t: Span | None) -> None:
        if delta_t is not None:
            if self.deltaT not in (delta_t, _default("deltaT")):
                raise ConfigError(
                    f"delta_t={delta_t!r} and deltaT={self.deltaT!r} are two names of one field: give one."
                )
            self.deltaT = delta_t
        if self.budget is None and self.target_r is None:
            self.target_r = self.r
        if self.target_r is not None:
            check_rank("target_r", self.target_r)
        if self.init_r is not None and (type(self.init_r) is not int or self.init_r < 1):
            raise ConfigError(f"init_r={self.init_r!r} must be a whole number, at least 1.")
        if self.init_r is None:
            if self.target_r is None:
                raise ConfigError(
                    f"budget={self.budget} does not say at which rank to start: give init_r, the rank of every matrix"
                    " before pruning."
                )
            self.init_r = initial_rank(self.target_r)
        if self.target_r is not None and self.init_r < self.target_r:
            raise ConfigError(
                f"init_r={self.init_r} is smaller than target_r={self.target_r}: AdaLoRA starts at init_r and prunes"
                f" down to target_r. Use init_r={initial_rank(self.target_r)} (half as much again, as the paper)"
                f" or init_r={math.ceil(self.target_r)} for no pruning."
            )
        if self.r not in (self.init_r, self.target_r, _default("r")):
            raise ConfigError(
                f"r={self.r} beside target_r={self.target_r} and init_r={self.init_r} says nothing: leave r out, or"
                " give it alone to mean target_r."
            )
        self.r = self.init_r  # the rank PEFT builds the layers with
        if self.initialization not in INITIALIZATIONS:
            raise ConfigError(f"initialization={self.initialization!r}: choose one of {sorted(INITIALIZATIONS)}.")
        for name, step, least in (("start_batches", 1, 1), ("start_sweeps", 2, 2)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least or value % step:
                raise ConfigError(f"{name}={value!r} must be a whole number{', even' * (step == 2)}, at least {least}.")
        if self.initialization == "gradient" and self.init_lora_weights is not True:
            raise ConfigError(
                f"initialization='gradient' beside init_lora_weights={self.init_lora_weights!r}: both say where P and Q"
                " start. Leave one out."
            )
        if self.singular_gain != "auto" and not (
            isinstance(self.singular_gain, (int, float)) and 0 < self.singular_gain < math.inf
        ):
            raise ConfigError(f"singular_gain={self.singular_gain!r} must be a positive number or 'auto'.")
        self.check_kind()
        if self.kernel not in KERNELS:
            raise ConfigError(f"kernel={self.kernel!r} is not known; choose one of {sorted(KERNELS)}.")
        settings = self.settings()  # checks the rest
        if settings.total_step and self.target_r and self.init_r > self.target_r and not settings.counts_epochs:
            settings.schedule(self.init_r, 1, settings.total_step, None)  # a step must be left for pruning
        super().__post_init__()  # type: ignore[no-untyped-call]
        # of the adapter that was made by this configuration: its ranks in a file
        self._live: Callable[[AdaLoraConfig], dict[str, int] | None] | None = None

    def check_kind(self) -> None:
        """ConfigError where PEFT is asked for another kind of adapter: also when layers are made, since fields can be
        set at any time."""
        for name, why in NOT_WITH_ADALORA.items():
            if getattr(self, name):
                raise ConfigError(f"{name} does not go with AdaLoRA: {why} Leave it out, or use peft.LoraConfig.")
        if self.init_lora_weights == "mica":
            raise ConfigError(
                "init_lora_weights='mica' does not go with AdaLoRA: it trains one factor alone. Leave it out, or use"
                " peft.LoraConfig."
            )

    def settings(self) -> Settings:
        """What the allocator is asked to do."""
        return Settings(
            target_rank=self.target_r,
            t_init=self.tinit,
            t_final=self.tfinal,
            delta_t=self.deltaT,
            total_step=self.total_step,
            curve=self.schedule,
            beta1=self.beta1,
            beta2=self.beta2,
            metric=self.importance,
            policy=self.policy,
            budget=self.budget,
            budget_unit=self.budget_unit,
            rank_by=self.rank_by,
            orthogonality_weight=self.orth_reg_weight,
            orthogonality=self.orthogonality,
            sensitivity_at=self.sensitivity_at,
            compact=self.compact,
            vector_norm=self.vector_norm,
            gradient_start=self.initialization == "gradient",
        )

    def gain(self, d_out: int) -> float:
        """ρ / c² for a matrix with ``d_out`` outputs."""
        gain = automatic_gain(d_out) if self.singular_gain == "auto" else float(self.singular_gain)
        return gain / self.vector_norm**2

    def plain(self, ranks: dict[str, int]) -> LoraConfig:
        """The configuration of the ordinary LoRA adapter that an export with these ranks is.

        Args:
            ranks: rank of each module by name relative to the base model; modules with rank 0 are excluded.
        """
        return plain_config(self, ranks)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``: of a live adapter, that of the plain LoRA which its weights are."""
        plain = self.as_plain()
        if plain is None:
            super().save_pretrained(save_directory, **kwargs)
        else:
            plain.save_pretrained(save_directory, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """All fields: of a live adapter, those of the plain LoRA which its weights are, for libraries that write them
        beside its tensors."""
        plain = self.as_plain()
        found: dict[str, Any] = super().to_dict() if plain is None else plain.to_dict()  # type: ignore[no-untyped-call]
        return found

    def as_plain(self) -> LoraConfig | None:
        """The configuration of the ordinary LoRA adapter that a live adapter is now, or was when PEFT last asked for
        its weights, unless something was trained or written since; None where no adapter is live."""
        ranks = None if self._live is None else self._live(self)
        if ranks is None:
            return None
        plain = self.plain(ranks)
        for name in ("inference_mode", "base_model_name_or_path", "task_type", "auto_mapping", "revision"):
            setattr(plain, name, getattr(self, name))
        for name in ("target_modules", "exclude_modules"):  # PEFT keeps sets, whose order changes from run to run
            value = getattr(plain, name)
            setattr(plain, name, sorted(value) if isinstance(value, set) else value)
        return plain

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """Read back what this class wrote before any export (PEFT would choose the class by ``peft_type``).

        Fields of another version are left out, with a warning.

        Raises:
            ConfigError: this is no adapter's configuration.
        """
        unknown = sorted(set(kwargs) - {f.name for f in fields(cls)} - {"delta_t"})
        if unknown and "peft_type" not in kwargs:
            raise ConfigError(
                f"The {cls.__name__} config that is trying to be loaded is missing required keys: {{'peft_type'}}."
            )
        if unknown:
            warnings.warn(
                f"Unexpected keyword arguments {unknown} for class {cls.__name__}, these are ignored. Was the"
                " configuration written by another version?",
                stacklevel=2,
            )
        return cls(**{name: value for name, value in kwargs.items() if name not in {*unknown, "peft_type"}})


def _default(name: str) -> Any:
    return AdaLoraConfig.__dataclass_fields__[name].default
