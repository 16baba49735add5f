"""The slow, obviously right forms: numpy's float64 SVD and dense matrices, written from the definitions."""

import numpy as np
import torch


def svd(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """u (out, k), sigma (k,), v (in, k)."""
    u, sigma, vt = np.linalg.svd(weight.detach().double().numpy(), full_matrices=False)
    return u, sigma, vt.T


def change_rates(weight: torch.Tensor, delta: torch.Tensor, eps: float = 1e-6) -> np.ndarray:
    u, sigma, v = svd(weight)
    delta = delta.detach().double().numpy()
    return np.array([abs(u[:, i] @ delta @ v[:, i]) / (sigma[i] + eps) for i in range(len(sigma))])


def effective_change(layer, adapter: str = "default") -> torch.Tensor:
    """ΔW (out, in) of an adapted layer, term by term: s(B·A − B₀·A₀ + B₁·A₁) + Σ_j Δσ_j u_j v_jᵀ."""
    double = lambda t: t.detach().double().flatten(1)  # noqa: E731
    fixed = layer.lora_directions[adapter]
    scaling = layer.scaling[adapter]
    delta = scaling * double(layer.lora_B[adapter].weight) @ double(layer.lora_A[adapter].weight)
    if fixed.a0 is not None:
        delta = delta - scaling * double(fixed.b0) @ double(fixed.a0)
    if fixed.kept_a is not None:
        delta = delta + scaling * double(fixed.kept_b) @ double(fixed.kept_a)
    if fixed.u is None:
        return delta
    theta = layer.lora_dash[adapter].weight.detach().double()
    config = layer.tsd_config[adapter]
    weight = layer.weight_matrix()
    us, vs = fixed.u.double(), fixed.v.double()
    if fixed.taken is not None:  # LoRA-TSD's start lies along its directions, and is taken out
        for j in range(us.shape[1]):
            if fixed.taken[j]:
                delta = delta - scaling * torch.outer(us[:, j], vs[j])
        learned = fixed.to_unit != 0
        us = torch.nn.functional.normalize(us, dim=0) * learned
        vs = torch.nn.functional.normalize(vs, dim=1)
    for j in range(len(theta)):
        unit = 1.0
        if config.dash_unit == "sigma":
            unit = float(us[:, j] @ weight.double() @ vs[j])
        elif config.dash_unit == "layer":
            unit = float(np.sqrt(np.mean(svd(weight)[1] ** 2)))
        delta = delta + config.dash_lr_ratio * unit * theta[j] * torch.outer(us[:, j], vs[j])
    return delta
