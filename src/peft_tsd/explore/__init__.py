"""See the directions: what fine-tuning changed, along the core directions of every weight."""

from .errors import ExploreError
from .exploring import explore
from .measure import agreement, measure, overlap
from .output import write
from .recorder import DirectionRecorder
from .results import Agreement, Exploration, Overlap, Share, WeightChange, summary
from .trajectory import Trajectory

__all__ = [
    "Agreement",
    "DirectionRecorder",
    "Exploration",
    "ExploreError",
    "Overlap",
    "Share",
    "Trajectory",
    "WeightChange",
    "agreement",
    "explore",
    "measure",
    "overlap",
    "summary",
    "write",
]
