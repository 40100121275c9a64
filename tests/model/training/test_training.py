"""Training learns, follows its schedule, and ends an interrupted run where an uninterrupted one ends."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from siglip_model import SiglipConfig, SiglipModel
from siglip_model.training.loop import (
    Batch,
    TrainingConfig,
    average_weights,
    batch_loss,
    initialise_logits,
    learning_rate_factor,
    make_optimizer,
    train,
)

COLOURS = torch.rand(12, 3, 1, 1, generator=torch.Generator().manual_seed(1)) * 2 - 1


def tiny_model(seed: int = 0, **vision: object) -> SiglipModel:
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config={**tower, "vocab_size": 20, "max_position_embeddings": 4, "pad_token_id": 1}
        | {"bos_token_id": 1, "eos_token_id": 1},
        vision_config={**tower, "image_size": 8, "patch_size": 4, **vision},
    )
    torch.manual_seed(seed)
    model = SiglipModel(config)
    initialise_logits(model)
    return model


def coloured_squares(number: int, generator: torch.Generator) -> Batch:
    """Six of twelve colours, each with its own token, in two noisy views."""
    chosen = torch.randperm(len(COLOURS), generator=generator)[:6]
    input_ids = torch.ones(6, 4, dtype=torch.int64)
    input_ids[:, 0] = chosen + 3
    pixels = COLOURS[chosen].expand(2, 6, 3, 8, 8)
    return Batch(input_ids, pixels + 0.1 * torch.randn(pixels.shape, generator=generator))


def weights(model: SiglipModel) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def log_of(directory):
    return [json.loads(line) for line in (directory / "training_log.jsonl").read_text().splitlines()]


def test_a_tiny_model_learns_to_name_colours(tmp_path):
    model = tiny_model()
    config = TrainingConfig(steps=150, learning_rate=5e-3, warmup_steps=10, average_decay=0.9, log_every=10)
    train(model, coloured_squares, config, tmp_path, show_progress=False)
    log = log_of(tmp_path)
    assert log[-1]["step"] == 150
    assert log[-1]["loss"] < log[0]["loss"] / 3
    assert not model.training
    batch = coloured_squares(10**6, torch.Generator().manual_seed(2))  # never seen
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, pixel_values=batch.pixel_values[0]).logits_per_image
    assert logits.argmax(1).tolist() == list(range(6))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_interrupted_run_ends_bitwise_where_an_uninterrupted_one_does(tmp_path, accumulate):
    config = TrainingConfig(steps=9, warmup_steps=3, accumulate=accumulate, log_every=1, save_every=4)
    whole = train(tiny_model(), coloured_squares, config, tmp_path / "whole", show_progress=False)

    parts = tmp_path / "parts"
    train(tiny_model(), coloured_squares, config, parts, show_progress=False, stop_after=5)
    torch.manual_seed(99)  # what happens in between does not matter, nor does the second model's initialisation
    resumed = train(tiny_model(seed=7), coloured_squares, config, parts, show_progress=False)

    assert torch.equal(weights(whole), weights(resumed))
    without_speed = [
        [{key: value for key, value in entry.items() if key != "images_per_second"} for entry in log_of(directory)]
        for directory in (tmp_path / "whole", parts)
    ]
    assert without_speed[0] == without_speed[1]


def test_steps_after_the_last_saving_are_done_again_and_logged_once(tmp_path):
    config = TrainingConfig(steps=6, warmup_steps=1, log_every=1, save_every=4)
    whole = train(tiny_model(), coloured_squares, config, tmp_path / "whole", show_progress=False)

    def failing(number, generator):
        if number == 5:
            raise KeyboardInterrupt
        return coloured_squares(number, generator)

    parts = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), failing, config, parts, show_progress=False)
    assert [entry["step"] for entry in log_of(parts)] == [1, 2, 3, 4, 5]  # 5 is not in the saved state
    resumed = train(tiny_model(), coloured_squares, config, parts, show_progress=False)
    assert [entry["step"] for entry in log_of(parts)] == [1, 2, 3, 4, 5, 6]
    assert torch.equal(weights(whole), weights(resumed))


def test_another_seed_gives_other_batches(tmp_path):
    runs = [
        train(
            tiny_model(),
            coloured_squares,
            TrainingConfig(steps=2, warmup_steps=0, seed=seed),
            tmp_path / str(seed),
            show_progress=False,
        )
        for seed in (0, 1)
    ]
    assert not torch.equal(weights(runs[0]), weights(runs[1]))


def test_learning_rate_rises_linearly_then_falls_as_a_cosine():
    config = TrainingConfig(steps=110, warmup_steps=10)
    assert [learning_rate_factor(step, config) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate_factor(10, config) == 1.0
    assert learning_rate_factor(60, config) == pytest.approx(0.5)
    assert learning_rate_factor(35, config) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert learning_rate_factor(110, config) == pytest.approx(0.0)


def test_each_step_has_the_learning_rate_of_the_schedule(tmp_path):
    config = TrainingConfig(steps=5, learning_rate=2e-3, warmup_steps=2, log_every=1)
    for stop_after in (3, None):  # resumed in the middle
        train(tiny_model(), coloured_squares, config, tmp_path, show_progress=False, stop_after=stop_after)
    expected = [2e-3 * learning_rate_factor(step, config) for step in range(5)]
    assert [entry["learning_rate"] for entry in log_of(tmp_path)] == expected


def test_loss_is_the_papers_over_each_view():
    model = tiny_model().double()
    batch = coloured_squares(0, torch.Generator().manual_seed(0))
    batch = Batch(batch.input_ids, batch.pixel_values.double())
    expected = []
    for view in batch.pixel_values:
        images = F.normalize(model.get_image_features(view).pooler_output.float(), dim=-1)
        texts = F.normalize(model.get_text_features(batch.input_ids).pooler_output.float(), dim=-1)
        logits = images @ texts.T * 10 - 10  # t' = log 10, b = -10
        terms = [
            F.softplus(-logits[i, j] if i == j else logits[i, j]) for i in range(len(texts)) for j in range(len(texts))
        ]
        expected.append(sum(terms) / len(texts))
    torch.testing.assert_close(batch_loss(model, batch).double(), sum(expected).double() / 2, atol=1e-5, rtol=1e-5)


def test_one_view_needs_no_dimension_of_its_own():
    model, batch = tiny_model(), coloured_squares(0, torch.Generator().manual_seed(0))
    flat, nested = Batch(batch.input_ids, batch.pixel_values[0]), Batch(batch.input_ids, batch.pixel_values[:1])
    assert torch.equal(batch_loss(model, flat), batch_loss(model, nested))


def test_bfloat16_is_close_and_keeps_float32_weights(tmp_path):
    model, batch = tiny_model(), coloured_squares(0, torch.Generator().manual_seed(0))
    exact, rounded = batch_loss(model, batch), batch_loss(model, batch, bfloat16=True)
    assert rounded.dtype == torch.float32
    assert exact.item() != rounded.item()
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0)
    config = TrainingConfig(steps=2, warmup_steps=0, bfloat16=True)
    train(model, coloured_squares, config, tmp_path, show_progress=False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_triton_backend_trains_as_eager_does(bfloat16, tmp_path):
    config = TrainingConfig(steps=2, warmup_steps=0, bfloat16=bfloat16, log_every=1)
    for backend in ("eager", "triton"):
        model = tiny_model()
        model.set_backend(backend)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        train(model, coloured_squares, config, tmp_path / backend, device=device, show_progress=False)
    logs = [[entry["loss"] for entry in log_of(tmp_path / backend)] for backend in ("eager", "triton")]
    assert logs[1] == pytest.approx(logs[0], rel=0.01 if bfloat16 else 1e-5)


def test_biases_norms_and_logit_parameters_are_not_decayed():
    model = tiny_model()
    optimizer = make_optimizer(model, TrainingConfig(steps=1, warmup_steps=0, weight_decay=0.3))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0.3 for p in group["params"]}
    free = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    for name, parameter in model.named_parameters():
        vector = name.endswith("bias") or "norm" in name or name.startswith("logit")
        assert id(parameter) in (free if vector else decayed), name


def test_the_average_leaves_the_model_alone():
    model = tiny_model()
    average = average_weights(model, 0.5)
    before = weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    average.n_averaged.fill_(1000)
    average.update_parameters(model)
    torch.testing.assert_close(weights(average.module), before + 0.5)
    torch.testing.assert_close(weights(model), before + 1)


def test_the_decay_of_the_average_grows():
    model = tiny_model()
    average = average_weights(model, 0.9)
    before = weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    average.update_parameters(model)
    torch.testing.assert_close(weights(average.module), before + 0.9)  # 1/10 of the initial weights
    average.update_parameters(model)
    torch.testing.assert_close(weights(average.module), before + 1 - 0.1 * 2 / 11)


def test_what_cannot_go_on_says_why(tmp_path):
    config = TrainingConfig(steps=2, warmup_steps=0)
    train(tiny_model(), coloured_squares, config, tmp_path, show_progress=False)
    with pytest.raises(ValueError, match=r"learning_rate was 0.001, is 0.01"):
        train(tiny_model(), coloured_squares, TrainingConfig(2, 0.01, 0), tmp_path, show_progress=False)
    with pytest.raises(ValueError, match=r"patch_embedding.weight is \(32, 3, 4, 4\), not \(32, 3, 2, 2\)"):
        train(tiny_model(patch_size=2), coloured_squares, config, tmp_path, show_progress=False)
    save_file({"weight": torch.ones(2)}, tmp_path / "training_state.safetensors")
    with pytest.raises(ValueError, match="training_state.safetensors is not the state of a run: no step and config"):
        train(tiny_model(), coloured_squares, config, tmp_path, show_progress=False)
    (tmp_path / "training_state.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not the state of a run"):
        train(tiny_model(), coloured_squares, config, tmp_path, show_progress=False)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.logit_bias.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="step 0"):
        train(model, coloured_squares, TrainingConfig(steps=1, warmup_steps=0), tmp_path, show_progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 5, "warmup_steps": 6}, "warmup_steps is 6"),
        ({"steps": 5, "warmup_steps": 0, "learning_rate": 0.0}, "learning_rate"),
        ({"steps": 5, "warmup_steps": 0, "average_decay": 1.0}, "average_decay is 1.0"),
        ({"steps": 5, "warmup_steps": 0, "accumulate": 0}, "accumulate is 0"),
    ],
)
def test_impossible_configurations_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**arguments)


def test_a_batch_whose_texts_and_pictures_differ_in_number_is_refused():
    with pytest.raises(ValueError, match=r"pixel_values \(2, 5, 3, 8, 8\) for 6 texts"):
        Batch(torch.ones(6, 4, dtype=torch.int64), torch.zeros(2, 5, 3, 8, 8))
