"""AdamW over the trainable parameters: decay on matrices only, float32 state, fused kernels."""

import torch
from torch import Tensor, nn

from postgrad.config import TrainConfig
from postgrad.errors import CheckpointError


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
    """Put saved moments back; a parameter that never had a gradient has none.

    Raises CheckpointError when moments of a parameter were saved that is not trained here.
    """
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        kind, _, name = key.partition("/")
        by_name.setdefault(name, {})[kind] = value
    parameters = trainable(model)
    unknown = sorted(set(by_name) - set(parameters))
    if unknown:
        raise CheckpointError(
            f"the checkpoint holds optimizer state for {unknown[0]}, which is not trained here",
            "use the recipe it was saved with",
        )
    for name, moments in by_name.items():
        device = parameters[name].device
        optimizer.state[parameters[name]] = {
            kind: value.to(device, copy=True) for kind, value in moments.items()
        }
