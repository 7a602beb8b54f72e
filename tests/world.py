"""What one process of several measures and trains; run by test_metamorphic as torchrun would."""

import sys
from pathlib import Path

import torch

from postgrad.model.attention import training_attention
from postgrad.parallel import World, join_world
from postgrad.train.optimizer import trainable
from training import make_training, timeless, weights_of


def measure_as_one_of(world: World, base: Path, out: Path):
    """Return summed loss and gradients of one step, the held-out loss, and three steps of `fit`."""
    place = out / f"run-{world.rank}-of-{world.size}"
    training = make_training(base, place, max_steps=3, capacity=50)
    batches = training.stream.step(0)
    training.model.train()
    total = 0.0
    with training_attention(training.model):
        for batch in batches[world.rank :: world.size]:
            loss = training.objective(training.model, batch)
            loss.total.backward()
            total += float(loss.total.detach())
        held_out = training.validation(training.model, training.objective, world).loss
    parameters = trainable(training.model)
    world.sum_gradients(parameters.values())
    found = {f"gradient/{name}": p.grad.clone() for name, p in parameters.items()}
    training.optimizer.zero_grad(set_to_none=True)
    found |= {
        "world": world.size,
        "micro": len(batches),
        "total": world.sum(total),
        "held_out": held_out,
        "flags": [world.any(world.rank == 1), world.any(False)],
    }
    training.go(world=world)
    return found | {"metrics": timeless(training.run), **weights_of(training.model)}


if __name__ == "__main__":
    base, out = map(Path, sys.argv[1:])
    world = join_world()
    torch.save(measure_as_one_of(world, base, out), out / f"{world.rank}-of-{world.size}.pt")
    world.barrier()
    torch.distributed.destroy_process_group()
