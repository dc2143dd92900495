"""What the tests of guidance and of generative priors share."""

import pytest

from datafree.diffusion.priors import load_prior


@pytest.fixture(scope="session")
def priors(generative):
    """{kind: a prior of ten classes} of every kind, guided by its classes where it knows them."""
    names, scales = tuple("abcdefghij"), {"turbo": 0.0}
    return {
        kind: load_prior(path, num_classes=10, class_names=names, guidance_scale=scales.get(kind, 3.0))
        for kind, path in generative.items()
    }
