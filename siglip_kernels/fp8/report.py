"""What of a model is in fp8, for the reports of siglip_model and the integrations, and how near its results must be."""

from dataclasses import dataclass

from torch import Tensor

LEAST_COSINE = 0.995  # between a result with fp8 and the same without, where they are compared


@dataclass
class Quantised:
    """Projections that are computed in fp8. bytes: of the quantised weights, which are kept beside the originals."""

    projections: int = 0
    bytes: int = 0

    def add(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: (out, in); bias: (out,) or None."""
        self.projections += 1
        # A byte per weight, a scale per row, and the bias.
        self.bytes += weight.numel() + 4 * len(weight) + (0 if bias is None else bias.nbytes)

    def __str__(self) -> str:
        return f"{self.projections} projections in fp8, {self.bytes / 2**20:.1f} MiB beside the original weights"
