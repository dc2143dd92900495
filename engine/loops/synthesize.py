"""Rounds of synthesis as a maker of the initial bank."""

from typing import Any

from torch import nn

from engine.data.bank import to_uint8
from engine.loops.fill import Maker, Part, Share
from engine.runtime.compilation import Hot
from engine.runtime.seeding import seed_position
from models.classifier import weights_fixed


class SynthesisMaker(Maker):
    """One call of a synthesizer a round, against a student that knows nothing yet.

    Args:
        synthesizer: see ``datafree.base.Synthesizer``; ``independent`` is its own.
        student: ``models.classifier.Classifier``.
        seed: of the run.
    """

    advice = "lower --lr_g or the loss weights, and run again"

    def __init__(self, synthesizer, student: nn.Module, seed: int):
        self.synthesizer, self.student, self.seed = synthesizer, student, seed
        self.independent = synthesizer.independent

    def make(self, round: int, share: Share, show) -> dict[int, Part]:
        """The whole round, by the first of those that share it."""
        if share.rank:
            return {}
        seed_position(self.seed, "synthesize", round)
        with weights_fixed(self.student):
            batch = self.synthesizer.synthesize(self.student)
        show(1)
        figures = {name: float(value) for name, value in batch.scalars.items()}
        return {0: Part({"images": to_uint8(batch.images).cpu(), "labels": batch.labels.cpu()}, figures)}

    def hot(self) -> list[Hot]:
        return self.synthesizer.hot()

    def state_dict(self) -> dict[str, Any]:
        return self.synthesizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.synthesizer.load_state_dict(state)
