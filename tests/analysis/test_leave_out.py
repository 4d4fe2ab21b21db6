"""Self-influence and collateral against dense references, and kronfluence's own scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from expunge.analysis import ekfac
from expunge.analysis.leave_out import CurvatureOptions, LeaveOut, leave_out
from expunge.data.batches import collate
from expunge.errors import RunError
from expunge.methods.numerics import target_log_probs
from row_setting import Setting, make_setting

FORGET = 2


@pytest.fixture
def setting() -> Setting:
    return make_setting()


def found(setting: Setting, batch_size: int = 3, **options: Any) -> LeaveOut:
    passes = setting.passes(batch_size)
    rows = setting.rows
    return leave_out(passes, rows[:FORGET], rows[FORGET:], CurvatureOptions(**options))


def flat(setting: Setting) -> tuple[torch.Tensor, list[int]]:
    """Every row's gradient as one vector, float64: (rows, parameters), and their counted tokens."""
    gradients = [
        torch.cat([g.flatten() for g in setting.gradient(row).values()]).double()
        for row in setting.rows
    ]
    return torch.stack(gradients), [len(row[0]) - 1 for row in setting.rows]


@pytest.mark.parametrize(("damping", "unit"), [(1.0, "mean-fisher"), (0.01, "absolute")])
def test_the_diagonal_predictions_are_the_formulas(
    setting: Setting, damping: float, unit: str
) -> None:
    gradients, counts = flat(setting)
    total = sum(counts)
    fisher = gradients.square().sum(0) / total
    added = damping * float(fisher.mean()) if unit == "mean-fisher" else damping
    result = found(setting, damping=damping, unit=unit)
    assert result.tokens == total
    assert result.mean_fisher == pytest.approx(float(fisher.mean()), rel=1e-4)
    assert result.damping == pytest.approx(added, rel=1e-4)
    inverse = 1 / (fisher + added)
    for place in range(FORGET):
        own = float((gradients[place] ** 2 * inverse).sum()) / total / counts[place]
        assert result.self_influence[place] == pytest.approx(own, rel=1e-3)
    step = inverse * gradients[:FORGET].sum(0) / total
    for place in range(FORGET, len(counts)):
        rise = float(gradients[place] @ step) / counts[place]
        assert result.collateral[place - FORGET] == pytest.approx(rise, rel=1e-3, abs=1e-7)


def test_ekfac_is_a_curvature_of_the_same_trace(setting: Setting) -> None:
    """Both with the data's labels: turning the axes leaves the trace as it is."""
    diagonal, turned = found(setting), found(setting, kind="ekfac")
    assert turned.mean_fisher == pytest.approx(diagonal.mean_fisher, rel=1e-4)
    assert turned.tokens == diagonal.tokens
    assert turned.self_influence != pytest.approx(diagonal.self_influence, rel=1e-2)
    assert [known.loss for known in turned.forget] == [known.loss for known in diagonal.forget]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["olmo", "qwen2"])
def test_ekfac_gives_the_scores_of_kronfluence(
    family: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own self and pairwise scores from the same factors; our formulas must agree with them."""
    setting = make_setting(family)
    result = found(setting, kind="ekfac", unit="absolute", damping=0.01)
    expected_self, expected_pairs = kronfluence_scores(setting, 0.01, tmp_path)
    counts = [len(row[0]) - 1 for row in setting.rows]
    total = sum(counts)
    for place in range(FORGET):
        own = float(expected_self[place]) / counts[place]
        assert result.self_influence[place] == pytest.approx(own, rel=1e-3)
    for place in range(FORGET, len(counts)):
        rise = float(expected_pairs[place, :FORGET].sum()) / counts[place]
        assert result.collateral[place - FORGET] == pytest.approx(rise, rel=1e-3, abs=1e-7)
    assert total == result.tokens


def kronfluence_scores(
    setting: Setting, damping: float, directory: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Self scores (rows,) and pairwise scores (queries, rows), each divided by all counted tokens."""
    from kronfluence.analyzer import Analyzer
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from kronfluence.utils.dataset import DataLoaderKwargs

    class Summed(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> torch.Tensor:
            where = batch["counted"][:, 1:]
            logits = model(input_ids=batch["ids"], attention_mask=batch["mask"]).logits[:, :-1]
            return -target_log_probs(logits[where], batch["ids"][:, 1:][where]).sum()

        def compute_measurement(self, batch: Any, model: Any) -> torch.Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return list(setting.maps)

        def get_attention_mask(self, batch: Any) -> Any:
            return batch["mask"]

    examples = [row[0] for row in setting.rows]

    def batch_of(places: list[int]) -> dict[str, torch.Tensor]:
        batch = collate(examples, places, 0)
        return {"ids": batch.input_ids, "mask": batch.attention_mask, "counted": batch.token_mask}

    total = sum(len(example) - 1 for example in examples)
    with ekfac._wrapped(setting.model, Summed()) as task:
        analyzer = Analyzer(
            "reference", setting.model, task, cpu=True, disable_tqdm=True, output_dir=str(directory)
        )
        analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=batch_of))
        analyzer.fit_all_factors(
            "f",
            range(len(examples)),
            per_device_batch_size=2,
            factor_args=FactorArguments(use_empirical_fisher=True),
        )
        # It divides the eigenvalues by the rows, we by the tokens.
        scale = total / len(examples)
        settings = ScoreArguments(damping_factor=damping * scale)
        analyzer.compute_self_scores(
            "s", "f", range(len(examples)), per_device_train_batch_size=2, score_args=settings
        )
        analyzer.compute_pairwise_scores(
            "p",
            "f",
            range(len(examples)),
            range(len(examples)),
            per_device_query_batch_size=2,
            per_device_train_batch_size=2,
            score_args=settings,
        )
        own: Any = analyzer.load_self_scores("s")
        pairs: Any = analyzer.load_pairwise_scores("p")
    return own["all_modules"] * scale / total, pairs["all_modules"] * scale / total


def test_a_row_that_repeats_a_forget_row_is_hurt_most(setting: Setting) -> None:
    rows = [*setting.rows[:3], setting.rows[0], *setting.rows[3:]]
    result = leave_out(setting.passes(), rows[:FORGET], rows[FORGET:], CurvatureOptions())
    assert max(result.collateral) == result.collateral[1] > 0


@pytest.mark.parametrize("kind", ["diagonal", pytest.param("ekfac", marks=pytest.mark.slow)])
@pytest.mark.parametrize("labels", ["data", "model"])
def test_twice_the_same_and_whatever_the_batch_size(
    setting: Setting, kind: str, labels: str
) -> None:
    first, again = (found(setting, kind=kind, labels=labels) for _ in range(2))
    assert first == again
    small = found(setting, 1, kind=kind, labels=labels)
    if kind == "diagonal":
        assert small.self_influence == pytest.approx(first.self_influence, rel=1e-3)
        assert small.collateral == pytest.approx(first.collateral, rel=1e-3, abs=1e-6)
    assert small.mean_fisher == pytest.approx(first.mean_fisher, rel=1e-3)


def test_drawn_labels_change_the_curvature_with_their_seed(setting: Setting) -> None:
    of_data = found(setting).mean_fisher
    drawn = [found(setting, labels="model", seed=seed).mean_fisher for seed in (0, 1)]
    assert len({of_data, *drawn}) == 3


def test_without_a_retain_set_there_is_self_influence_alone(setting: Setting) -> None:
    result = leave_out(setting.passes(), setting.rows, [], CurvatureOptions())
    assert len(result.self_influence) == len(setting.rows)
    assert list(result.collateral) == []
    assert min(result.self_influence) > 0


def test_a_model_without_curvature_is_refused(setting: Setting) -> None:
    for parameter in setting.model.parameters():
        parameter.data.zero_()
    with pytest.raises(RunError, match="damping"):
        found(setting)


def test_the_wrappers_are_gone_after_a_failure(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = list(setting.model.named_modules())
    wanted = [parameter.requires_grad for parameter in setting.model.parameters()]

    def fail(*_: object) -> torch.Tensor:
        raise ZeroDivisionError

    monkeypatch.setattr(ekfac, "target_log_probs", fail)
    with pytest.raises(ZeroDivisionError):
        found(setting, kind="ekfac")
    assert list(setting.model.named_modules()) == before
    assert [p.requires_grad for p in setting.model.parameters()] == wanted


def test_a_missing_library_is_said_with_the_command_that_mends_it(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    from conftest import refusal

    def none(_name: str) -> None:
        return None

    finder: Callable[[str], None] = none
    monkeypatch.setattr(ekfac, "find_spec", finder)
    message = refusal(lambda: found(setting, kind="ekfac"))
    assert (
        "--curvature ekfac: needs kronfluence; run pip install '.[ekfac]' in the clone" in message
    )
