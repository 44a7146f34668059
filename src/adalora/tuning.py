"""``learning_rate: auto``: a short search on a part of the training rows and steps, with Optuna.

Rates are tried one after the other, half a decade apart, from the method's usual one towards where the loss falls. Each
trial is a whole training in small (warm-up, budget and decay included) whose loss is measured on training rows that it
does not see; evaluation rows are never looked at. The study is a file, so a search that was killed goes on.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import torch
from optuna.pruners import MedianPruner
from optuna.samplers import RandomSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from .core.allocator import Allocator
from .facts import RateSearch, RateTrial
from .files import write_text
from .hf.adapters import allocator
from .preparation import MOST_TRIALS, Course, Prepared, ready
from .reading import Material, divide
from .recipe import Recipe, differences, dump, validate
from .recipe_text import parse_yaml
from .runs import RunError, RunFolder
from .trainer import TrainingError
from .training import trainer_for

_NAME = "learning_rate"
_FREE_TO_CHANGE = ("output", "training.learning_rate", "training.logging_steps", "training.report_to", "facts")


def search(prepared: Prepared, say: Callable[[str], None]) -> Material:
    """Find a learning rate, and return what was read with that rate in its recipe, and how it was found.

    Args:
        say: is told about each trial in a line.

    Raises:
        RunError: the folder holds a search for another recipe.
        TrainingError: training broke at every rate.
    """
    folder, course = prepared.folder, prepared.search
    assert course is not None
    folder.search.mkdir(parents=True, exist_ok=True)
    study = _study(folder, prepared.material.recipe)
    train, held_out = divide(prepared.material.train, course.rows, prepared.recipe.data, prepared.task)
    train = train.shuffle(seed=0).select(range(min(len(train), course.train_rows)))
    try:
        runner = _Runner(prepared, prepared.material._replace(train=train, evaluation=held_out), course, study)
        for rate in _walk(course.first, study):
            say(_in_words(runner.run(rate), course))
    finally:
        shutil.rmtree(folder.search / "trial", ignore_errors=True)
    return prepared.material._replace(recipe=_with_rate(prepared.material.recipe, study, course))


def search_for_run(prepared: Prepared, say: Callable[[str], None]) -> Prepared:
    """:func:`search` as a part of the run: its folder says from now on what is under way, so it can be resumed."""
    folder, mode = prepared.folder, prepared.mode
    with folder.alone():
        if folder.state() != prepared.folder_state:
            raise RunError(f"another training has written to {folder.path} in the meantime: start this one again")
        if mode != "resume":
            folder.clear(search=mode == "overwrite")
            write_text(folder.recipe, dump(prepared.recipe))
        material = search(prepared, say)
        if mode == "resume":  # what the folder's recipe leaves open is settled
            write_text(folder.recipe, dump(_settled(prepared.recipe, material.recipe)))
        state = folder.state()
    return ready(material, folder, mode, state)


def write_tuned(folder: RunFolder, recipe: Recipe) -> Path:
    """Write the recipe that a search has found beside its study, as a recipe to train."""
    path = folder.search / "recipe.yaml"
    write_text(path, dump(recipe.model_copy(update={"facts": None})))
    return path


def chosen_in_words(recipe: Recipe) -> str:
    """What a search chose, and why, in a line."""
    assert recipe.facts is not None and recipe.facts.learning_rate is not None
    found, rate = recipe.facts.learning_rate, recipe.training.learning_rate
    others = ", ".join(f"{trial.rate:g} {trial.in_words}" for trial in found.trials if trial.rate != rate)
    best = next(trial for trial in found.trials if trial.rate == rate)
    return (
        f"learning rate {rate:g}: loss {best.in_words} on {found.rows:,} training rows left out, after {found.steps:,} "
        f"of {found.total_steps:,} steps ({others})"
    )


def _settled(recipe: Recipe, found: Recipe) -> Recipe:
    """``recipe`` with the rate that was found."""
    recipe = recipe.model_copy(deep=True)
    assert recipe.facts is not None and found.facts is not None
    recipe.training.learning_rate = found.training.learning_rate
    recipe.facts.learning_rate = found.facts.learning_rate
    return recipe


# --- which rates ------------------------------------------------------------------------------------


def _ladder(start: float, place: int) -> float:
    """Rates half a decade apart: 1e-3, 3e-3, 1e-2, ... at 0, 1, 2, ..."""
    exponent = round(math.log10(start)) + place // 2
    return float(f"{3 if place % 2 else 1}e{exponent}")


def _walk(start: float, study: optuna.Study) -> Iterator[float]:
    """The rates still to try, each after the trials before it: upwards as long as the loss falls, else downwards."""

    def untried(place: int) -> Iterator[float]:
        if _ladder(start, place) not in _losses(study):
            yield _ladder(start, place)

    def better(place: int, than: int) -> bool:
        losses = _losses(study)
        return losses[_ladder(start, place)] < losses[_ladder(start, than)]

    yield from untried(0)
    yield from untried(1)
    place, step = (1, 1) if better(1, than=0) else (0, -1)
    for _ in range(MOST_TRIALS - 2):
        place += step
        yield from untried(place)
        if not better(place, than=place - step):
            return


def _losses(study: optuna.Study) -> dict[float, float]:
    """The loss that each rate came to; inf where training broke or was stopped."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return {trial.params[_NAME]: _value(trial) for trial in done}


def _value(trial: FrozenTrial) -> float:
    return math.inf if trial.state != TrialState.COMPLETE or trial.value is None else trial.value


# --- the study --------------------------------------------------------------------------------------


def _study(folder: RunFolder, recipe: Recipe) -> optuna.Study:
    """The study in the run's folder; a trial that a killed process left behind counts as failed."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(folder.search / "study.log")))
    pruner = MedianPruner(n_startup_trials=2)
    sampler = RandomSampler(seed=0)  # of which nothing is asked: the walk says which rate is next
    study = optuna.create_study(study_name=_NAME, storage=storage, sampler=sampler, pruner=pruner, load_if_exists=True)
    asked = study.user_attrs.get("recipe")
    if asked is None:
        study.set_user_attr("recipe", dump(recipe))
    else:
        changed = differences(validate(parse_yaml(asked, "study"), "study"), recipe, ignore=_FREE_TO_CHANGE)
        if changed:
            raise RunError(
                f"the search in {folder.search} was for another recipe: {'; '.join(changed)}. Change it back, start "
                "over with --overwrite, or give another folder with --output"
            )
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    return study


def _with_rate(recipe: Recipe, study: optuna.Study, course: Course) -> Recipe:
    """The recipe with the rate of the lowest loss (of two as low, the lower), and all trials among its facts."""
    losses = _losses(study)
    rate = min(sorted(losses), key=losses.__getitem__)
    if not math.isfinite(losses[rate]):
        tried = ", ".join(f"{rate:g}" for rate in sorted(losses))
        raise TrainingError(
            f"training broke at every learning rate of the search ({tried}): give one, training.learning_rate (--lr), "
            "or train without fp16"
        )
    recipe = recipe.model_copy(deep=True)
    assert recipe.facts is not None
    recipe.training.learning_rate = rate
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    recipe.facts.learning_rate = RateSearch(
        steps=course.steps,
        total_steps=course.total_steps,
        rows=course.rows,
        seconds=round(sum(trial.user_attrs["seconds"] for trial in done), 1),
        trials=sorted(map(_as_fact, done), key=lambda trial: trial.rate),
    )
    return recipe


def _as_fact(trial: FrozenTrial) -> RateTrial:
    step = trial.last_step
    loss = None if step is None else trial.intermediate_values[step]
    return RateTrial(
        rate=trial.params[_NAME],
        loss=loss if loss is not None and math.isfinite(loss) else None,
        stopped_at=step if trial.state == TrialState.PRUNED else None,
    )


# --- a trial ----------------------------------------------------------------------------------------


class _Runner:
    """Runs trials one after the other."""

    def __init__(self, prepared: Prepared, material: Material, course: Course, study: optuna.Study) -> None:
        self._prepared, self._material, self._course, self._study = prepared, material, course, study
        self._folder = RunFolder(prepared.folder.search / "trial")
        self._start: _Start | None = None

    def run(self, rate: float) -> FrozenTrial:
        """One trial, told to the study."""
        study, began = self._study, time.monotonic()
        if not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):  # left by a process killed right here
            study.enqueue_trial({_NAME: rate})
        trial = study.ask()
        trial.suggest_float(_NAME, 1e-8, 1e2, log=True)
        recipe = _in_small(self._prepared, self._material.recipe, rate, self._course.steps)
        shutil.rmtree(self._folder.path, ignore_errors=True)
        small = ready(self._material._replace(recipe=recipe), self._folder, "new", self._folder.state())
        small.arguments.save_strategy = SaveStrategy.NO
        watch = _Watch(trial, small, self._start)
        try:
            watch.train()
            state = TrialState.PRUNED if watch.stopped else TrialState.COMPLETE
        except TrainingError:  # a loss that is not finite
            state = TrialState.PRUNED
        self._start = watch.start
        trial.set_user_attr("seconds", time.monotonic() - began)
        if state == TrialState.COMPLETE and not math.isfinite(watch.loss):
            state = TrialState.PRUNED
        return study.tell(trial, watch.loss if state == TrialState.COMPLETE else None, state=state)


class _Start(NamedTuple):
    """A gradient start, which is the same for every rate: what was found, and each P and Q."""

    found: dict[str, Any]
    vectors: list[tuple[Tensor, Tensor]]


class _Watch(TrainerCallback):
    """Trains a trial, and measures its loss half-way and at the end."""

    def __init__(self, trial: optuna.Trial, small: Prepared, start: _Start | None) -> None:
        self.stopped, self.loss, self.start = False, math.inf, start
        self._trial = trial
        self._steps = {math.ceil(small.total_steps / 2), small.total_steps}
        self._allocator = _allocator_of(small)
        self._rows = small.evaluation
        if self._allocator is not None and start is not None:
            self._allocator.started = start.found
            for triplets, (p, q) in zip(self._allocator.triplets, start.vectors, strict=True):
                with torch.no_grad():
                    triplets.parameters[0].copy_(p)
                    triplets.parameters[2].copy_(q)
        self._trainer = trainer_for(small, [self])

    def train(self) -> None:
        """TrainingError when the training loss is not finite."""
        self._trainer.train()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._allocator is not None and self._allocator.started and self.start is None:
            parameters = [triplets.parameters for triplets in self._allocator.triplets]
            vectors = [(p.detach().clone(), q.detach().clone()) for p, _, q in parameters]
            self.start = _Start(self._allocator.started, vectors)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step in self._steps:
            loss = self._trainer.held_out_loss(self._rows)
            self.loss = math.nan if loss is None else loss
            self._trial.report(self.loss, state.global_step)
            if not math.isfinite(self.loss) or (state.global_step < state.max_steps and self._trial.should_prune()):
                self.stopped = control.should_training_stop = True


def _allocator_of(prepared: Prepared) -> Allocator | None:
    """The allocator of a method of ours that starts from the gradient."""
    if prepared.recipe.adalora.initialization != "gradient" or prepared.recipe.method not in ("adalora", "svd_lora"):
        return None
    return allocator(prepared.model)


def _in_small(prepared: Prepared, recipe: Recipe, rate: float, steps: int) -> Recipe:
    """The recipe of one trial: all lengths that count steps are in proportion."""
    recipe, share = recipe.model_copy(deep=True), steps / prepared.total_steps
    training, schedule = recipe.training, prepared.budget
    training.learning_rate, training.max_steps = rate, steps
    training.eval_strategy, training.eval_steps, training.report_to = "no", None, []
    training.logging_steps = max(1, steps // 4)
    if training.warmup_steps >= 1:
        training.warmup_steps /= prepared.total_steps
    if schedule is not None and schedule.prunes:
        recipe.adalora.tinit = schedule.t_init / schedule.total_step
        recipe.adalora.tfinal = schedule.t_final / schedule.total_step
        recipe.adalora.deltaT = max(1, round(schedule.delta_t * share))
    return recipe


def _in_words(trial: FrozenTrial, course: Course) -> str:
    fact = _as_fact(trial)
    return f"learning rate {fact.rate:g}: loss {fact.in_words} after {course.steps} steps"
