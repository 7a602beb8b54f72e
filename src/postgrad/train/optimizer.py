"""AdamW over the trainable parameters: decay on matrices only, float32 state, fused kernels."""

from typing import Any

import torch
from torch import Tensor, nn

from postgrad.config import TrainConfig


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return name -> parameter for everything that is trained, in a fixed order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_optimizer(model: nn.Module, config: TrainConfig, peak: float) -> torch.optim.AdamW:
    """Return a fused AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) for `model`."""
    parameters = trainable(model).values()
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=peak,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the moments under the parameters' names: `exp_avg/<name>` and so on."""
    state: dict[str, Tensor] = {}
    for name, parameter in trainable(model).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"{key}/{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return state


def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]
) -> None:
    """Put saved moments back; every trainable parameter must have been saved."""
    by_name: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        kind, _, name = key.partition("/")
        by_name.setdefault(name, {})[kind] = value
    for name, parameter in trainable(model).items():
        moments = by_name[name]
        optimizer.state[parameter] = {
            kind: value.to(parameter.device) if kind != "step" else value.clone()
            for kind, value in moments.items()
        }
