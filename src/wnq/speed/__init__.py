"""How fast a network runs, float and integer, in every engine that is installed: paired, in turn, on one thread.

``arms`` are the ways to run a network, ``measuring`` takes them in turn, ``summary`` says what came out.
"""

from wnq.speed.arms import Arm, LeftOut, arms_of
from wnq.speed.measuring import in_turn, measure_speed
from wnq.speed.summary import Ratio, median_ratio

__all__ = ["Arm", "LeftOut", "Ratio", "arms_of", "in_turn", "measure_speed", "median_ratio"]
