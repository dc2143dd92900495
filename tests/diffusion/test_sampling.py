"""Sampling steps, against diffusers' schedulers and in closed form. CPU, no network connection."""

import math

import pytest
import torch

from datafree.diffusion import patch_unet as pixel
from datafree.diffusion.sampling import RULES, Trajectory, cosine_trajectory, own_rule, scheduler_trajectory
from datafree.diffusion.variation import seeded_generators


def trajectories():
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    yield cosine_trajectory(6, "cpu")
    for prediction in ("epsilon", "v_prediction", "sample"):
        yield scheduler_trajectory(DDIMScheduler(prediction_type=prediction), 6, "cpu")
    yield scheduler_trajectory(EulerDiscreteScheduler(timestep_spacing="trailing"), 6, "cpu")


def test_levels_end_clean_and_keep_the_variance():
    for trajectory in trajectories():
        assert len(trajectory) == 6 and len(trajectory.alphas) == len(trajectory.sigmas) == 7
        assert trajectory.alphas[-1] == 1 and trajectory.sigmas[-1] == 0
        assert all(a < b for a, b in zip(trajectory.alphas, trajectory.alphas[1:]))
        assert all(math.isclose(a * a + s * s, 1, abs_tol=1e-6) for a, s in zip(trajectory.alphas, trajectory.sigmas))


@pytest.mark.parametrize("rule", RULES[:2])
def test_a_perfect_prediction_leads_to_the_clean_latent(rule):
    clean, noise = torch.rand(2, 3, 4, 4, dtype=torch.float64) * 2 - 1, torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for trajectory in trajectories():
        latents = trajectory.alphas[0] * clean + trajectory.sigmas[0] * noise
        previous = None
        for k in range(6):
            alpha, sigma = trajectory.alphas[k], trajectory.sigmas[k]
            outputs = {"epsilon": noise, "v_prediction": alpha * noise - sigma * clean, "sample": clean}
            output = outputs[trajectory.prediction]
            assert torch.allclose(trajectory.clean(latents, k, output), clean, atol=1e-6)
            latents, previous = trajectory.step(rule, latents, k, clean, previous), clean
            assert torch.allclose(latents, trajectory.alphas[k + 1] * clean + trajectory.sigmas[k + 1] * noise, atol=1e-6)


def test_steps_are_those_of_the_library():
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

    torch.manual_seed(0)
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")

    def model(latents, t):
        return torch.tanh(latents * 0.7 + float(t) / 3000)

    def library(scheduler, latents):
        scheduler.set_timesteps(8)
        latents = latents * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            latents = scheduler.step(model(scheduler.scale_model_input(latents, t), t), t, latents).prev_sample
        return latents

    def ours(scheduler, rule, latents):
        trajectory, previous = scheduler_trajectory(scheduler, 8, "cpu"), None
        for k, t in enumerate(trajectory.times):
            clean = trajectory.clean(latents, k, model(latents, t))
            latents, previous = trajectory.step(rule, latents, k, clean, previous), clean
        return latents

    noise = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    ddim = DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading")
    assert torch.allclose(library(ddim, noise), ours(ddim, "ddim", noise), atol=1e-4)
    dpm = DPMSolverMultistepScheduler(**betas, timestep_spacing="trailing", final_sigmas_type="zero")
    assert torch.allclose(library(dpm, noise), ours(dpm, "dpmsolver++", noise), atol=1e-3)
    # Euler's latents have another scale: their noise has the standard deviation sigma / alpha, here sigma.
    euler = EulerDiscreteScheduler(**betas, timestep_spacing="trailing")
    start = scheduler_trajectory(euler, 8, "cpu").sigmas[0]
    assert torch.allclose(library(euler, noise), ours(euler, "ddim", noise * start), atol=1e-3)


def test_an_ancestral_step_keeps_the_variance():
    clean, noise, fresh = torch.zeros(1, 1, 300, 300), *torch.randn(2, 1, 1, 300, 300, generator=seeded_generators([0])[0])
    for trajectory in trajectories():
        for k in range(1, 5):
            after = trajectory.step("ancestral", trajectory.sigmas[k] * noise, k, clean, noise=fresh)
            assert abs(float(after.std()) - trajectory.sigmas[k + 1]) < 0.01
            back = trajectory.renoise(trajectory.sigmas[k + 1] * noise, k + 1, fresh)
            assert abs(float(back.std()) - trajectory.sigmas[k]) < 0.01


def test_a_trajectory_may_begin_on_the_way():
    trajectory, whole = cosine_trajectory(3, "cpu", start=0.6), cosine_trajectory(5, "cpu")
    assert torch.allclose(trajectory.times, whole.times[2:])
    assert trajectory.alphas == pytest.approx(whole.alphas[2:]) and trajectory.sigmas == pytest.approx(whole.sigmas[2:])


def test_cosine_steps_are_those_of_the_pixel_prior():
    trajectory = cosine_trajectory(4, "cpu")
    clean, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for k, t in enumerate(trajectory.times):
        x, v = pixel.add_noise(clean, noise, t), pixel.velocity(clean, noise, t)
        assert torch.allclose(trajectory.clean(x, k, v), clean, atol=1e-5)
        after = pixel.add_noise(clean, noise, torch.tensor(1 - (k + 1) / 4))
        assert torch.allclose(trajectory.step("ddim", x, k, clean), after, atol=1e-5)


def test_rules_of_known_schedulers():
    import diffusers

    expected = {
        "PNDMScheduler": "dpmsolver++",
        "DDIMScheduler": "ddim",
        "EulerDiscreteScheduler": "ddim",
        "DDPMScheduler": "ancestral",
        "EulerAncestralDiscreteScheduler": "ancestral",
        "DPMSolverMultistepScheduler": "dpmsolver++",
    }
    assert {name: own_rule(getattr(diffusers, name)()) for name in expected} == expected
    with pytest.raises(ValueError, match="FlowMatch"):
        scheduler_trajectory(diffusers.FlowMatchEulerDiscreteScheduler(), 4, "cpu")


def test_a_trajectory_of_one_step():
    assert len(Trajectory(torch.tensor([999]), (0.1, 1.0), (0.995, 0.0), "epsilon")) == 1
