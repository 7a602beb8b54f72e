"""trl_sft.py on a model with random weights, made from the config.json of its directory.

Usage: python trl_random.py SPEC.json. For speed on a device: the step lines also say how much of
its memory was used at most, and the loss of a step is not read back, which would hold the trainer
up.
"""

from typing import Any

import torch
import trl_sft
from transformers import AutoConfig, AutoModelForCausalLM


class Recorder(trl_sft.Recorder):
    """Adds the device's memory to every line."""

    def write(self, **line: Any) -> None:
        """Append a line."""
        if torch.cuda.is_available():
            line["peak_device_bytes"] = torch.cuda.max_memory_allocated()
        super().write(**line)

    def watch(self, trainer: Any) -> None:
        """Count what the collator makes."""
        compute_loss = trainer.compute_loss
        super().watch(trainer)
        trainer.compute_loss = compute_loss
        self.losses = [float("nan")]


def random_model(spec: dict[str, Any]) -> Any:
    """Return the model with random weights in the precision that the spec says."""
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = AutoConfig.from_pretrained(spec["model"])
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, spec["dtype"]))


if __name__ == "__main__":
    trl_sft.Recorder = Recorder
    trl_sft.load_model = random_model
    trl_sft.main()
