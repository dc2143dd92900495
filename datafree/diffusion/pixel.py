import copy
import math
import torch
from torch import Tensor
from torch.nn import functional as F
from datafree.diffusion.prior import Augmenter, denoising_steps, seeded_noise
from engine.errors import UserError

class PixelPrior(Augmenter):
    def __init__(self, num_classes, image_size, channels=None, patch=1, attention=False, layers=1, groups=8, fit_rounds=10, fit_steps=100, fit_batch_size=64,
                 fit_lr=1e-3, strength=0.5, num_inference_steps=12, guidance_scale=1.0, flip=False, device="cpu", ema=0.995, cl=True, fused=True, scale_shift=False):
        from diffusers import UNet2DModel
        channels = channels or (32, 64)
        n = len(channels)
        self.unet = UNet2DModel(sample_size=image_size // patch, in_channels=3 * patch**2, out_channels=3 * patch**2, block_out_channels=channels,
            layers_per_block=layers, down_block_types=("DownBlock2D",) * n, up_block_types=("UpBlock2D",) * n, norm_num_groups=groups,
            add_attention=attention, attention_head_dim=None if not attention else 16, num_class_embeds=num_classes + 1, resnet_time_scale_shift="scale_shift" if scale_shift else "default").to(device)
        if cl: self.unet.to(memory_format=torch.channels_last)
        self.cl = cl
        self.ema = copy.deepcopy(self.unet).requires_grad_(False).eval()
        self.null = num_classes
        self.patch, self.device = patch, device
        self.fit_rounds, self.fit_steps, self.fit_batch_size, self.fit_lr = fit_rounds, fit_steps, fit_batch_size, fit_lr
        self.strength, self.num_inference_steps, self.guidance_scale, self.flip = strength, num_inference_steps, guidance_scale, flip
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=fit_lr, betas=(0.9, 0.99), weight_decay=0.01, fused=fused)
        self.step = 0
        self.ema_decay = ema

    def predict(self, x_t, t, labels, net=None):
        net = net or self.ema
        if self.patch > 1: x_t = F.pixel_unshuffle(x_t, self.patch)
        if self.cl: x_t = x_t.contiguous(memory_format=torch.channels_last)
        v = net(x_t, t * 1000, class_labels=labels).sample
        return F.pixel_shuffle(v, self.patch) if self.patch > 1 else v

    def noised(self, x, noise, t):
        phi = (t * math.pi / 2).view(-1, 1, 1, 1)
        return phi.cos() * x + phi.sin() * noise

    def fit(self, images, labels):
        total = self.fit_rounds * self.fit_steps
        losses = torch.zeros(self.fit_steps)
        params, emas = list(self.unet.parameters()), list(self.ema.parameters())
        for k in range(self.fit_steps):
            i = torch.randint(len(images), (self.fit_batch_size,))
            x = images[i].float() / 127.5 - 1
            y = torch.where(torch.rand(len(i)) < 0.1, self.null, labels[i])
            if self.flip:
                x = torch.where(torch.rand(len(i), 1, 1, 1) < .5, x.flip(3), x)
            t = torch.rand(len(i)); noise = torch.randn_like(x)
            phi = (t * math.pi / 2).view(-1, 1, 1, 1)
            v = phi.cos() * noise - phi.sin() * x
            lr = self.fit_lr * min((self.step + 1) / 100, 0.5 * (1 + math.cos(math.pi * self.step / total)))
            for g in self.optimizer.param_groups: g["lr"] = lr
            loss = F.mse_loss(self.predict(self.noised(x, noise, t), t, y, self.unet), v)
            self.optimizer.zero_grad(); loss.backward(); 
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            self.optimizer.step()
            d = min(self.ema_decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(emas, [p.detach() for p in params], 1 - d)
            losses[k] = loss.detach(); self.step += 1
        return {"loss": losses.mean(), "last": losses[-20:].mean()}

    @torch.no_grad()
    def augment(self, images, labels, seeds, strength=None, steps=None, solver="ddim"):
        s = strength or self.strength
        n = denoising_steps(s, steps or self.num_inference_steps)
        times = torch.linspace(s, 0, n + 1)
        x = self.noised(images * 2 - 1, seeded_noise(seeds, images.shape[1:]), times[:1])
        prev = None
        for j, (t, u) in enumerate(zip(times, times[1:])):
            v = self.predict(x, t.expand(len(x)), labels)
            if self.guidance_scale != 1:
                w = self.predict(x, t.expand(len(x)), torch.full_like(labels, self.null))
                v = w + self.guidance_scale * (v - w)
            p, q = t * math.pi / 2, u * math.pi / 2
            clean = (p.cos() * x - p.sin() * v).clamp(-1, 1)
            if solver == "ddim" or u == 0:
                eps = (x - p.cos() * clean) / p.sin()
                x = q.cos() * clean + q.sin() * eps
            else:
                lam = lambda a: torch.log(a.cos() / a.sin())
                h = lam(q) - lam(p)
                D = clean
                if prev is not None:
                    r = prev[1] / h
                    D = (1 + 1 / (2 * r)) * clean - prev[0] / (2 * r)
                x = q.sin() / p.sin() * x - q.cos() * torch.expm1(-h) * D
                prev = (clean, h)
        return x.clamp(-1, 1) / 2 + .5
