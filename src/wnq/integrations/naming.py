"""Records as named numbers, which is what trackers and loggers take."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import fields

from wnq.names import check_choice
from wnq.recorder import TailRecord

LOGS = ("layers", "medians", "none")
STATISTICS = tuple(field.name for field in fields(TailRecord) if field.name not in {"step", "layer", "bits"})


def scalars(records: Sequence[TailRecord], log: str = "layers") -> dict[str, float]:
    """Return numbers named ``statistic/layer``, such as ``crest/layer1.0.conv1``; what is undefined (NaN) is left out.

    Args:
        records: of one step.
        log: ``"layers"``: every layer; ``"medians"``: the median over the layers, ``crest/median``, but of ``nonfinite`` the sum,
            ``nonfinite/sum``; ``"none"``: nothing.

    Raises:
        ValueError: another ``log``.
    """
    check_choice(log, LOGS, where="log")
    found: dict[str, float] = {}
    for statistic in STATISTICS if log != "none" else ():
        values = {record.layer: float(getattr(record, statistic)) for record in records}
        values = {layer: value for layer, value in values.items() if math.isfinite(value)}
        if log == "medians" and statistic == "nonfinite":
            values = {"sum": sum(values.values())}  # a median would hide the one layer that breaks
        elif log == "medians":
            values = {"median": statistics.median(values.values())} if values else {}
        found |= {f"{statistic}/{layer}": value for layer, value in values.items()}
    return found
