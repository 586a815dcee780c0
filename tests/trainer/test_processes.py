"""Several processes: `torchrun` with gloo on the CPU gives what one process gives; runs change their size on resume.

Dropout is off: its noise belongs to a process. What is left is the data, and the order in which floats are added.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
NO_DROPOUT = ",hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"
STEPS = 8

pytestmark = pytest.mark.slow  # a launch takes some 10 s, nearly all of it imports


@pytest.fixture(scope="module")
def launch(hardness_folder, tiny_roberta):
    """launch(output, processes, flags…): 8 steps of 8 blocks, a checkpoint after the fourth."""

    def launch(output, processes, *flags):
        *model, overrides = tiny_roberta
        program = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
        command = [
            *(sys.executable, *program, "-m", "trainer.pretrain", "--shards", str(hardness_folder)),
            *(*model, overrides + NO_DROPOUT, "--output_dir", str(output), "--alpha", "0.001"),
            *("--max_steps", str(STEPS), "--save_steps", "4", "--logging_steps", "1", "--warmup_steps", "0"),
            *("--global_batch_size", "8", "--learning_rate", "1e-3", "--per_device_eval_batch_size", "16"),
            *("--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", *flags),
            *(("--ddp_backend", "gloo") if processes > 1 else ()),
        ]
        done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return output

    return launch


@pytest.fixture(scope="module")
def alone(tmp_path_factory, launch):
    """One process."""
    return launch(tmp_path_factory.mktemp("alone"), 1, "--per_device_train_batch_size", "4")


@pytest.fixture(scope="module")
def together(tmp_path_factory, launch):
    """Two processes, each of which accumulates over two micro-batches."""
    return launch(tmp_path_factory.mktemp("together"), 2, "--per_device_train_batch_size", "2")


def history(output):
    """Loss and gradient norm of each step."""
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return np.array([(entry["loss"], entry["grad_norm"]) for entry in log if "grad_norm" in entry])


def assert_same_run(output, expected):
    """The same batches under the same masks: any other block would move a loss by far more than 1e-4 of it."""
    assert history(expected).shape == (STEPS, 2)
    np.testing.assert_allclose(history(output), history(expected), rtol=1e-4)
    weights, wanted = (load_file(folder / "model.safetensors") for folder in (output, expected))
    for name, values in wanted.items():
        # Adam divides by the square root of tiny second moments, which magnifies what rounding left in them.
        np.testing.assert_allclose(weights[name], values, rtol=0, atol=5e-4)
    results, wanted = (json.loads((folder / "all_results.json").read_text()) for folder in (output, expected))
    for name in ("eval_uniform_loss", "eval_own_loss", "eval_hardness_loss", "eval_mask_rate"):
        assert results[name] == pytest.approx(wanted[name], rel=1e-4)


def test_two_processes_train_as_one_does(together, alone):
    assert_same_run(together, alone)


def test_a_run_of_two_processes_goes_on_with_one_and_with_loader_workers(tmp_path, launch, together, alone):
    shutil.copytree(together / "checkpoint-4", tmp_path / "checkpoint-4")
    launch(tmp_path, 1, "--per_device_train_batch_size", "8", "--dataloader_num_workers", "2")
    assert_same_run(tmp_path, alone)


def test_a_run_of_one_process_goes_on_with_two(tmp_path, launch, alone):
    shutil.copytree(alone / "checkpoint-4", tmp_path / "checkpoint-4")
    launch(tmp_path, 2, "--per_device_train_batch_size", "4")
    assert_same_run(tmp_path, alone)


SHARDED = """
import os
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import RobertaConfig, RobertaForMaskedLM
from trainer.head import on_masked_positions

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
model = on_masked_positions(RobertaForMaskedLM(RobertaConfig(vocab_size=500, **sizes)).eval())
ids = torch.randint(5, 500, (4, 64))
positions = torch.stack([torch.randperm(64)[:9].sort().values for _ in range(4)])
labels = ids.gather(1, positions)
whole = model(input_ids=ids, masked_positions=positions, labels=labels).loss
whole.backward()
wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
model.zero_grad()
for layer in model.roberta.encoder.layer:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
inputs = dict(input_ids=ids[mine], masked_positions=positions[mine], labels=labels[mine])
loss = 2 * model(**inputs, num_items_in_batch=labels.numel()).loss  # gradients are averaged over the two
loss.backward()
for name, parameter in model.named_parameters():
    assert parameter.to_local().numel() < parameter.numel() or parameter.numel() < 2, name
    torch.testing.assert_close(parameter.grad.full_tensor(), wanted[name], rtol=0, atol=1e-6)
both = loss.detach().clone()
dist.all_reduce(both)
torch.testing.assert_close(both / 2, whole.detach(), rtol=1e-6, atol=0)
dist.barrier()
os._exit(0)  # at the interpreter's own end gloo's threads abort it now and then, which says nothing about gradients
"""


def test_the_head_of_a_model_that_is_sharded_over_two_processes_gives_the_same_gradients(tmp_path):
    """FSDP's own `fully_shard`: Trainer's `--fsdp` asks for accelerators and trains without it on CPUs."""
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
