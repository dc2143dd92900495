"""The benchmark runs, and its two loops do the same work."""

import torch

from datafree.generators import Generator, reset
from engine import benchmark


def test_it_prints_a_ratio_for_every_loop(monkeypatch, capsys, tmp_path):
    flags = "--teacher resnet8 --student resnet8 --dataset digits --batch_size 8 --bank 16 --workers 0 --seconds 0.01 --repeats 1 --gpu -1"
    monkeypatch.setattr("sys.argv", ["benchmark", *flags.split()])
    benchmark.main()
    out = capsys.readouterr().out
    assert out.count("\n| ") == 6 and "inversion step" in out and "ratio" in out


def test_the_plain_generator_is_the_same_map():
    torch.manual_seed(0)
    ours = reset(Generator(8, 16)).eval()
    plain = benchmark._apart(Generator(8, 16)).eval()
    plain.load_state_dict(dict(zip(plain.state_dict(), ours.state_dict().values())))
    z = torch.randn(2, 8)
    assert torch.allclose(ours(z), plain(z), atol=1e-5)
