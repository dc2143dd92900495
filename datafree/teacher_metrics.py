"""The teacher's predictions for finished images, and how well they fit their labels and its BN statistics."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datafree.losses import BNStatistics, bn_loss, collected
from models.classifier import layers_with_statistics

AT_ONCE = 512  # batch size of the teacher's forward passes


class TeacherMetrics:
    """The labels that the teacher predicts for images, and the teacher's accuracy and losses on images.

    Args:
        teacher: frozen network that maps images (B, 3, H, W) in [0, 1] to logits.
        device: the teacher's device.
        statistics: collector of the teacher's BN statistics; None: a new one is made if the teacher has BN layers.
    """

    def __init__(self, teacher: nn.Module, device: torch.device, statistics: BNStatistics | None = None):
        self.teacher, self.device = teacher, device
        self.statistics = statistics or (BNStatistics(teacher) if layers_with_statistics(teacher) else None)

    @torch.no_grad()
    def labels(self, images_u8: Tensor) -> Tensor:
        """Classes (N,) that the teacher predicts for images (N, 3, H, W) uint8, int64 on the CPU."""
        parts = [self.teacher(self._batch(images_u8, start)).argmax(1) for start in range(0, len(images_u8), AT_ONCE)]
        return torch.cat(parts).cpu() if parts else torch.empty(0, dtype=torch.long)

    @torch.no_grad()
    def figures(self, images_u8: Tensor, labels: Tensor) -> dict[str, float]:
        """Returns teacher_acc1 in % and the mean cross-entropy loss_oh for labels (N,), and the mean loss_bn over batches.

        A batch holds up to 512 images. loss_bn is missing if the teacher has no BN layers. It falls with the batch size, so
        compare it only between equal numbers of images.
        """
        count, sums = len(labels), {}
        for start in range(0, count, AT_ONCE):
            images, wanted = self._batch(images_u8, start), labels[start : start + AT_ONCE].to(self.device)
            with collected(self.statistics) as batch_stats:
                logits = self.teacher(images)
            found = {
                "teacher_acc1": 100.0 * (logits.argmax(1) == wanted).sum(),
                "loss_oh": F.cross_entropy(logits, wanted, reduction="sum"),
            }
            if self.statistics:
                found["loss_bn"] = bn_loss(batch_stats, self.statistics.running) * len(images)
            sums = {name: sums.get(name, 0.0) + float(value) for name, value in found.items()}
        return {name: total / count for name, total in sums.items()}

    def _batch(self, images_u8: Tensor, start: int) -> Tensor:
        return images_u8[start : start + AT_ONCE].to(self.device).float().div_(255)
