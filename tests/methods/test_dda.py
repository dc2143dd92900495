"""DDA: guided variants from a prior that comes from a file or is trained in the run, and the filter's results."""

import json

import pytest
import torch

from engine.loops import makers
from engine.runtime.errors import UserError
from engine.runtime.tensors import load_tensors
from tests.conftest import outcome

GUIDED = "--strength .8 --guidance_oh 5 --guidance_bn .1 --guidance_max_step 3 --agree --variant_labels teacher"


@pytest.fixture(scope="module")
def natural(miniature):
    """Flags of a run with a prior from a file that has ten classes."""
    return f"--prior natural --diffusion_model {miniature('patch_prior')}"


def result(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("prior", ["pixel", "natural"])
def test_a_guided_run_stopped_between_shards_goes_on_to_the_same_bits(
    prior, natural, distill, tmp_path, monkeypatch, interrupted
):
    monkeypatch.setattr(makers, "SHARD", 10)
    extra = f"{natural if prior == 'natural' else ''} {GUIDED} --diffusion_batch_size 4"
    distill("dda", tmp_path / "whole", extra)
    with interrupted("engine.data.image_bank.save_tensors", 4):
        distill("dda", tmp_path / "broken", extra)
    assert len(list((tmp_path / "broken" / "variants").glob("augment-*"))) == 1
    distill("dda", tmp_path / "broken", extra)
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")
    found = result(tmp_path / "whole")
    assert found["external_prior"] == {"pixel": "none", "natural": "patch_prior"}[prior]
    assert found["variants_kept_teacher_acc1"] == 100 and found["variants_kept_loss_bn"] > 0


def test_a_filter_stopped_while_it_reports_reports_again(distill, finished, tmp_path, interrupted):
    flags = f"--init_bank {finished('dda')} --init_variants {finished('dda')}"
    with interrupted("engine.loops.makers.variants_grid", 1):
        distill("dda", tmp_path / "broken", flags)
    distill("dda", tmp_path / "broken", flags)
    assert (tmp_path / "broken" / "pictures" / "variants.png").exists()
    assert "variants kept at omega" in (tmp_path / "broken" / "log.txt").read_text()


def test_guidance_makes_the_teacher_surer_of_variants_of_one_bank(natural, distill, finished, tmp_path):
    bank = f"--init_bank {finished('dda')} --stages augment {natural} --strength .8"
    found = {}
    for oh in (0, 100):
        distill("dda", tmp_path / str(oh), f"{bank} --guidance_oh {oh}")
        stored = load_tensors(tmp_path / str(oh) / "filter_teacher.safetensors")
        variants = load_tensors(tmp_path / str(oh) / "variants" / "augment-000000.safetensors")
        share = (stored["teacher_labels"] == variants["labels"]).float().mean().item()
        assert stored["kept_teacher_acc1"].item() == pytest.approx(100 * share, abs=1e-3) and "dropped_loss_bn" not in stored
        found[oh] = stored["kept_loss_oh"].item()
        assert (
            f"the teacher classifies {100 * share:.1f} % of the kept variants as their source's label"
            in (tmp_path / str(oh) / "log.txt").read_text()
        )
    assert found[100] < found[0]


def test_the_filter_s_rule_and_the_labels_can_change_without_generating_again(distill, finished, tmp_path):
    first = finished("dda")
    stored = load_tensors(first / "filter_teacher.safetensors")
    labels = load_tensors(first / "variants" / "augment-000000.safetensors")["labels"]
    agrees = stored["teacher_labels"] == labels
    assert 0 < agrees.sum() < len(agrees) and stored["keep"].all()
    given = f"--init_bank {first} --init_variants {first}"
    distill("dda", tmp_path / "agree", f"{given} --agree")
    assert torch.equal(load_tensors(tmp_path / "agree" / "filter_teacher.safetensors")["keep"], agrees)
    found = result(tmp_path / "agree")
    assert found["variants_kept"] == agrees.sum() and found["variants_kept_teacher_acc1"] == 100
    assert found["variants_dropped_teacher_acc1"] == 0 and found["variants_dropped_loss_bn"] > 0
    distill("dda", tmp_path / "teacher", f"{given} --variant_labels teacher")
    assert outcome(tmp_path / "teacher")[1] != outcome(first)[1]
    distill("dda", tmp_path / "source", f"{given} --variant_labels source")
    assert outcome(tmp_path / "source")[1] == outcome(first)[1]


MISTAKES = {
    "--prior image_to_image --guidance_oh 1": "--guidance_oh and --guidance_bn need --prior pixel or natural",
    "--prior pixel --diffusion_model natural_32": "natural_32 needs --prior natural, image_variation or image_to_image",
    "--prior natural --diffusion_model nothing": "nothing does not exist",
    "--prior natural --num_inference_steps 2": "leaves no denoising step",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes_are_one_line_before_anything_is_made(flags, distill, tmp_path):
    with pytest.raises(UserError, match=MISTAKES[flags]):
        distill("dda", tmp_path / "run", flags)
    assert not (tmp_path / "run").exists()
