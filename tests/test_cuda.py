"""Tests on a GPU: every method in every precision, CUDA graphs, guidance, and a stopped run. Skipped without a GPU.

The test suite hides all GPUs by default. To use one: CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_cuda.py
"""

import json
import math

import pytest
import torch

from datafree.losses import BNStatistics, bn_loss
from engine.runtime.tensors import load_checkpoint
from tests.conftest import CPU, TINY, make_classifier
from tests.tiny_pipelines import patch_prior, stable_diffusion

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and CUDA_VISIBLE_DEVICES=0")


def look_at(folder) -> dict:
    """Returns the result of a finished run, after checking that its student and metrics are finite."""
    result = json.loads((folder / "result.json").read_text())
    assert 0 <= result["acc1_last"] <= 100
    assert all(tensor.isfinite().all() for tensor in load_checkpoint(folder / "student.pth")["state_dict"].values())
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        assert all(math.isfinite(v) for v in json.loads(line).values() if isinstance(v, float)), line
    return result


@pytest.mark.parametrize("amp", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("method", TINY)
def test_method(distill, tmp_path, method, amp):
    distill(method, tmp_path / "run", f"--gpu 0 --amp {amp}")
    look_at(tmp_path / "run")


@pytest.mark.parametrize("method", ["kd", "fast", "csd", "dda", "dafl", "zskt", "dfad", "dfq"])
def test_cuda_graphs(distill, tmp_path, capsys, method):
    distill(method, tmp_path / "run", "--gpu 0 --amp bf16 --compile graphs")
    look_at(tmp_path / "run")
    assert "uncompiled" not in capsys.readouterr().out


def test_kept_answers_and_views(distill, tmp_path):
    distill("fast", tmp_path / "run", "--gpu 0 --amp bf16 --logit_cache 16 --views 4")
    look_at(tmp_path / "run")


@pytest.mark.parametrize(
    "flags", ["--amp no", "--amp bf16", "--amp fp16", "--amp bf16 --compile graphs", "--amp bf16 --views 4"]
)
def test_fast_recipe(distill, tmp_path, flags):
    distill("nayer", tmp_path / "run", f"--gpu 0 --recipe fast {flags}")
    look_at(tmp_path / "run")


def test_latent_diffusion(distill, tmp_path):
    model = stable_diffusion(tmp_path / "model")
    distill("diffdfkd", tmp_path / "run", f"--gpu 0 --amp bf16 --diffusion_model {model}")
    look_at(tmp_path / "run")


@pytest.mark.parametrize("prior", ["pixel", "natural"])
def test_guided_variants(distill, tmp_path, prior):
    guided = "--guidance_oh 1 --guidance_bn .1 --guidance_max_step 2 --variant_labels teacher"
    file = f"--diffusion_model {patch_prior(tmp_path / 'tiny.safetensors')}" if prior == "natural" else ""
    distill("dda", tmp_path / "run", f"--gpu 0 --amp bf16 --prior {prior} {file} {guided}")
    assert look_at(tmp_path / "run")["variants_kept_loss_bn"] > 0


@pytest.mark.parametrize("guided", ["--bn .1 --guidance_max_step 2", "--oh 0 --bn 0 --lca_every 0"])
@pytest.mark.parametrize("classes", ["own", "none"])
def test_a_prior_of_other_classes(distill, tmp_path, classes, guided):
    model = patch_prior(tmp_path / "tiny.safetensors", classes=7)
    distill("diffdfkd", tmp_path / "run", f"--gpu 0 --diffusion_model {model} --prior_classes {classes} {guided}")
    look_at(tmp_path / "run")


def test_stopped_run_goes_on(distill, tmp_path):
    distill("csd", tmp_path / "run", "--gpu 0 --stages synthesize")
    distill("csd", tmp_path / "run", "--gpu 0")
    look_at(tmp_path / "run")


def test_statistics_agree_with_the_cpu():
    """Compares the BN loss and its gradient with respect to the images, in float32 with TF32 products."""
    torch.manual_seed(0)
    images, found = torch.rand(16, 3, 16, 16), {}
    classifier = make_classifier().eval().requires_grad_(False)
    for device in (CPU, torch.device("cuda")):
        statistics = BNStatistics(classifier.to(device).network)
        inputs = images.to(device).detach().requires_grad_()
        with statistics.collect() as batch:
            classifier(inputs)
        loss = bn_loss(batch, statistics.running)
        loss.backward()
        found[device.type] = loss.detach().cpu(), inputs.grad.cpu()
    for cpu, cuda in zip(found["cpu"], found["cuda"]):
        assert (cpu - cuda).norm() < 0.01 * cpu.norm()
