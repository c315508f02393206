"""What config/rules_parallel.py refuses is what the libraries still cannot do; a test that fails here is good news."""

from __future__ import annotations

import os

import pytest
import torch
from accelerate.utils import DeepSpeedSequenceParallelConfig


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    monkeypatch.delenv("PARALLELISM_CONFIG_SP_ATTN_IMPLEMENTATION", raising=False)


def test_recomputing_as_fsdp2_does_it_drops_other_values_than_the_first_pass():
    """accelerate's fsdp2_apply_ac wraps each layer with preserve_rng_state=False."""
    import inspect

    from accelerate.utils.fsdp_utils import fsdp2_apply_ac
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    assert "preserve_rng_state=False" in inspect.getsource(fsdp2_apply_ac)
    agree = {}
    for preserve in (True, False):
        torch.manual_seed(0)
        layer = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False), torch.nn.Dropout(0.5))
        output = checkpoint_wrapper(layer, preserve_rng_state=preserve)(torch.ones(1, 64))
        output.sum().backward()
        has_gradient = layer[0].weight.grad.abs().sum(1) != 0
        agree[preserve] = torch.equal(output.squeeze() != 0, has_gradient)
    assert agree == {True: True, False: False}


@pytest.mark.parametrize("attention", ["eager", "flex_attention", "sft_dist_varlen"])
def test_accelerate_shares_no_rows_with_this_attention(attention):
    with pytest.raises(ValueError, match="sp_attn_implementation"):
        DeepSpeedSequenceParallelConfig(sp_attn_implementation=attention)


@pytest.mark.parametrize(
    "attention", ["sdpa", "flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"]
)
def test_accelerate_shares_rows_with_this_attention(attention):
    assert DeepSpeedSequenceParallelConfig(sp_attn_implementation=attention).sp_attn_implementation == attention


def test_trl_refuses_losses_that_rows_shared_between_gpus_would_break():
    import inspect

    from trl import SFTTrainer

    source = inspect.getsource(SFTTrainer.__init__)
    assert "are not supported with DeepSpeed" in source
    assert "Applying a PEFT adapter to `lm_head` is not supported" in source
    assert "`gradient_checkpointing_kwargs={'selective': True}` is not supported with PEFT + DeepSpeed" in source


def test_transformers_loads_a_quantized_model_whole_on_each_process_of_zero3():
    import inspect

    from transformers import PreTrainedModel

    source = inspect.getsource(PreTrainedModel.get_init_context)
    assert "if not is_quantized and not _is_ds_init_called" in source


def test_deepspeed_stage_2_takes_nvme_for_host_memory():
    import inspect

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    source = inspect.getsource(DeepSpeedZeroOptimizer.__init__)
    assert "offload_optimizer_config.device != OffloadDeviceEnum.none:\n            self.cpu_offload = True" in source


@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 8), (28, 4), (9, 3), (12, 8), (8, 1)])
def test_deepspeed_deals_out_heads_among_the_sizes_that_the_planner_allows(heads, kv_heads, monkeypatch):
    """UlyssesSPAttentionHF.__init__, asked with a group of each size."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.sequence_parallel import ulysses_sp

    from sft_dist.parallel.batch import sizes

    def accepts(size):
        monkeypatch.setattr(ulysses_sp.dist, "get_world_size", lambda group=None: size)
        monkeypatch.setattr(ulysses_sp.dist, "get_rank", lambda group=None: 0)
        monkeypatch.setattr(ulysses_sp, "register_all_to_all_group", lambda group: None)
        attention = ulysses_sp.UlyssesSPAttentionHF
        try:
            attention(None, 1, heads, 64, kv_heads, 2, None, seq_length_is_variable=True)
        except ValueError as error:
            assert "ead count" in str(error), error
            return False
        return True

    assert [size for size in range(1, heads + 1) if accepts(size)] == sizes(heads, kv_heads)
