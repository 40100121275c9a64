"""Tables and plots from files with ties, failures and missing peers."""

import pytest
from bench_helpers import row

from bench.environment import ROOT
from bench.report.plots import draw_all
from bench.report.rows import Results, is_of_rows, read, results_directory
from bench.report.tables import BEGIN, END, full_report, groups, insert, summary

FAILED = [
    row("sdpa:cudnn", status="oom", reason="CUDA out of memory"),
    row("flash_attn_2", status="missing", reason="pip install flash-attn"),
    row("flash_attn_3", status="unsupported", reason="has no fp16; supported: bf16"),
    row("flex", status="error", reason="wrong: results is off by 1.0e-01, 1.0e-02 | is allowed"),
]
ON_CPU = dict(gpu="cpu (AMD EPYC, 2 threads)", driver=None, cuda=None, dtype="fp32")


def write(path, rows):
    results = Results.open(path)
    for one in rows:
        results.add(one)
    return rows


def table_rows(page):
    """impl -> the cells of its row."""
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    return {line.split("`")[1]: [cell.strip() for cell in line.strip("|").split(" | ")] for line in lines}


def test_ties_failures_and_missing_peers(tmp_path):
    path = tmp_path / "h200-2026-12-01.jsonl"
    rows = write(path, [*FAILED, row("triton", 1.00), row("sdpa", 1.02), row("eager", 3.0), row("triton#2", 1.03)])
    (group,) = groups(rows)
    assert group.noise == pytest.approx(1.03)
    assert [one.impl for one in group.fastest()] == ["triton", "sdpa"]  # 2 % apart, and the noise is 3 %
    page = full_report(rows, [path])
    cells = table_rows(page)
    assert list(cells) == ["triton", "sdpa", "eager", "sdpa:cudnn", "flash_attn_2", "flash_attn_3", "flex"]
    assert cells["triton"][1] == "**1.00**" and cells["sdpa"][1] == "**1.02**" and cells["eager"][1] == "3.00"
    assert (cells["triton"][3], cells["sdpa"][3], cells["eager"][3]) == ("1.02x", "1.00x", "0.34x")
    assert cells["sdpa:cudnn"][1] == "oom" and cells["flash_attn_2"][1] == "missing"
    assert cells["flash_attn_2"][-1] == "pip install flash-attn"
    assert cells["flex"][1] == "error" and "wrong: results is off by 1.0e-01" in cells["flex"][-1]
    assert "\\|" in page and "h200-2026-12-01.jsonl" in page and "Noise 1.03x" in page
    assert "not measured yet" not in page


def test_without_noise_a_hundredth_is_a_tie():
    (group,) = groups([row("triton", 1.0), row("sdpa", 1.009), row("eager", 1.02)])
    assert [one.impl for one in group.fastest()] == ["triton", "sdpa"] and group.noise is None


def test_a_group_where_nothing_ran(tmp_path):
    page = full_report(FAILED, [tmp_path / "h200-2026-12-01.jsonl"])
    assert list(table_rows(page)) == [one.impl for one in FAILED]
    text = summary(FAILED, [tmp_path / "h200-2026-12-01.jsonl"], [], tmp_path)
    assert "attention fwd | so400m-384-b64 | bf16 | not measured yet |" in text


def test_a_failure_of_this_project_is_shown_in_the_summary(tmp_path):
    rows = [row("triton", status="error", reason="not timed: wrong in check"), row("sdpa", 1.0)]
    text = summary(rows, [tmp_path / "h200-2026-12-01.jsonl"], [], tmp_path)
    assert "| not timed: wrong in check | `sdpa` 1.00 |" in text


def test_the_absence_of_gpu_rows_is_stated(tmp_path):
    rows = [row("chunked", 2.0, **ON_CPU), row("eager", 3.0, **ON_CPU)]
    path = tmp_path / "cpu-2026-12-01.jsonl"
    for text in (summary(rows, [path], [], tmp_path), full_report(rows, [path])):
        assert "On a GPU: not measured yet." in text
        assert "cpu-2026-12-01.jsonl" in text
    assert "never timed there" in summary(rows, [path], [], tmp_path)


def test_gpu_and_cpu_stay_apart(tmp_path):
    rows = [row("triton", 1.0), row("sdpa", 1.5), row("sdpa", 900.0, **ON_CPU)]
    assert len(groups(rows)) == 2
    text = summary(rows, [tmp_path / "h200-2026-12-01.jsonl", tmp_path / "cpu-2026-12-01.jsonl"], [], tmp_path)
    assert text.index("On NVIDIA H200") < text.index("On cpu")
    assert "not measured yet" not in text.split("On cpu")[0]
    assert "**1.50x**" in text


def test_a_peer_with_another_loss_is_not_the_best_peer(tmp_path):
    shape = {"name": "n65536-d768", "pairs": 65_536, "width": 768}
    facts = dict(suite="loss", op="sigmoid_loss", direction="fwd+bwd", shape=shape)
    rows = [row("triton", 30.0, **facts), row("eager", 100.0, **facts)]
    rows.append(row("memeff", 10.0, comparable=False, reason="another loss: softmax", **facts))
    text = summary(rows, [tmp_path / "h200-2026-12-01.jsonl"], [], tmp_path)
    assert "| `eager` 100 | 3.33x | `eager` 100 |" in text


def test_the_summary_has_three_groups_and_one_plot(tmp_path):
    rows = []
    for suite, op, direction, sizes in (
        ("model", "vision_tower", "fwd", [dict(name=f"base-224-b{batch}", batch=batch) for batch in (1, 16)]),
        ("model", "vision_tower", "fwd", [dict(name="so400m-384-b64", batch=64)]),
        ("train", "training_step", "fwd+bwd", [dict(name="base-224-b2", batch=2)]),
        ("loss", "sigmoid_loss", "fwd+bwd", [dict(name=f"n{pairs}-d768", pairs=pairs) for pairs in (2048, 1024)]),
        ("loss", "sigmoid_loss", "fwd", [dict(name="n4096-d768", pairs=4096)]),
        ("attention", "attention", "fwd", [dict(name="so400m-384-b64", batch=64)]),
    ):
        facts = dict(suite=suite, op=op, direction=direction)
        rows += [row("triton", 1.0, shape=shape, **facts) for shape in sizes]
    path, plots = tmp_path / "h200-2026-12-01.jsonl", ["h200-speed-up-by-batch-size", "h200-loss-memory-by-pairs"]
    text = summary(rows, [path], [tmp_path / f"{name}.png" for name in plots], tmp_path)
    lines = [line.split(" | ")[:2] for line in text.splitlines() if "`triton`" in line]
    assert [name.removeprefix("| ") for name, _ in lines] == [
        "vision_tower fwd", "training_step fwd+bwd", "sigmoid_loss fwd+bwd",
    ]  # fmt: skip
    assert [shape for _, shape in lines] == ["base-224-b16", "base-224-b2", "n2048-d768"]
    assert text.count("![") == 1 and "![h200 loss memory by pairs](h200-loss-memory-by-pairs.png)" in text
    assert full_report(rows, [path]).count("| `triton` 1.00 |") == len(groups(rows))


def test_precisions_are_compared_one_by_one(tmp_path):
    facts = dict(suite="cpu", op="image_features", shape=dict(name="base-224-b16-l2", batch=16), **ON_CPU)
    rows = [
        row("siglip_model:sdpa", 80.0, least_cosine=1.0, **facts),
        row("siglip_model:sdpa:bf16", 45.0, precision="bf16", least_cosine=0.99997, **facts),
        row("siglip_model:onnxruntime:int8", 25.0, precision="int8", least_cosine=0.9993, **facts),
        row("transformers:sdpa", 100.0, least_cosine=1.0, **facts),
        row("transformers:sdpa:int8", 40.0, precision="int8", least_cosine=0.9994, **facts),
        row("openvino:bf16", status="missing", reason="pip install openvino", precision="bf16", **facts),
    ]
    path = tmp_path / "cpu-2026-12-01.jsonl"
    text = summary(rows, [path], [], tmp_path)
    start = "| image_features fwd | base-224-b16-l2 | "
    lines = [line.removeprefix(start).split(" | ") for line in text.splitlines() if line.startswith(start)]
    base = "`transformers:sdpa` 100"
    assert [line[:8] for line in lines] == [
        ["fp32", "`siglip_model:sdpa` 80.0", "1.000000", base, "1.25x", base, "1.000000", "1 MB, 1 MB"],
        ["bf16", "`siglip_model:sdpa:bf16` 45.0", "0.999970", base, "2.22x", "", "", "1 MB"],
        [
            "int8", "`siglip_model:onnxruntime:int8` 25.0", "0.999300", base, "4.00x", "`transformers:sdpa:int8` 40.0",
            "0.999400", "1 MB, 1 MB",
        ],
    ]  # fmt: skip
    cells = table_rows(full_report(rows, [path]).split("### ")[1])
    assert cells["siglip_model:sdpa:bf16"][8] == "0.999970" and cells["openvino:bf16"][-1] == "pip install openvino"
    assert len({len(each) for each in cells.values()}) == 1


def test_the_readme_is_written_between_its_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    insert(readme, "new")
    insert(readme, "newer")
    assert readme.read_text() == f"before\n{BEGIN}\nnewer\n{END}\nafter\n"
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="bench: begin"):
        insert(readme, "new")
    assert readme.read_text() == "no marks"


def test_the_readme_says_what_the_committed_files_say():
    """`python -m bench report` was run after the last results came in."""
    directory = results_directory()
    files = sorted(filter(is_of_rows, directory.glob("*.jsonl")))
    rows = read(files)
    written, page = (ROOT / "README.md").read_text(), (directory / "README.md").read_text()
    assert not [line for line in summary(rows, files, [], ROOT).splitlines() if line not in written]
    assert not [line for line in full_report(rows, files).splitlines() if line not in page]


def test_plots(tmp_path):
    rows = [row("triton", 1.0), row("sdpa", 1.2), *FAILED]
    for pairs in (1024, 2048):
        facts = dict(suite="loss", op="sigmoid_loss", direction="fwd+bwd", shape=dict(name="n", pairs=pairs, width=768))
        rows += [row("triton", 1.0, **facts), row("eager", 3.0, **facts), row("chunked", status="oom", **facts)]
    for batch in (1, 8):
        shape = dict(name="b", model="base-224", batch=batch, layers=0, text=True)
        facts = dict(suite="model", op="siglip", shape=shape)
        rows += [row("triton", 1.0, **facts), row("transformers:eager", 2.0, **facts)]
    drawn = draw_all(rows, tmp_path)
    assert [path.name for path in drawn] == [
        "h200-speed-up-by-batch-size.png", "h200-attention-tflops-by-shape.png", "h200-loss-memory-by-pairs.png",
    ]  # fmt: skip
    assert all(path.stat().st_size > 5000 for path in drawn)
    page = full_report(rows, [tmp_path / "h200-2026-12-01.jsonl"], drawn)
    assert "![h200 loss memory by pairs](h200-loss-memory-by-pairs.png)" in page


def test_no_rows_no_plots(tmp_path):
    assert draw_all(FAILED, tmp_path) == [] and list(tmp_path.iterdir()) == []
    assert "not measured yet" in full_report([], []) and "not measured yet" in summary([], [], [], tmp_path)
