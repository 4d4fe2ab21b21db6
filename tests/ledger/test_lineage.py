"""Which erasures a model carries."""

from __future__ import annotations

from expunge.ledger.records import RunRecord, carried, weights_of


def run(number: int, before: str | None, after: str | None, *requests: int) -> RunRecord:
    def digests(weights: str | None) -> dict[str, str] | None:
        return (weights and {"model.safetensors": weights, "config.json": "same"}) or None

    return RunRecord(
        number,
        "out",
        "model",
        (),
        after,
        after,
        digests(before),
        digests(after),
        "",
        "",
        "",
        requests,
    )


def on(weights: str, *runs: RunRecord) -> set[int]:
    return carried(frozenset({weights}), runs)


def test_only_the_weights_tell_models_apart() -> None:
    digests = {"a.safetensors": "1", "b.safetensors": "2", "tokenizer.json": "3"}
    assert weights_of(digests) == {"1", "2"}


def test_a_chain_of_runs_carries_what_each_of_them_removed() -> None:
    runs = (run(1, "t", "u1", 1, 2), run(2, "u1", "u2", 3), run(3, "t", "v", 4))
    assert on("u2", *runs) == on("u2", *reversed(runs)) == {1, 2, 3}
    assert on("u1", *runs) == {1, 2}
    assert on("v", *runs) == {4}
    assert on("t", *runs) == on("unknown", *runs) == set()


def test_an_unfinished_run_removed_nothing_and_circles_end() -> None:
    assert on("u", run(1, None, None, 1)) == set()
    assert on("t", run(1, "t", "t", 1)) == {1}
    assert on("t", run(1, "t", "u", 1), run(2, "u", "t", 2)) == {1, 2}
    # Two runs that led to the same weights: both removed their requests from it.
    assert on("u", run(1, "t", "u", 1), run(2, "t", "u", 2)) == {1, 2}
