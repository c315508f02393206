"""MasterWeightAdamW: torch's AdamW in float32, whatever the type of the parameters."""

from __future__ import annotations

import io

import pytest
import torch

from sft_dist.train.optimizer import MasterWeightAdamW

SETTINGS = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    """Three bfloat16 parameters of different shapes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((17, 9), (5,), (2, 3, 4))
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in shapes]


def gradients(step: int, like: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(param.shape, generator=generator).bfloat16() for param in like]


def take(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        for param, grad in zip(params, gradients(step, params), strict=True):
            param.grad = grad.to(param.dtype)
        optimizer.step()


def test_it_is_adamw_on_float32_copies() -> None:
    params = parameters()
    copies = [torch.nn.Parameter(param.detach().float()) for param in params]
    ours, reference = MasterWeightAdamW(params, **SETTINGS), torch.optim.AdamW(copies, **SETTINGS)
    for step in range(25):
        take(ours, params, range(step, step + 1))
        take(reference, copies, range(step, step + 1))
        for param, copy in zip(params, copies, strict=True):
            master = ours.state[param]["master"]
            assert master.dtype == torch.float32
            torch.testing.assert_close(master, copy.detach(), rtol=1e-6, atol=1e-7)
            assert torch.equal(param.detach(), master.bfloat16()), "the parameter is not its rounded master"
    assert not torch.equal(params[0].detach(), parameters()[0].detach())


def test_updates_below_bfloat16s_resolution_add_up() -> None:
    ours, plain = (torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16)) for _ in range(2))
    kept = MasterWeightAdamW([ours], lr=1e-4)
    lost = torch.optim.AdamW([plain], lr=1e-4, weight_decay=0.0)
    for _ in range(200):
        for param, optimizer in ((ours, kept), (plain, lost)):
            param.grad = torch.ones_like(param)
            optimizer.step()
    assert torch.equal(plain.detach(), torch.ones(8, dtype=torch.bfloat16)), "the control lost nothing: a vain test"
    torch.testing.assert_close(ours.detach().float(), torch.full((8,), 1 - 200 * 1e-4), rtol=0, atol=2**-8)


def test_a_saved_state_goes_on_bit_for_bit() -> None:
    straight, broken = parameters(), parameters()
    optimizer = MasterWeightAdamW(straight, **SETTINGS)
    take(optimizer, straight, range(12))

    first = MasterWeightAdamW(broken, **SETTINGS)
    take(first, broken, range(5))
    file = io.BytesIO()
    torch.save({"optimizer": first.state_dict(), "params": [param.detach() for param in broken]}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = [torch.nn.Parameter(tensor.clone()) for tensor in saved["params"]]
    second = MasterWeightAdamW(again, lr=1.0)
    second.load_state_dict(saved["optimizer"])
    for old, new in zip(broken, again, strict=True):
        for name, value in first.state[old].items():
            restored = second.state[new][name]
            assert restored.dtype == torch.float32, f"{name} came back as {restored.dtype}"
            assert torch.equal(restored, value), f"{name} changed on the way"
    take(second, again, range(5, 12))
    for param, other in zip(straight, again, strict=True):
        assert torch.equal(param.detach(), other.detach())
        assert torch.equal(optimizer.state[param]["master"], second.state[other]["master"])


def test_a_loaded_state_is_a_copy() -> None:
    params, others = parameters(), parameters()
    first, second = MasterWeightAdamW(params, **SETTINGS), MasterWeightAdamW(others, **SETTINGS)
    take(first, params, range(2))
    second.load_state_dict(first.state_dict())
    before = first.state[params[0]]["master"].clone()
    take(second, others, range(2, 4))
    assert torch.equal(first.state[params[0]]["master"], before)


def test_groups_have_their_own_settings() -> None:
    decayed, free, frozen = parameters()
    copies = [torch.nn.Parameter(param.detach().float()) for param in (decayed, free)]
    groups = [{"params": [decayed], "weight_decay": 0.5}, {"params": [free], "lr": 1e-2}, {"params": [frozen]}]
    ours = MasterWeightAdamW(groups, lr=1e-3)
    reference = torch.optim.AdamW(
        [{"params": [copies[0]], "weight_decay": 0.5}, {"params": [copies[1]], "lr": 1e-2, "weight_decay": 0.0}],
        lr=1e-3,
    )
    untouched = frozen.detach().clone()
    for step in range(5):
        take(ours, [decayed, free], range(step, step + 1))
        take(reference, copies, range(step, step + 1))
    for param, copy in zip((decayed, free), copies, strict=True):
        torch.testing.assert_close(ours.state[param]["master"], copy.detach(), rtol=1e-6, atol=1e-7)
    assert torch.equal(frozen.detach(), untouched), "a parameter without a gradient moved"
    assert not ours.state[frozen]


def test_a_scheduler_sets_its_learning_rate() -> None:
    params = parameters()
    copies = [torch.nn.Parameter(param.detach().float()) for param in params]
    ours, reference = MasterWeightAdamW(params, **SETTINGS), torch.optim.AdamW(copies, **SETTINGS)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)) for o in (ours, reference)]
    for step in range(6):
        take(ours, params, range(step, step + 1))
        take(reference, copies, range(step, step + 1))
        for schedule in schedules:
            schedule.step()
    assert ours.param_groups[0]["lr"] == pytest.approx(SETTINGS["lr"] / 7)
    for param, copy in zip(params, copies, strict=True):
        torch.testing.assert_close(ours.state[param]["master"], copy.detach(), rtol=1e-6, atol=1e-7)


def test_it_moves_a_float32_parameter_too() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    copy = torch.nn.Parameter(torch.ones(3))
    copy.grad = torch.ones(3)
    MasterWeightAdamW([param], **SETTINGS).step()
    torch.optim.AdamW([copy], **SETTINGS).step()
    torch.testing.assert_close(param.detach(), copy.detach())


def test_a_closure_computes_the_gradient() -> None:
    param = torch.nn.Parameter(torch.full((3,), 2.0).bfloat16())
    optimizer = MasterWeightAdamW([param], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (param.float() ** 2).sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 12.0
    assert bool((param < 2).all())
