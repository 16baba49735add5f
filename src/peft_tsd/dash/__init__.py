"""Directions beside any method of PEFT's whose layers change a weight: `layer(x) + U diag(Δσ) Vᵀ x`."""

from __future__ import annotations
