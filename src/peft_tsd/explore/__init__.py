"""See the directions: what fine-tuning changed, along the core directions of every weight."""

from .results import Agreement, Exploration, Overlap, Share, WeightChange, summary

__all__ = ["Agreement", "Exploration", "Overlap", "Share", "WeightChange", "summary"]
