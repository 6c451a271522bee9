"""A sample: the token ids of a text or a conversation, and the patches of its pictures and videos."""

from dataclasses import dataclass

import torch


@dataclass
class Sample:
    """One sequence as the model reads it.

    input_ids: int64 [T]. pixel_values: float32 [patches, 3·2·patch·patch] of all images in order, or None.
    image_grid_thw: int64 [images, 3] in patches, or None. pixel_values_videos, video_grid_thw: the same of all videos.
    """

    input_ids: torch.Tensor
    pixel_values: torch.Tensor | None = None
    image_grid_thw: torch.Tensor | None = None
    pixel_values_videos: torch.Tensor | None = None
    video_grid_thw: torch.Tensor | None = None

    @property
    def has_pictures(self) -> bool:
        """Whether the vision tower sees anything of it: images or videos."""
        return self.pixel_values is not None or self.pixel_values_videos is not None
