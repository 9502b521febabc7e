"""The experiment that settles whether normalization does what the paper claims, and the verdict, whichever way it falls.

``experiment`` says what is run, ``measures`` what one run says, ``claims`` what it means, ``running`` is the whole.
"""

from wnq.settle.claims import CLAIMS, Claim, Test, hold
from wnq.settle.experiment import ARMS, BITS, CONTROLS, experiment
from wnq.settle.measures import LayerMeasure, RunMeasure, measure_run
from wnq.settle.running import VERDICT, judge, settle

__all__ = [
    "ARMS",
    "BITS",
    "CLAIMS",
    "CONTROLS",
    "VERDICT",
    "Claim",
    "LayerMeasure",
    "RunMeasure",
    "Test",
    "experiment",
    "hold",
    "judge",
    "measure_run",
    "settle",
]
