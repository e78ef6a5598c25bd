"""Dense optical flow without weights: iterative Lucas-Kanade on a pyramid, in torch.

After Le Besnerais & Champagnat 2005, "Dense optical flow by iterative local window registration",
the method of scikit-image's `optical_flow_ilk`. It is written here because the base installation
has neither OpenCV nor scikit-image, and so that it runs on a GPU and on all pairs of a video at
once. Flow that needs more than a smooth local shift (large motion of small things) is missed.
"""

from __future__ import annotations

import threading
import weakref

import torch
import torch.nn.functional as F
from torch import Tensor

from sla_eval.preprocessing import device_constant

_RADIUS = 3  # of the window, pixels: 7 x 7
_ITERATIONS = 3  # a level
_COARSEST = 12  # pixels of the shorter side
_RIDGE = 1e-4  # squared gradient (levels 0 to 1) below which a window says nothing
_WORKING_SIZE = 96  # pixels of the shorter side on which a video's flow is computed
_CHUNK = 32  # pairs of shrunk frames at a time
_FULL_CHUNK = 8  # frames of the video at a time


def luma(frames: Tensor) -> Tensor:
    """Brightness (N, 1, H, W), 0 to 1, float32, of uint8 frames (N, C, H, W): ITU-R BT.601."""
    if frames.shape[1] != 3:
        return frames.float().mean(1, keepdim=True) / 255
    weights = device_constant((0.299, 0.587, 0.114), frames.device).view(1, 3, 1, 1)
    return (frames * weights).sum(1, keepdim=True) / 255


def shrink(images: Tensor, shorter: int) -> tuple[Tensor, int]:
    """Images averaged over squares until the shorter side is at most `shorter`.

    Args:
        images: (N, C, H, W), float.
        shorter: pixels.

    Returns:
        The images, and the pixels a side of a square; rows and columns that fill none are left
        out.
    """
    factor = -(-min(images.shape[-2:]) // shorter)
    return (images, 1) if factor == 1 else (F.avg_pool2d(images, factor), factor)


def optical_flow(before: Tensor, after: Tensor) -> Tensor:
    """Where each pixel went.

    Args:
        before: brightness (N, 1, H, W), 0 to 1, float.
        after: the same.

    Returns:
        (N, 2, H, W), pixels, x then y: before[y, x] is found at after[y + flow_y, x + flow_x].
    """
    levels = [(before, after)]
    while min(levels[-1][0].shape[-2:]) >= 2 * _COARSEST:
        levels.append((F.avg_pool2d(levels[-1][0], 2), F.avg_pool2d(levels[-1][1], 2)))
    flow = before.new_zeros(len(before), 2, *levels[-1][0].shape[-2:])
    for first, second in reversed(levels):
        size = first.shape[-2:]
        if flow.shape[-2:] != size:
            flow = 2 * F.interpolate(flow, size, mode="bilinear", align_corners=False)
        flow = _refine(first, second, flow)
    return flow


def warp(images: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Images sampled where the flow points: warp(after, flow) looks like before.

    Args:
        images: (N, C, H, W), float.
        flow: (N, 2, H, W), pixels, x then y.

    Returns:
        The images (N, C, H, W), and bool (N, 1, H, W): whether the sample lies within them.
    """
    height, width = images.shape[-2:]
    x = torch.arange(width, device=flow.device) + flow[:, 0]
    y = torch.arange(height, device=flow.device)[:, None] + flow[:, 1]
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    warped = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    return warped, inside[:, None]


class VideoFlow:
    """Flow between a video's consecutive frames, shrunk to a shorter side of 96 pixels at most.

    Attributes:
        frames: brightness (T, 1, h, w), 0 to 1.
        factor: pixels of the video a side of one of these.
    """

    def __init__(self, video: Tensor) -> None:
        shrunk = [shrink(luma(part), _WORKING_SIZE) for part in video.split(_FULL_CHUNK)]
        self.frames = torch.cat([images for images, _ in shrunk])
        self.factor = shrunk[0][1]
        self._known: dict[bool, Tensor] = {}
        self._lock = threading.Lock()  # metrics may run side by side

    @property
    def forward(self) -> Tensor:
        """From each frame to the next: (T - 1, 2, h, w), in these smaller pixels."""
        return self._flow(True)

    @property
    def backward(self) -> Tensor:
        """From each frame but the first to the one before: (T - 1, 2, h, w)."""
        return self._flow(False)

    def _flow(self, forward: bool) -> Tensor:
        with self._lock:
            if forward not in self._known:
                ends = self.frames[:-1].split(_CHUNK), self.frames[1:].split(_CHUNK)
                pairs = zip(*(ends if forward else ends[::-1]), strict=True)
                self._known[forward] = torch.cat([optical_flow(a, b) for a, b in pairs])
            return self._known[forward]


_lock = threading.Lock()
_last: tuple[weakref.ref[Tensor], int, VideoFlow] | None = None


def video_flow(video: Tensor) -> VideoFlow:
    """The flow of a uint8 video (T, C, H, W); for the same tensor as last time it is reused.

    So that several metrics of one video compute it once. Work on the flow is bounded, whatever
    the size of the frames.

    Raises:
        ValueError: fewer than two frames, or frames smaller than the window.
    """
    global _last
    if len(video) < 2:
        raise ValueError(f"video must have at least 2 frames, got {len(video)}")
    if min(video.shape[-2:]) < 2 * _RADIUS + 1:
        raise ValueError(
            f"video must be at least {2 * _RADIUS + 1} pixels high and wide, "
            f"got {video.shape[-2]} x {video.shape[-1]}"
        )
    if video.is_inference():  # torch does not count its changes
        return VideoFlow(video)
    with _lock:
        if _last is not None and _last[0]() is video and _last[1] == video._version:
            return _last[2]
        flow = VideoFlow(video)
        _last = weakref.ref(video), video._version, flow
        return flow


def _refine(before: Tensor, after: Tensor, flow: Tensor) -> Tensor:
    padded = F.pad(before, (1, 1, 1, 1), mode="replicate")
    gradient_x = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    gradient_y = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    gradient = torch.cat([gradient_x, gradient_y], dim=1)
    products = torch.cat([gradient * gradient, gradient_x * gradient_y], dim=1)
    xx, yy, xy = _window_mean(products).split(1, dim=1)
    xx, yy = xx + _RIDGE, yy + _RIDGE
    determinant = xx * yy - xy * xy
    for _ in range(_ITERATIONS):
        warped, inside = warp(after, flow)
        error = (before - warped) * inside
        x, y = _window_mean(gradient * error).split(1, dim=1)
        step = torch.cat([yy * x - xy * y, xx * y - xy * x], dim=1) / determinant
        flow = _window_mean(flow + step.clamp(-1, 1))
    return flow


def _window_mean(images: Tensor) -> Tensor:
    """Mean over a square window; it ends at edges."""
    if images.device.type == "cpu":
        return _shifted_mean(images)
    size = 2 * _RADIUS + 1  # one launch; a GPU waits for them at this size
    return F.avg_pool2d(images, size, 1, _RADIUS, count_include_pad=False)


def _shifted_mean(images: Tensor) -> Tensor:
    """`_window_mean` by shifted sums, row and column one after the other: several times as fast on
    a CPU as avg_pool2d, which does not vectorise."""
    for dim, padding in ((-1, (_RADIUS, _RADIUS, 0, 0)), (-2, (0, 0, _RADIUS, _RADIUS))):
        length = images.shape[dim]
        padded = F.pad(images, padding)
        total = padded.narrow(dim, 0, length).clone()
        for shift in range(1, 2 * _RADIUS + 1):
            total += padded.narrow(dim, shift, length)
        place = torch.arange(length, device=images.device)
        count = place.clamp_max(_RADIUS) + place.flip(0).clamp_max(_RADIUS) + 1
        images = total / (count if dim == -1 else count[:, None])
    return images
