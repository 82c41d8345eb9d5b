"""What torch.save has written over the years: zip archives, pickle streams, tar archives. Each is read here without torch."""

from __future__ import annotations

from upparam.containers.torchfile import legacy, tarred, zipped

__all__ = ["legacy", "tarred", "zipped"]
