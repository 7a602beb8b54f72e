"""How far a tuned model has gone from its base: forward KL from two sets of logits."""

import torch
from torch import Tensor


def forward_kl(base: Tensor, tuned: Tensor) -> Tensor:
    """Return KL(base || tuned) = sum_v p_v (log p_v - log q_v) of each position, in nats.

    Args:
        base: Logits [N, V] of the base, in any precision; p is their softmax, in float32.
        tuned: Logits [N, V] of the tuned model; q.

    Returns:
        [N] float32, exactly zero where the logits are equal.
    """
    p, q = (torch.log_softmax(logits.float(), dim=-1) for logits in (base, tuned))
    return (p.exp() * (p - q)).sum(-1)


def cross_entropy_and_kl(
    tuned: Tensor, base: Tensor, labels: Tensor, weights: Tensor, kl_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return -log q[label] [N], KL(base || tuned) [N], and the gradient of both by the logits.

    The gradient [N, V], in the logits' precision, is that of
    sum_i weight_i (-log q_i[label_i] + kl_weight KL_i): weight (q - onehot + kl_weight (q - p)).
    """
    log_p, log_q = (torch.log_softmax(logits.float(), dim=-1) for logits in (base, tuned))
    at_label = labels.unsqueeze(1)
    losses = -log_q.gather(1, at_label).squeeze(1)
    p, q = log_p.exp(), log_q.exp()
    kl = log_p.sub_(log_q).mul_(p).sum(-1)
    gradient = p.sub_(q).mul_(-kl_weight).add_(q)
    gradient.scatter_add_(1, at_label, torch.full_like(at_label, -1.0, dtype=torch.float32))
    return losses, kl, gradient.mul_(weights.unsqueeze(1)).to(tuned.dtype)
