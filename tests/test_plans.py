"""benchmarks/plans.py: no plan's count is below what its step allocates."""

import pytest
import torch
from peft import LoraConfig

import grpo_base
from benchmarks import plans
from common import models
from common.args import defaults
from common.memory.bytes import Launch
from common.memory.ways import Counter, plan

ON_A_GPU = Launch(torch.bfloat16, "cuda")


def outlined(name, lora):
    model = models.outline(name, torch.bfloat16, 0)
    for module in model.trainable.values():
        module.requires_grad_(not lora)
        if lora:
            with torch.device("meta"):
                module.add_adapter(LoraConfig(r=4, target_modules=model.lora_targets))
                for key, weight in module.named_parameters():
                    if "lora" in key:  # float32, as adapt_model makes them
                        weight.data = weight.data.float()
    return model


@pytest.mark.parametrize(
    "name, lora, settings",
    [
        ("tiny-flux", False, {}),
        ("tiny-flux", True, dict(gradient_checkpointing=True, offload_encoders=True)),
        ("tiny-sd", True, {}),
        ("tiny-wan", False, dict(gradient_checkpointing=True)),
    ],
)
def test_a_step_allocates_at_most_what_was_counted(name, lora, settings):
    model = outlined(name, lora)
    few = dict(prompts_per_step=2, group_size=4, sampling_steps=4, micro_batch=4, lora_rank=4)
    args = defaults(grpo_base.Args, name, **{**few, "lora_rank": 4 if lora else 0, **settings})
    counter = Counter(model, ON_A_GPU)
    found = plan(args, counter, free=2**40)
    assert found.batch == 4
    counted = plans.counted(found, counter)
    peaks = plans.measured(model, args, found)
    assert max(peaks.values()) <= counted, peaks
    assert max(peaks.values()) > 0.6 * counted, (peaks, counted)


def test_a_cell_says_what_a_plan_chose():
    model = outlined("tiny-flux", False)
    args = defaults(grpo_base.Args, micro_batch=4)
    counter = Counter(model, ON_A_GPU)
    found = plan(args, counter, free=2**40)
    assert plans.cell("tiny-flux", found, counter).startswith("4 rows: 0.")
    assert plans.cell("tiny-flux", None, counter) == "-"


def test_the_table_has_a_row_for_each_number_of_gpus(monkeypatch):
    monkeypatch.setattr(plans.memory, "full_size", outlined)
    args = plans.Args(model=("tiny-flux",), trained=("LoRA",), gib=(24,), measure=True)
    (one, eight) = plans.rows_of_table(args)
    assert (one[:3], eight[:3]) == (["`tiny-flux`", "LoRA", "1"], ["`tiny-flux`", "LoRA", "8"])
    assert "rows" in one[3] and "(measured " in one[3]
    assert "rows" in eight[3] and "measured" not in eight[3]
