"""Fixtures of the tests of guidance and of generative priors."""

import pytest

from datafree.diffusion.priors import load_prior


@pytest.fixture(scope="session")
def priors(generative):
    """{kind: prior of this kind with ten classes}; all but "turbo" use classifier-free guidance."""
    names, scales = tuple("abcdefghij"), {"turbo": 0.0}
    return {
        kind: load_prior(path, num_classes=10, class_names=names, guidance_scale=scales.get(kind, 3.0))
        for kind, path in generative.items()
    }
