"""The expert layers that kernels are measured on: what one device holds of published models, and of the default experiment."""

from __future__ import annotations

import dataclasses

from moejax.kernels.activations import SWIGLU, Activation


@dataclasses.dataclass(frozen=True)
class Shape:
    """The experts of one layer on one device."""

    rows: int
    """Assignments that reach them."""
    width: int
    """D."""
    hidden: int
    """F."""
    experts: int
    activation: Activation = SWIGLU
    biases: bool = False

    @property
    def flops(self) -> int:
        """Of a forward pass's matmuls; a backward pass has twice that."""
        return 2 * self.rows * self.width * self.hidden * (3 if self.activation.gated else 2)


SHAPES: dict[str, Shape] = {
    # 2,048 tokens, 16 experts, 2 a token
    "tiny": Shape(4_096, 64, 96, 16),
    # 8,192 tokens a device, all 8 experts, 2 a token (Jiang et al. 2024, table 1)
    "mixtral_8x7b": Shape(16_384, 4_096, 14_336, 8),
    # all 128 experts, 8 a token (Qwen3 technical report 2025, table 2, and its published config)
    "qwen3_30b": Shape(65_536, 2_048, 768, 128),
    # 32 of 256 experts over 8 devices, 8 a token (DeepSeek-V3 2024, section 4.2)
    "deepseek_v3": Shape(65_536, 7_168, 2_048, 32),
    # all 128 experts, 4 a token (gpt-oss model card 2025)
    "gpt_oss_120b": Shape(32_768, 2_880, 2_880, 128, Activation("gpt_oss", 7.0), biases=True),
}
