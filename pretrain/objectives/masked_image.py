"""Masked autoencoders of pictures: MAE (He et al., https://arxiv.org/abs/2111.06377, section 3).

B pictures, P patches, N numbers of a patch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from millrace.core.errors import UserError
from millrace.models.convolutions import seeded_noise
from millrace.models.vision import build_masked_autoencoder, pictures
from millrace.pretrain.objectives.base import OneModule, Setting, medium, model_files


class MaskedImage(OneModule):
    """Paint what was hidden."""

    of_text = False

    def __init__(self, model: Any, setting: Setting) -> None:
        super().__init__(MaskedImageModule(model, setting.objective.view))
        self.name, self._model = "masked autoencoder of pictures", model
        self._seen = setting.objective.view  # other samples do not count

    @classmethod
    def check(cls, setting: Setting) -> None:
        if setting.rows != "samples":
            raise UserError(f"objective.kind = 'masked_image' needs data.rows = 'samples', not '{setting.rows}'")
        if setting.model.kind != "vit_mae" and setting.model.init == "random":
            raise UserError(
                f"objective.kind = 'masked_image' trains model.kind = 'vit_mae', not '{setting.model.kind}'"
            )

    @classmethod
    def build(cls, setting: Setting) -> MaskedImage:
        section = setting.objective
        given = {"mask_ratio": section.share, "norm_pix_loss": section.normalise}
        return cls(build_masked_autoencoder(setting.model, given, setting.seed, setting.zero3), setting)

    def view(self, micro: Any) -> Any:
        return micro.where(self._seen)

    def files(self) -> dict[str, str]:
        return model_files(self._model)


class MaskedImageModule(nn.Module):
    """A `vit_mae` whose forward returns the loss summed over pictures."""

    figures = ("loss",)

    def __init__(self, model: Any, view: str) -> None:
        super().__init__()
        self.model, self._view = model, view
        self._patches = model.vit.embeddings.patch_embeddings.num_patches

    def inputs(self, view: Any, device: torch.device) -> dict[str, Tensor]:
        """The arguments of `forward` from a `SampleBatch`."""
        values = medium(view, self._view)
        sizes = self.model.config
        if values.shape[1:] != (sizes.image_size, sizes.image_size, 3) or sizes.num_channels != 3:
            raise UserError(
                f"pictures are {' x '.join(map(str, values.shape[1:]))} and the model is for {sizes.image_size} x "
                f"{sizes.image_size} x {sizes.num_channels}: mend size in data.views, or model.config.image_size"
            )
        return {
            "values": values.to(device, non_blocking=True),
            "noise_BP": seeded_noise(view.seeds, (self._patches,), device),
            "good_B": torch.tensor(view.good, device=device).float(),
        }

    def forward(self, values: Tensor, noise_BP: Tensor, good_B: Tensor) -> tuple[Tensor, Tensor]:
        """Images uint8 (B, height, width, 3); patches are hidden where `noise_BP` is largest.

        Returns:
            (for each good picture the mean square over its hidden patches, summed, float32; [the same], detached).
        """
        pixels = pictures(values)
        found = self.model(pixel_values=pixels.to(self.model.dtype), noise=noise_BP)
        aim_BPN = self.model.patchify(pixels)
        if self.model.config.norm_pix_loss:
            variance = aim_BPN.var(dim=-1, keepdim=True)
            aim_BPN = (aim_BPN - aim_BPN.mean(dim=-1, keepdim=True)) / (variance + 1e-6).sqrt()
        each_BP = (found.logits.float() - aim_BPN).square().mean(-1)
        hidden_BP = found.mask.float()
        each_B = (each_BP * hidden_BP).sum(1) / hidden_BP.sum(1)
        loss = (each_B * good_B).sum()
        return loss, loss.detach()[None]
