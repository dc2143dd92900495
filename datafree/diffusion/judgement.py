"""What the teacher says of finished images."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datafree.bn_statistics import BNStatistics, bn_loss, collected, layers_with_statistics

AT_ONCE = 512  # images


class Judgement:
    """The teacher's labels of images, and figures of how near they come to what it was trained on.

    Args:
        teacher: frozen, images (B, 3, H, W) in [0, 1] to logits.
        device: the teacher's.
        statistics: those of the teacher, where there are any already.
    """

    def __init__(self, teacher: nn.Module, device: torch.device, statistics: BNStatistics | None = None):
        self.teacher, self.device = teacher, device
        self.statistics = statistics or (BNStatistics(teacher) if layers_with_statistics(teacher) else None)

    @torch.no_grad()
    def labels(self, images_u8: Tensor) -> Tensor:
        """(N,) int64 on the CPU, of (N, 3, H, W) uint8."""
        parts = [self.teacher(self._batch(images_u8, start)).argmax(1) for start in range(0, len(images_u8), AT_ONCE)]
        return torch.cat(parts).cpu() if parts else torch.empty(0, dtype=torch.long)

    @torch.no_grad()
    def figures(self, images_u8: Tensor, labels: Tensor) -> dict[str, float]:
        """teacher_acc1 in % against labels (N,), the cross-entropy loss_oh, and the mean L_bn over batches of up to 512.

        L_bn falls with the size of a batch: compare it between equally many images.
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
