"""All protocols beside SemEval's, whose scorecard is the default."""

from __future__ import annotations

from collections.abc import Mapping

from expunge.evaluation.protocols import muse, rwku, tofu
from expunge.evaluation.protocols.base import Protocol

PROTOCOLS: Mapping[str, Protocol] = {
    protocol.name: protocol for protocol in (tofu.PROTOCOL, muse.PROTOCOL, rwku.PROTOCOL)
}
