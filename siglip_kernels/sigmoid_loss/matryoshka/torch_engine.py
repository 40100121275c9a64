"""The engine in PyTorch operations, for any device and any floating-point dtype."""

import torch
from torch import Tensor

from siglip_kernels.sigmoid_loss.matryoshka.blocks import Segments, Shares, Side
from siglip_kernels.sigmoid_loss.pairs import Pairs
from siglip_kernels.sigmoid_loss.torch_engine import TorchEngine

SMALLEST_NORM = 1e-12  # as in torch.nn.functional.normalize


class TorchPrefixEngine(TorchEngine):
    """See `blocks.PrefixEngine`."""

    padding = 1

    def skips(self, only_if: Tensor | None) -> bool:
        return only_if is not None and not bool(only_if)

    def normalise(self, embeds: Tensor, segments: Segments) -> Side:
        normalised = embeds.new_empty(len(embeds), segments.ends[-1])
        inverse_norms = embeds.new_empty((len(segments.widths), len(embeds)), dtype=self.sum_dtype)
        squares = torch.zeros_like(inverse_norms[0])
        for number, (columns, copied) in enumerate(segments.slices()):
            exact = embeds[:, columns].to(self.sum_dtype)
            squares += exact.square().sum(1)
            torch.div(1, squares.sqrt().clamp_min_(SMALLEST_NORM), out=inverse_norms[number])
            normalised[:, copied] = exact * inverse_norms[number][:, None]
        return Side.of(normalised, inverse_norms)

    def totals(self, count: int, device: torch.device, pairs: Pairs) -> Tensor:  # type: ignore[override]
        return super().totals(device, pairs).new_zeros(count, 3, 1)

    def dots(self, count: int, size: int, of_images: bool, device: torch.device, pairs: Pairs) -> Tensor:
        return torch.zeros((count, 1, size), dtype=self.sum_dtype, device=device)

    def prefix_logit_grad(
        self,
        image: Side,
        text: Side,
        segments: Segments,
        scales: Tensor,
        biases: Tensor,
        shares: Shares,
        pairs: Pairs,
        totals: Tensor,
        gradients: bool,
        out: Tensor | None,
        image_dots: Tensor | None,
        text_dots: Tensor | None,
        only_if: Tensor | None,
    ) -> None:
        block = None if out is None else out[:, : len(image.normalised), : len(text.normalised)]
        cosines: Tensor | None = None
        for number, (_, columns) in enumerate(segments.slices()):
            products = self._matmul(image.normalised[:, columns], text.normalised[:, columns].T)
            if cosines is not None:
                products.add_(cosines.mul_(image.ratios[number][:, None]).mul_(text.ratios[number]))
            cosines = products
            logits = torch.addcmul(biases[number], cosines, scales[number])
            logit_grad = self.logit_grad_of(logits, pairs, totals[number], gradients)
            if not gradients:
                continue
            dots = logit_grad * cosines
            totals[number, 1] += dots.sum()
            totals[number, 2] += logit_grad.sum()
            if image_dots is not None:
                image_dots[number, 0] += dots.sum(1)
            if text_dots is not None:
                text_dots[number, 0] += dots.sum(0)
            if block is not None:
                torch.mul(logit_grad, shares.own[number] * self.logit_grad_scale, out=dots)
                block[number] = dots
        if block is not None:
            wider = block[-1].to(self.sum_dtype)
            for number in range(len(block) - 2, -1, -1):
                of_texts = text.ratios[number + 1] * shares.wider[number]
                wider = (wider * image.ratios[number + 1][:, None]).mul_(of_texts).add_(block[number])
                block[number] = wider

    def prefix_product(
        self,
        logit_grad: Tensor,
        operand: Tensor,
        segments: Segments,
        transposed: bool,
        add: bool,
        out: Tensor,
        only_if: Tensor | None,
    ) -> None:
        rows, columns = (len(operand), len(out)) if transposed else (len(out), len(operand))
        for block, (_, segment) in zip(logit_grad, segments.slices(), strict=True):
            previous = out[:, segment] if add else None
            self.product(block[:rows, :columns], operand[:, segment], transposed, previous, out[:, segment], None, 1.0)

    def finish(
        self,
        sums: Tensor,
        side: Side,
        segments: Segments,
        dots: Tensor,
        shares: Shares,
        factor: Tensor,
        out: Tensor,
        only_if: Tensor | None,
    ) -> None:
        own_share = torch.zeros_like(dots[0])  # r
        slices = segments.slices()
        for number in range(len(slices) - 1, -1, -1):
            columns, copied = slices[number]
            if number + 1 < len(slices):
                own_share *= shares.wider[number] * side.ratios[number + 1] ** 2
            own_share += shares.own[number] * dots[number]
            total = sums[:, copied] / self.logit_grad_scale - side.normalised[:, copied] * own_share[:, None]
            out[:, columns] = total * (side.inverse_norms[number] * (shares.unit[number] * factor))[:, None]
