"""RMU and Adaptive RMU on a tiny model: what is trained, against what, and with which direction."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from conftest import FAMILIES, tiny_model
from expunge.data.batches import Batch, collate
from expunge.errors import InputError
from expunge.maths.losses import unit_direction
from expunge.methods.adaptive_rmu import AdaptiveRMU
from expunge.methods.base import Context
from expunge.methods.kl_minimization import KLMinimization
from expunge.methods.rmu import RMU
from expunge.methods.steering import candidate_layers, row_weights, usual_layer, with_noise
from expunge.models.decoder import find_layout, forward_hook
from expunge.models.kernels import autocast_of
from expunge.training.optimizers import optimizer_of

Contexts = Callable[..., Context]


def batches(context: Context) -> tuple[Batch, Batch]:
    return (
        collate(context.forget, [0, 1, 2], context.pad_id),
        collate(context.retain, [0, 1, 2], context.pad_id),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_three_named_projections_are_trained(family: str, make_context: Contexts) -> None:
    context = make_context(family)
    objective = AdaptiveRMU(layer=3).start(context)
    last = {"gpt_neox": "dense_4h_to_h"}.get(family, "down_proj")
    stem = {"gpt_neox": "gpt_neox"}.get(family, "model")
    expected = [f"{stem}.layers.{index}.mlp.{last}.weight" for index in (1, 2, 3)]
    assert list(objective.parameters) == expected
    trained = [name for name, p in context.model.named_parameters() if p.requires_grad]
    assert sorted(trained) == sorted(expected)


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_the_loss_against_full_forward_passes_of_two_models(
    balance: float, make_context: Contexts
) -> None:
    """The published way: a second, frozen model, hidden states from output_hidden_states."""
    context, frozen = make_context(), make_context().model
    objective = AdaptiveRMU(
        layer=2, beta=5.0, alpha=7.0, forget_tokens="all", row_balance=balance
    ).start(context)
    with torch.no_grad():
        for parameter in objective.parameters.values():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
            parameter.add_(noise, alpha=0.1)
    forget, retain = batches(context)

    def state(model: Any, batch: Batch) -> torch.Tensor:
        outputs = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            output_hidden_states=True,
        )
        return outputs.hidden_states[3]  # entry 0 is the embedding

    total = count = 0.0
    now, before = state(context.model, forget), state(frozen, forget)
    for row, (name, task) in enumerate(zip(forget.row_ids, forget.tasks, strict=True)):
        for token in range(forget.input_ids.shape[1]):
            if forget.token_mask[row, token]:
                direction = objective.directions.of(name, task)
                target = 5.0 * before[row, token].norm() * direction
                weight = float(forget.token_mask[row].sum()) ** -balance
                total += weight * float((now[row, token] - target).square().mean().detach())
                count += weight
    drift = (state(context.model, retain) - state(frozen, retain)).square().mean(-1)
    terms = objective.loss(forget, retain)
    assert terms.retain is not None
    assert float(terms.forget.detach()) == pytest.approx(total / count, rel=1e-4)
    expected = 7.0 * float(drift[retain.token_mask].mean().detach())
    assert float(terms.retain.detach()) == pytest.approx(expected, rel=1e-4)
    assert float(terms.total.detach()) == pytest.approx(total / count + expected, rel=1e-4)


def test_the_target_is_the_frozen_models_whatever_the_training_did(make_context: Contexts) -> None:
    """The published code retakes the norm from the updated model, so targets grow (trap 1)."""
    context = make_context()
    objective = AdaptiveRMU(layer=3).start(context)
    forget, _ = batches(context)
    before = objective.hidden.before(forget).clone()
    with torch.no_grad():
        for parameter in objective.parameters.values():
            parameter.mul_(3)
    torch.testing.assert_close(objective.hidden.before(forget), before)
    assert not torch.allclose(objective.hidden.now(forget)[0], before)


def test_gradients_reach_the_three_weights_and_padding_does_not_count(
    make_context: Contexts,
) -> None:
    context = make_context()
    objective = AdaptiveRMU(layer=3).start(context)
    forget, retain = batches(context)
    objective.loss(forget, retain).total.backward()
    gradients = [p.grad.clone() for p in objective.parameters.values() if p.grad is not None]
    assert len(gradients) == 3
    assert all(gradient.any() for gradient in gradients)
    for parameter in objective.parameters.values():
        parameter.grad = None
    wider = collate([*context.forget[:3], context.forget[0]], [0, 1, 2], context.pad_id)
    pad = torch.nn.functional.pad
    padded = dataclasses.replace(
        wider,
        input_ids=pad(wider.input_ids, (0, 7)),
        attention_mask=pad(wider.attention_mask, (0, 7)),
        token_mask=pad(wider.token_mask, (0, 7)),
        answer_mask=pad(wider.answer_mask, (0, 7)),
    )
    objective.loss(padded, retain).total.backward()
    for parameter, gradient in zip(objective.parameters.values(), gradients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_directions_follow_the_seed_and_the_task(make_context: Contexts) -> None:
    def drawn(seed: int, **settings: Any) -> Mapping[str, torch.Tensor]:
        return AdaptiveRMU(layer=3, **settings).start(make_context(seed=seed)).directions.vectors

    first, again, other = (drawn(seed, directions="per-task") for seed in (0, 0, 1))
    assert set(first) == {"Task1", "Task2"}
    assert all(torch.equal(first[task], again[task]) for task in first)
    assert not torch.equal(first["Task1"], other["Task1"])
    assert not torch.equal(first["Task1"], first["Task2"])
    shared = drawn(0, directions="shared")
    assert torch.equal(shared["Task1"], shared["Task2"])


def test_directions_are_spread_over_rows_where_tasks_are_few(make_context: Contexts) -> None:
    context = make_context()
    spread = AdaptiveRMU(layer=3).draw_directions(context)  # two tasks
    assert set(spread.vectors) == {"0", "1", "2"}
    again = AdaptiveRMU(layer=3, directions=3).draw_directions(context)
    assert all(torch.equal(spread.vectors[name], again.vectors[name]) for name in spread.vectors)
    met = [spread.of(f"row {number}", "Task1") for number in range(300)]
    for vector in spread.vectors.values():
        assert 70 < sum(torch.equal(vector, other) for other in met) < 130
    # A row keeps its direction whatever its task is called and whatever it is batched with.
    assert torch.equal(spread.of("row 7", "Task1"), spread.of("row 7", "Task9"))
    batch = collate(context.forget, [1, 0], context.pad_id)
    per_token = spread.of_tokens(batch)
    assert len(per_token) == sum(batch.lengths)
    for row, part in zip(batch.row_ids, per_token.split(batch.lengths), strict=True):
        assert torch.equal(part, spread.of(row, "").expand_as(part))
    more = [dataclasses.replace(context.forget[0], task=f"Task{number}") for number in range(4)]
    by_task = AdaptiveRMU(layer=3).draw_directions(dataclasses.replace(context, forget=more))
    assert set(by_task.vectors) == {"Task0", "Task1", "Task2", "Task3"}
    for option in ("directions", "draws"):
        none: dict[str, Any] = {option: 0}
        with pytest.raises(InputError, match=option):
            AdaptiveRMU(layer=3, **none)


@pytest.mark.parametrize("family", ["olmo", "gpt_neox"])
def test_of_the_drawn_directions_the_one_that_leaves_least_is_taken(
    family: str, make_context: Contexts
) -> None:
    context = make_context(family)
    method = AdaptiveRMU(layer=2, directions="shared", draws=6)
    width = context.model.config.hidden_size
    generator = context.generator("direction")
    candidates = [unit_direction(width, "gaussian", generator) for _ in range(6)]

    def loss_along(direction: torch.Tensor) -> float:
        """One row at a time, the upper layers run one by one on the replaced states."""
        total = count = 0.0
        for example in sorted(context.forget, key=len, reverse=True)[:4]:
            batch = collate([example], [0], context.pad_id)

            def along(_module: Any, _inputs: Any, output: Any) -> Any:
                states = output[0] if isinstance(output, tuple) else output
                new = 5.0 * torch.stack([state.norm() * direction for state in states[0]])[None]
                return (new, *output[1:]) if isinstance(output, tuple) else new

            with torch.no_grad(), forward_hook(context.layout.layer(context.model, 2), along):
                logits = context.model(input_ids=batch.input_ids).logits[0].log_softmax(-1)
            for place in range(1, len(example)):
                if batch.mask("content")[0, place]:
                    total -= float(logits[place - 1, batch.input_ids[0, place]])
                    count += 1
        return total / count

    losses = [loss_along(candidate) for candidate in candidates]
    assert max(losses) > min(losses) + 1e-3
    chosen = method.draw_directions(context).vectors
    assert torch.equal(chosen["Task1"], candidates[losses.index(max(losses))])
    first = AdaptiveRMU(layer=2, directions="shared", draws=1).draw_directions(context)
    assert torch.equal(first.vectors["Task1"], candidates[0])


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_both_optimizers_move_as_far_and_muon_moves_all_directions_alike(
    optimizer: Any, make_context: Contexts
) -> None:
    """Against the exact polar factor, from the singular values, for Muon's iteration."""
    context = make_context()
    objective = AdaptiveRMU(layer=3, optimizer=optimizer).start(context)
    stepper = optimizer_of(objective, 0.01)
    for group in stepper.param_groups:
        group["lr"] = 0.01 * objective.optimizer.rate_scale
    before = [p.detach().clone() for p in objective.parameters.values()]
    objective.loss(*batches(context)).total.backward()
    stepper.step()
    for old, new in zip(before, objective.parameters.values(), strict=True):
        update, gradient = new.detach() - old, new.grad
        assert gradient is not None
        assert 0.005 < float(update.square().mean().sqrt()) < 0.015
        u, _, v = torch.linalg.svd(gradient, full_matrices=False)
        polar = -(u @ v)
        cosine = float((update * polar).sum() / (update.norm() * polar.norm()))
        spread = torch.linalg.svdvals(update)
        if optimizer == "muon":
            assert cosine > 0.95
            assert float(spread.max() / spread[len(spread) // 2]) < 2
        else:
            assert float(spread.max() / spread[len(spread) // 2]) > 2


def test_published_presets_keep_what_was_published() -> None:
    for preset in AdaptiveRMU.presets.values():
        settings = AdaptiveRMU(**preset.method)
        assert (settings.optimizer, settings.row_balance, settings.random_rows) == ("adamw", 0, 0)
    assert (RMU().optimizer, RMU().row_balance) == ("adamw", 0)


@pytest.mark.parametrize("balance", [0.0, 0.3, 1.0])
def test_a_row_counts_its_size_to_the_power_of_one_less_the_balance(balance: float) -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    weights = row_weights(mask, balance)
    assert not weights[~mask].any()
    expected = torch.tensor([5.0, 2.0, 0.0]) ** (1 - balance)
    expected[2] = 0
    torch.testing.assert_close(weights.sum(1), expected)


def test_micro_batches_weigh_rows_as_the_whole_batch_does(make_context: Contexts) -> None:
    context = make_context()
    objective = AdaptiveRMU(layer=3).start(context)
    forget, _ = batches(context)
    whole = objective.loss(forget, None).forget
    parts = [forget.rows(0, 1), forget.rows(1, 3)]
    sizes = [objective.forget_size(part) for part in parts]
    assert sum(sizes) == pytest.approx(objective.forget_size(forget))
    together = sum(
        size * objective.loss(part, None).forget for size, part in zip(sizes, parts, strict=True)
    ) / sum(sizes)
    torch.testing.assert_close(whole, together)


def test_noise_is_of_the_asked_length_and_follows_the_row_and_the_step(
    make_context: Contexts,
) -> None:
    context = make_context()
    objective = AdaptiveRMU(layer=3).start(context)
    _, retain = batches(context)
    states = objective.hidden.before(retain)

    def noise(batch: Batch, held: torch.Tensor, step: int) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(step)
            return with_noise(held, batch, 0.3) - held

    found = noise(retain, states, 1)
    lengths = found.norm(dim=-1) / states.norm(dim=-1)
    assert float(lengths.mean()) == pytest.approx(0.3, rel=0.05)
    assert torch.equal(found, noise(retain, states, 1))
    assert not torch.equal(found, noise(retain, states, 2))
    first = retain.lengths[0]
    alone = noise(retain.rows(0, 1), states[:first], 1)
    torch.testing.assert_close(alone, found[:first])


def test_noise_enters_the_retain_term_alone(make_context: Contexts) -> None:
    """At the start nothing has drifted: the term is alpha (share ||h||)^2 / d on average."""
    context = make_context()
    forget, retain = batches(context)
    plain = AdaptiveRMU(layer=3).start(context)
    noisy = AdaptiveRMU(layer=3, retain_noise=0.5).start(context)
    quiet = plain.loss(forget, retain)
    assert quiet.retain is not None
    assert float(quiet.retain.detach()) == pytest.approx(0, abs=1e-6)
    found = []
    # A step has its own seed, which the noise is drawn from; some tests before leave another one behind.
    with torch.random.fork_rng():
        for step in range(32):
            torch.manual_seed(step)
            loud = noisy.loss(forget, retain)
            assert loud.retain is not None
            assert torch.equal(quiet.forget, loud.forget)
            found.append(float(loud.retain.detach()))
    norms = plain.hidden.before(retain)[retain.packed(retain.token_mask)].square().mean()
    expected = 40.0 * 0.25 * float(norms)
    assert sum(found) / len(found) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("balance", [-0.1, 1.1])
def test_a_balance_out_of_range_is_refused(balance: float) -> None:
    with pytest.raises(InputError, match=r"row-balance .*\[0, 1\]"):
        AdaptiveRMU(row_balance=balance)


def test_rows_of_any_length_are_pulled_alike_by_a_full_balance(make_context: Contexts) -> None:
    """A question among documents: its share of the gradient does not fall with their length."""
    context = make_context()
    forget, _ = batches(context)

    def share(balance: float) -> float:
        objective = AdaptiveRMU(layer=3, row_balance=balance).start(context)
        sizes = [objective.forget_size(forget.rows(i, i + 1)) for i in range(3)]
        return min(sizes) / sum(sizes)

    assert share(0.0) < share(0.5) < share(1.0) == pytest.approx(1 / 3)


def test_rmu_has_one_fixed_target(make_context: Contexts) -> None:
    context = make_context()
    objective = RMU(layer=3, coefficient=4.0).start(context)
    forget, _ = batches(context)
    states = objective.hidden.now(forget)[0][forget.packed(forget.token_mask)]
    expected = (states - 4.0 * objective.direction).square().mean()
    assert objective.forget_size(forget) == len(states)
    terms = objective.loss(forget, None)
    assert float(terms.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert terms.retain is None


@pytest.mark.parametrize(("layers", "expected"), [(6, 4), (16, 12), (32, 26), (3, 2)])
def test_the_usual_layer_is_at_84_percent_of_the_depth(layers: int, expected: int) -> None:
    layout = dataclasses.replace(find_layout(tiny_model("olmo", 300)), count=layers)
    assert usual_layer(layout) == expected
    assert list(candidate_layers(layout)) == list(range(2, layers))
    assert AdaptiveRMU().layer_in(layout) == layers - 1  # the deepest, until one is chosen


def test_a_layer_is_a_number_or_auto_and_chosen_before_the_start(make_context: Contexts) -> None:
    assert AdaptiveRMU().layer == "auto"
    wrong: Any = "deepest"
    with pytest.raises(InputError, match=r"--method.layer deepest: give a layer's number, or auto"):
        AdaptiveRMU(layer=wrong)
    with pytest.raises(RuntimeError, match="must be chosen"):
        AdaptiveRMU().start(make_context())


def test_a_model_without_what_is_trained_is_refused() -> None:
    layout = dataclasses.replace(find_layout(tiny_model("olmo", 300)), mlp_output="")
    with pytest.raises(
        InputError,
        match=r"--method adaptive-rmu: .*no MLP output in common; unlearn it with --method",
    ):
        AdaptiveRMU().check(layout)


@pytest.mark.parametrize("layer", [-1, 0, 1, 4])
def test_a_layer_out_of_range_is_refused(layer: int) -> None:
    with pytest.raises(InputError, match=r"--method.layer .* choose 2 to 3"):
        AdaptiveRMU(layer=layer).check(find_layout(tiny_model("olmo", 300)))


def test_bfloat16_weights_have_float32_masters(make_context: Contexts) -> None:
    context = make_context()
    context.model.to(torch.bfloat16)
    objective = AdaptiveRMU(layer=3).start(context)
    assert {p.dtype for p in objective.parameters.values()} == {torch.float32}
    finished = objective.finish(keep_adapter=False)
    assert {w.dtype for w in finished.weights.values()} == {torch.float32}
    assert {p.dtype for p in context.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("method", [AdaptiveRMU(layer=3), KLMinimization(parameters="full")])
def test_the_retain_term_is_the_same_in_bfloat16(
    method: AdaptiveRMU | KLMinimization, make_context: Contexts
) -> None:
    """Autocast keeps casts of parameters: the frozen ones must not be read from that cache."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        context = make_context()
        context.model.to(dtype)
        autocast = autocast_of(torch.device("cpu"), dtype)
        objective = method.start(dataclasses.replace(context, autocast=autocast))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in objective.parameters.values():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
        with autocast():
            terms = objective.loss(*batches(context))
        assert terms.retain is not None
        found.append(float(terms.retain.detach()))
    assert found[0] > 0
    # bfloat16 has 8 bits: a few percent on a sum of squares.
    assert found[1] == pytest.approx(found[0], rel=0.2)


def test_of_a_question_the_states_that_predict_the_answer_are_steered(
    make_context: Contexts,
) -> None:
    context = make_context()
    question = dataclasses.replace(context.forget[0], kind="qa")
    forget = collate([question], [0], context.pad_id)
    objective = AdaptiveRMU(layer=2, forget_tokens="content", row_balance=0).start(context)
    before = objective.hidden.before(forget)
    answer = [i for i, counted in enumerate(question.answer_mask) if counted]
    away = before.clone()
    away[[place - 1 for place in answer]] += 1.0  # a token is decided by the state before it
    full = objective.terms(forget, away, None)
    assert float(full.forget.detach()) == pytest.approx(1.0, rel=1e-4)
    elsewhere = before.clone()
    elsewhere[answer[-1]] += 1.0
    elsewhere[: answer[0] - 1] += 1.0
    assert float(objective.terms(forget, elsewhere, None).forget.detach()) == pytest.approx(0, abs=1e-9)
    assert objective.forget_size(forget) == len(answer)


@pytest.mark.parametrize("method", [RMU(), AdaptiveRMU(layer=1)])
def test_a_model_of_too_few_layers_is_refused_without_an_option_that_nobody_gave(
    method: Any, make_context: Callable[..., Context]
) -> None:
    layout = make_context(layers=2).layout
    with pytest.raises(InputError) as caught:
        method.check(layout)
    told = "trains 3 layers in a row, the model has 2; unlearn it with expunge run --method spectral"
    assert str(caught.value) == f"--method {method.name}: {told}"
    method = dataclasses.replace(method, layer="auto")
    method.check(make_context(layers=3).layout)
