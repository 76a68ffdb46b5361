from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from custom.memory import LiveMemory

MB = 1 << 20


def floats(megabytes: int) -> int:
    return megabytes * MB // 4


def test_tensors_count_while_they_live() -> None:
    with LiveMemory() as memory:
        kept = torch.ones(floats(3))
        torch.ones(floats(2))
        assert memory.current == 3 * MB, "the other one is gone"
        assert memory.peak == 5 * MB
        del kept
        assert memory.current == 0


def test_views_and_operations_in_place_count_once() -> None:
    with LiveMemory() as memory:
        whole = torch.ones(2, floats(1))
        views = [whole.T, whole[0], whole.view(-1).detach()]
        whole.add_(1).mul_(2)
        assert memory.peak == 2 * MB
        del whole
        assert memory.current == 2 * MB, "a view keeps all of it"
        del views
        assert memory.current == 0


def test_what_was_there_before_counts_from_its_first_use() -> None:
    before = torch.ones(floats(1))
    with LiveMemory() as memory:
        assert memory.current == 0
        after = before + 1
        assert memory.current == 2 * MB
    del after
    assert memory.peak == 2 * MB


def peak_of_training() -> int:
    network = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.SiLU(), nn.GroupNorm(2, 8), nn.Conv3d(8, 1, 3))
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    x = torch.zeros(2, 1, 16, 16, 16)
    with LiveMemory() as memory:
        for _ in range(2):
            optimizer.zero_grad()
            network(x).square().mean().backward()
            optimizer.step()
    return memory.peak


def test_what_autograd_keeps_counts_and_fake_tensors_say_the_same() -> None:
    real = peak_of_training()
    activation = 2 * 8 * 16**3 * 4
    assert real > 4 * activation, "input of each layer, and a gradient"
    with FakeTensorMode():
        assert peak_of_training() == real


def test_the_largest_convolution_is_known() -> None:
    x, layer = torch.zeros(1, 1, 8, 8, requires_grad=True), nn.Conv2d(1, 3, 3, padding=1, bias=False)
    with LiveMemory() as memory:
        y = layer(x)
        assert memory.convolution == 4 * (64 + 27 + 3 * 64)
        y.sum().backward()
        assert memory.convolution == 4 * (3 * 64 + 2 * (64 + 27)), "gradients of both, too"


def test_fake_tensors_take_no_memory() -> None:
    with FakeTensorMode(), LiveMemory() as memory:
        huge = torch.zeros(1 << 40)
        total = huge + huge
        assert memory.current == 2 * 4 << 40
        del huge, total
        assert memory.current == 0


def test_pytorchs_own_count_agrees_on_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with LiveMemory() as memory, torch.device("cuda"):
        kept = [torch.ones(floats(4)) for _ in range(3)]
        torch.cat(kept)
    assert memory.peak == torch.cuda.max_memory_allocated() - before
