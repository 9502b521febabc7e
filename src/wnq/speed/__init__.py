"""How fast a network runs, float and integer, in every engine that is installed; and how fast it trains, float and quantized.

All is paired and in turn. ``arms`` are the ways to run a network, ``measuring`` takes them in turn on one thread, ``training`` does
so with steps of training (``training_arm``, ``memory``), ``summary`` says what came out.
"""

from wnq.speed.arms import Arm, LeftOut, arms_of
from wnq.speed.measuring import in_turn, measure_speed
from wnq.speed.summary import Ratio, median_ratio
from wnq.speed.training import measure_training, training_arms
from wnq.speed.training_arm import TrainArm, random_images

__all__ = [
    "Arm",
    "LeftOut",
    "Ratio",
    "TrainArm",
    "arms_of",
    "in_turn",
    "measure_speed",
    "measure_training",
    "median_ratio",
    "random_images",
    "training_arms",
]
