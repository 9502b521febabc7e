"""The trainer: a readable loop (``loop``), one step of it (``step``), its settings (``config``) and its parts."""

from wnq.train.batchnorm import reestimate_batchnorm_
from wnq.train.config import TrainConfig, schedule
from wnq.train.divergence import TrainingDivergedError
from wnq.train.failures import OutOfMemoryError, ProcessLostError
from wnq.train.interrupt import Interrupted
from wnq.train.loop import fit
from wnq.train.processes import plain_accelerator
from wnq.train.progress import Progress, TrainResult
from wnq.train.tails import TAILS

__all__ = [
    "TAILS",
    "Interrupted",
    "OutOfMemoryError",
    "ProcessLostError",
    "Progress",
    "TrainConfig",
    "TrainResult",
    "TrainingDivergedError",
    "fit",
    "plain_accelerator",
    "reestimate_batchnorm_",
    "schedule",
]
