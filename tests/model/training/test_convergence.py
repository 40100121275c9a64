"""Thirty-two training steps from one seed: the triton backend ends where eager does."""

import pytest
import torch
from torch import Tensor

import siglip_model
from siglip_kernels.device import interpreting
from siglip_model.training.objective import initialise_logits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS, BATCH = 32, 4
TOWER = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}  # head dim 24
TEXT = {**TOWER, "vocab_size": 20, "max_position_embeddings": 8, "bos_token_id": None, "eos_token_id": 1}
VISION = {**TOWER, "image_size": 24, "patch_size": 8}

pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not interpreting(), reason="needs a GPU or the interpreter")


def trained(backend: str) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and final weights: AdamW on colours, each with its own token, with new noise in each step."""
    torch.manual_seed(0)
    model = siglip_model.SiglipModel(siglip_model.SiglipConfig(text_config=TEXT, vision_config=VISION), backend=backend)
    initialise_logits(model)
    model.to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-4)  # rounding in gradients of 0 moves no weight
    generator = torch.Generator().manual_seed(1)
    colours = torch.rand(12, 3, 1, 1, generator=generator) * 2 - 1
    losses = []
    for _ in range(STEPS):
        chosen = torch.randperm(len(colours), generator=generator)[:BATCH]
        ids = torch.ones(BATCH, 8, dtype=torch.int64)
        ids[:, 0] = chosen + 3
        pixels = colours[chosen] + 0.1 * torch.randn(BATCH, 3, 24, 24, generator=generator)
        loss = model(ids.to(DEVICE), pixels.to(DEVICE), return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


def test_thirty_two_steps() -> None:
    (losses, weights), (expected_losses, expected_weights) = trained("triton"), trained("eager")
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])  # it learns
    assert losses == pytest.approx(expected_losses, rel=2e-5)
    for name, expected in expected_weights.items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-4, atol=5e-5, msg=name)
