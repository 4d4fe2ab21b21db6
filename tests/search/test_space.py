"""The search space: what a word means, and what is refused before anything is loaded."""

from __future__ import annotations

import dataclasses
from typing import Any

import optuna
import pytest

from conftest import refusal
from expunge.methods.adaptive_rmu import AdaptiveRMU
from expunge.methods.catalog import METHODS
from expunge.methods.libu import LIBU
from expunge.models.decoder import find_layout
from expunge.search.space import Dimension, Space, read_space, searchable
from expunge.training.options import TrainingOptions


def space(*words: str, method: Any = None) -> Space:
    return read_space(words, method or AdaptiveRMU(), TrainingOptions())


def test_each_word_is_a_dimension_with_its_type() -> None:
    found = space(
        "method.alpha=log:5:100",
        "learning-rate=float:1e-3:1e-2",
        "method.layer=int:2:5",
        "batch_size=int:8:64:8",
        "schedule=choice:constant,cosine",
        "max_steps=choice:null,10,20",
    )
    assert found.dimensions == (
        Dimension("method.alpha", "log", 5.0, 100.0),
        Dimension("learning_rate", "float", 1e-3, 1e-2),
        Dimension("method.layer", "int", 2, 5, is_whole=True),
        Dimension("batch_size", "int", 8, 64, 8, is_whole=True),
        Dimension("schedule", "choice", choices=("constant", "cosine")),
        Dimension("max_steps", "choice", choices=(None, 10, 20)),
    )
    assert space("epochs=log:1:64").dimensions[0].is_whole
    assert space("method.beta=float:1:8.2:0.5").dimensions[0].high == pytest.approx(8.0)


def test_drawn_values_keep_to_their_range_and_type() -> None:
    found = space(
        "method.alpha=log:5:100",
        "epochs=log:1:64",
        "batch_size=int:8:64:8",
        "method.beta=float:1:2:0.25",
        "schedule=choice:constant,cosine",
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn: list[dict[str, Any]] = []
    for _ in range(60):
        trial = study.ask()
        drawn.append({d.name: d.suggest(trial) for d in found.dimensions})
        method: Any
        method, options = found.with_values(drawn[-1])
        assert isinstance(method, AdaptiveRMU)
        assert method.alpha == drawn[-1]["method.alpha"]
        assert options.epochs == drawn[-1]["epochs"]
    assert all(5 <= d["method.alpha"] <= 100 for d in drawn)
    # Even on the logarithmic scale: half of the draws lie below the geometric mean.
    low = sum(d["method.alpha"] < (5 * 100) ** 0.5 for d in drawn)
    assert 20 <= low <= 40
    assert {type(d["epochs"]) for d in drawn} == {int}
    assert {d["batch_size"] for d in drawn} == set(range(8, 65, 8))
    assert {d["method.beta"] for d in drawn} == {1.0, 1.25, 1.5, 1.75, 2.0}
    assert {d["schedule"] for d in drawn} == {"constant", "cosine"}


def test_values_replace_fixed_settings_and_leave_the_rest() -> None:
    fixed = Space((), AdaptiveRMU(beta=3.0), TrainingOptions(epochs=7))
    method, options = fixed.with_values({"method.alpha": 9.0, "learning_rate": 0.5})
    assert method == AdaptiveRMU(beta=3.0, alpha=9.0)
    assert options == TrainingOptions(epochs=7, learning_rate=0.5)


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("method.alfa=log:5:100", ("method.alfa", "adaptive-rmu", "did you mean method.alpha?")),
        ("learning_rat=log:1:2", ("did you mean learning_rate?",)),
        ("rank=int:2:8", ("no such option",)),
        ("method.alpha", ("has no range", "method.alpha=log:1e-4:1e-2")),
        ("method.alpha=lug:5:100", ("unknown kind 'lug'", "did you mean log?")),
        ("method.alpha=5:100", ("unknown kind '5'", "log:, float:, int: or choice:")),
        ("method.alpha=log:100:5", ("100 is not below 5",)),
        ("method.alpha=log:5:5", ("5 is not below 5",)),
        ("method.alpha=log:0:5", ("above 0", "raise its low end")),
        ("method.alpha=log:1:5:2", ("write method.alpha=log:LOW:HIGH",)),
        ("method.alpha=float:1", ("LOW:HIGH or method.alpha=float:LOW:HIGH:STEP",)),
        ("method.alpha=float:1:5:9", ("the step 9",)),
        ("method.alpha=float:1:x", ("'x' is no number",)),
        ("method.alpha=float:1:inf", ("inf is not finite",)),
        ("method.layer=int:1:9223372036854775808", ("beyond 2^63",)),
        (f"method.layer=int:1:1{'0' * 400}", ("beyond 2^63",)),
        ("method.alpha=float:-4:5", ("--method.alpha -4.0: must be 0 or more",)),
        ("method.alpha=int:1:5", ("is a decimal number", "float:LOW:HIGH")),
        ("method.layer=float:1:5", ("is a whole number", "int:LOW:HIGH")),
        ("method.layer=int:1.5:5", ("'1.5' is no whole number",)),
        ("learning_rate=float:0:1", ("--learning-rate 0.0: must be positive",)),
        ("validation_fraction=float:0:1", ("[0, 1)",)),
        ("schedule=log:1:2", ("is no number", "schedule=choice:constant,cosine")),
        ("schedule=choice:constant,linear", ("'linear' is none of constant,cosine",)),
        ("schedule=choice:cosine", ("needs two choices",)),
        ("schedule=choice:cosine,cosine", ("names a choice twice",)),
        ("schedule=choice:null,none", ("names a choice twice",)),
        ("select=choice:best,null", ("cannot be null",)),
        ("method.tokens=choice:all,some", ("'some' is none of",)),
        ("time_limit=choice:1h,2h", ("is text or a list",)),
        ("trackers=choice:wandb,mlflow", ("is text or a list",)),
        ("chat_template=choice:true,false", ("could not be compared",)),
        ("micro_batch_size=int:1:4", ("not the result",)),
    ],
)
def test_what_does_not_fit_is_refused_with_the_mend(word: str, words: tuple[str, ...]) -> None:
    message = refusal(lambda: space(word))
    assert message.startswith("--search ")
    for expected in words:
        assert expected in message


def test_nothing_and_the_same_twice_are_refused() -> None:
    assert "nothing to vary" in refusal(lambda: space())
    assert "given twice" in refusal(lambda: space("epochs=int:1:2", "epochs=int:1:3"))


def test_an_end_that_the_model_does_not_have_is_refused(model_dir: Any) -> None:
    from conftest import tiny_model

    layout = find_layout(tiny_model("olmo", 300))
    space("method.layer=int:2:3").check(layout)
    message = refusal(lambda: space("method.layer=int:2:9").check(layout))
    assert message.startswith("--search method.layer: --method.layer 9")


def test_switches_take_true_and_false() -> None:
    name, hint = next((n, h) for n, h in searchable(LIBU) if h is float)
    assert (name, hint) == ("max_grad_norm", float)
    assert "write choice:true,false" not in refusal(lambda: space("seed=choice:a,b"))


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_every_option_of_every_method_is_known_by_its_yaml_name(method: Any) -> None:
    names = dict(searchable(method))
    assert {f"method.{field.name}" for field in dataclasses.fields(method)} <= set(names)
    assert {field.name for field in dataclasses.fields(TrainingOptions)} <= set(names)
