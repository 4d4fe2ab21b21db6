"""One measurement by a protocol beside SemEval's, from files to scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from expunge.evaluation.measuring import prepared, write_scores
from expunge.evaluation.passes import Passes
from expunge.evaluation.protocols.base import ProtocolScores
from expunge.evaluation.protocols.catalog import PROTOCOLS
from expunge.evaluation.protocols.inputs import ProtocolInputs


def measure_by_protocol(
    inputs: ProtocolInputs,
    progress: Callable[[str, int, int], None] = lambda _name, _done, _total: None,
    message: Callable[[str], None] = lambda _: None,
) -> ProtocolScores:
    """Checks every input, loads the model, measures it and writes the files that were asked for.

    Raises InputError before anything is written, and RunError for a model whose losses are no numbers.
    """
    protocol = PROTOCOLS[inputs.protocol]
    ready = prepared(inputs, lambda *of_model: protocol.read(inputs, *of_model), message)
    passes = Passes(
        ready.model, ready.tokenizer, ready.policy, inputs.batch_size, progress, ready.processes
    )
    found = protocol.measure(ready.material, passes)
    details = {
        **found.details,
        "dtype": str(ready.model.dtype).removeprefix("torch."),
        "text": ready.policy.describe(ready.tokenizer),
    }
    found = replace(found, details=details)
    write_scores(inputs, ready, found)
    return found
