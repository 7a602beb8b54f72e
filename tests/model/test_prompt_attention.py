"""Prompts read with their common beginning equal each prompt read by itself."""

import pytest
import torch
from torch.nn import functional

from postgrad.model.prompt_attention import PLAIN_SCORES, fits_together, read_together

torch.set_num_threads(1)


@pytest.mark.parametrize("before", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_token_sees_the_beginning_and_its_own_past(before, dtype):
    torch.manual_seed(8)
    lengths = [11, 7, 1]
    rows = torch.repeat_interleave(torch.tensor(lengths))
    columns = torch.cat([torch.arange(length) for length in lengths])
    query = torch.randn(1, 4, sum(lengths), 16).to(dtype)
    key, value = torch.randn(2, 3, 2, 11, 16).to(dtype)
    prefix = tuple(torch.randn(2, 1, 2, before, 16).to(dtype)) if before else None
    found = read_together(query, key, value, 0.25, (rows, columns), prefix)
    assert found.shape == (1, sum(lengths), 4, 16)
    for row, length in enumerate(lengths):
        keys, values = (x[row : row + 1, :, :length].double() for x in (key, value))
        if prefix:
            keys, values = (
                torch.cat([shared.double(), own], 2)
                for shared, own in zip(prefix, (keys, values), strict=True)
            )
        visible = torch.ones(length, before + length, dtype=torch.bool).tril(before)
        own = query[:, :, rows == row].double()
        wanted = functional.scaled_dot_product_attention(
            own, keys, values, visible, scale=0.25, enable_gqa=True
        )
        tolerance = 1e-5 if dtype is torch.float32 else 0.03
        torch.testing.assert_close(
            found[:, rows == row].transpose(1, 2).double(), wanted, atol=tolerance, rtol=tolerance
        )


def test_long_rows_and_long_beginnings_are_left_to_the_others():
    query = torch.zeros(1, 4, 6, 8)
    pairs = {n: (torch.zeros(1, 2, n, 8),) * 2 for n in (3, 5, 400)}
    assert fits_together(query, pairs[5][0], None)
    assert fits_together(query, pairs[5][0], pairs[3])
    assert not fits_together(query, pairs[3][0], pairs[5])
    assert PLAIN_SCORES < 400 * 400
    assert not fits_together(query, pairs[400][0], None)
