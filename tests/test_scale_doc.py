"""docs/many_devices.md: its tables are those that scripts/sd_flops.py makes. About ten seconds, most of them imports."""

import re

import pytest
import torch
from torch.nn import functional as F

from scripts import sd_flops
from tests.conftest import ROOT

PAGE = (ROOT / "docs/many_devices.md").read_text()


@pytest.fixture(scope="module")
def found():
    return sd_flops.costs()


def test_the_tables_are_the_generated_ones(found, monkeypatch):
    monkeypatch.setattr(sd_flops, "costs", lambda: found)
    written = dict(re.findall(r"<!-- table:(\w+) [^>]*-->\n(.*?)\n<!-- /table:\1 -->", PAGE, re.DOTALL))
    assert written == sd_flops.tables()


def test_the_networks_are_the_published_ones(found):
    """Parameters as the checkpoints have them."""
    millions = {name: round(cost.parameters / 1e6, 1) for name, cost in found.items()}
    assert millions["UNet 512"] == 859.5 and millions["text"] == 123.1
    assert millions["teacher"] == 21.8 and millions["student"] == 11.7


def test_attention_is_counted_without_data():
    """Queries times keys, and weights times values: 2 * 2 * heads * L^2 * D, and twice that on the way back."""
    with torch.device("meta"):
        q = torch.zeros(1, 8, 64, 40, requires_grad=True)
        output, forward = sd_flops.counted(lambda: F.scaled_dot_product_attention(q, q, q))
        _, backward = sd_flops.counted(lambda: torch.autograd.grad(output.sum(), q)[0])
    assert forward == 4 * 8 * 64**2 * 40 and backward == 2 * forward


def test_a_guided_step_goes_there_and_back_twice(found):
    """Two passes of the UNet, the decoder and the teacher, each there and back; and the decoder once at the end."""
    half, full = sd_flops.drawing(found, 512)[sd_flops.BOTH]
    unet, decoder = found["UNet 512"], found["decoder 512"]
    assert half == 50 * (2 * unet.both + decoder.both) + decoder.forward and full == 50 * found["teacher"].both
    assert sd_flops.drawing(found, 512)["unguided"] == (100 * unet.forward + decoder.forward, 0)


def test_a_slower_machine_takes_longer(found, monkeypatch):
    monkeypatch.setattr(sd_flops, "costs", lambda: found)
    fast, slow = sd_flops.tables()["distilling"], sd_flops.tables(classifiers=0.05)["distilling"]
    hours = [float(table.splitlines()[2].split("|")[3]) for table in (fast, slow)]
    assert hours[1] == pytest.approx(2 * hours[0], abs=0.1)
