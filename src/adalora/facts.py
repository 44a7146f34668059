"""What a run finds out, and writes into its recipe."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class RateTrial(_Section):
    """One rate of a search."""

    rate: float
    loss: float | None = None  # None: it was not finite
    stopped_at: int | None = None  # the step, of a trial that was not worth going on with

    @property
    def in_words(self) -> str:
        if self.loss is None:
            return "not finite"
        return f"{self.loss:.3f}" + (f" (stopped at step {self.stopped_at})" if self.stopped_at else "")


class RateSearch(_Section):
    """How a learning rate was found."""

    steps: int = Field(description="Optimizer steps of a trial.")
    total_steps: int = Field(description="Optimizer steps of the training.")
    rows: int = Field(description="Training rows that the loss was measured on.")
    seconds: float
    trials: list[RateTrial]


class Facts(_Section):
    """What a run found out about its input. Written by the run, replaced by the next one."""

    train_rows: int
    eval_rows: int
    train_digest: str = Field(description="SHA-256 of the training rows, by which --resume knows them again.")
    versions: dict[str, str] = Field(description="Packages that the run used.")
    learning_rate: RateSearch | None = Field(None, description="How it was found, where the recipe said auto.")
