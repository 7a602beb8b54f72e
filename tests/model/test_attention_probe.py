"""The micro-probe measures what a run will do and draws the line where the measurements cross."""

import pytest
import torch

from postgrad.model.attention_probe import CERTAIN, LENGTHS, crossover, probe_attention

torch.set_num_threads(1)


def test_the_line_lies_between_the_last_win_and_the_first_loss():
    assert crossover({}) == CERTAIN
    assert crossover({320: (1.0, 3.0)}) == 320
    assert crossover({320: (2.0, 1.0)}) == (CERTAIN + 320) // 2
    assert crossover({1024: (3.0, 1.0), 256: (1.0, 3.0), 512: (1.0, 2.0)}) == 768


def test_nothing_is_measured_where_the_answer_is_certain():
    assert probe_attention(CERTAIN, 4, 2, 16, torch.float32).seconds == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lengths_up_to_the_longest_row_are_measured(dtype):
    for longest, lengths in {300: [304], 400: [256, 400], 600: [256, 608]}.items():
        probe = probe_attention(longest, 4, 2, 16, dtype)
        assert list(probe.seconds) == lengths
        assert min(min(pair) for pair in probe.seconds.values()) > 0
        assert CERTAIN <= probe.limit <= lengths[-1]
        assert probe.limit % 16 == 0
    assert lengths[-1] < LENGTHS[-1]
