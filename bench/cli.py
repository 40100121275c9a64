"""The command `python -m bench`.

Exit codes: 0 success, 1 a kernel is wrong or has a problem, 2 usage or setup error, 130 interrupted by
Ctrl-C (rows measured so far are written; the next run resumes).
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from bench.measure.run import Request

FAILED, USAGE_ERROR, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="bench",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's columns cut words in narrow terminals
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Benchmark SigLIP's operations and models against the strongest peers: checked first, then timed.",
    epilog="Exit codes: 0 success, 1 a kernel is wrong or has a problem, 2 usage or setup error, 130 interrupted.",
)

SuitesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[SUITE]...", help="All by default.", show_default=False)
]
ShapesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--shapes",
        metavar="NAME,…",
        help="By name (so400m-384-b64), pattern (so400m*) or size (batch=8,tokens=729,…).",
        show_default=False,
    ),
]
PeersOption = Annotated[
    list[str] | None,
    typer.Option("--peers", metavar="NAME,…", help="Contenders; `python -m bench peers` lists them."),
]
DtypeOption = Annotated[
    list[str] | None,
    typer.Option("--dtype", metavar="NAME,…", help="bf16, fp16 or fp32; by default bf16 on a GPU, fp32 on a CPU."),
]
DirectionOption = Annotated[
    list[str] | None,
    typer.Option("--direction", metavar="NAME,…", help="fwd, bwd, fwd+bwd; by default as the operation is used."),
]
QuickOption = Annotated[bool, typer.Option("--quick", help="Main shapes, and peers that are ready within seconds.")]
MinutesOption = Annotated[
    float | None, typer.Option("--minutes", min=0.05, help="Time limit; what did not fit is listed.")
]
OperationsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[OPERATION]...", help="All by default.", show_default=False)
]
ResultsOption = Annotated[
    Path | None,
    typer.Option("--results", metavar="PATH", help="A .jsonl file or a directory; bench/results by default."),
]


@app.command(short_help="Time operations and models beside their peers.")
def run(
    suites: SuitesArgument = None,
    shapes: ShapesOption = None,
    peers: PeersOption = None,
    dtype: DtypeOption = None,
    direction: DirectionOption = None,
    quick: QuickOption = False,
    minutes: MinutesOption = None,
    results: ResultsOption = None,
    again: Annotated[bool, typer.Option("--again", help="Repeat what this commit has measured already.")] = False,
) -> None:
    """Time operations and models side by side with their peers. Resumes if interrupted."""
    until = _deadline(minutes)
    with _errors_in_one_line():
        request = _request(suites, shapes, peers, dtype, direction, quick, again)
        failed = _check_before_timing(request, results, until)
        _run(request, results, failed, until)


@app.command(short_help="Compare every kernel with fp64.")
def check(
    suites: SuitesArgument = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option("--dtype", metavar="NAME,…", help="bf16, fp16 or fp32; by default those of each operation."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few shapes, by default in bf16.")] = False,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="The interpreter's shapes, in this process: for compute-sanitizer.")
    ] = False,
    results: ResultsOption = None,
) -> None:
    """Compare every kernel with fp64, on this GPU or in Triton's interpreter."""
    with _errors_in_one_line():
        from bench import terminal
        from bench.environment import device
        from bench.measure.check import check_all, kernel_operations, kernels_can_run, not_checked
        from bench.measure.isolated import check_isolated, record_checks
        from bench.peers.registry import selected_family

        reason = kernels_can_run()
        if reason is not None:
            raise RuntimeError(reason)
        operations, dtypes = kernel_operations(_suites(suites)), _dtypes(dtype)
        with terminal.progress_bar() as progress:
            if device() == "cuda" and not tiny:
                checked = check_isolated(operations, quick, dtypes, progress=progress)
            else:
                checked = list(check_all(operations, quick, dtypes, progress, tiny))
                if selected_family():
                    checked = list(map(not_checked, checked))
        terminal.print_checks(checked)
        if device() == "cuda" or results is not None:
            terminal.say(record_checks(checked, results))
        wrong = sum(not one.ok for one in checked)
        print(f"{len(checked) - wrong} of {len(checked)} correct, on {_place()}.")
        if wrong:
            raise typer.Exit(FAILED)


@app.command("compile", short_help="Compile every kernel without a GPU.")
def compile_kernels(
    operations: OperationsArgument = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            "--gpu",
            metavar="NAME,…",
            help="By name (h200) or architecture (sm_90); by default sm_80, sm_86, sm_89, sm_90, sm_100 and sm_120.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One published shape per kernel and epilogue.")] = False,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Processes; one per core by default.", show_default=False)
    ] = None,
    cache: Annotated[
        bool, typer.Option(help="Keep and reuse compiled kernels in ~/.triton/cache or TRITON_CACHE_DIR.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as a JSON list instead of tables.")] = False,
    results: ResultsOption = None,
) -> None:
    """Compile every kernel without a GPU: registers, spills, shared memory, matrix instructions."""
    with _errors_in_one_line("kernels compiled so far are kept, and the next run reuses them" if cache else ""):
        from bench import terminal
        from bench.compiled.launch import BY_NAME, GPUS
        from bench.compiled.launches import operation_names
        from bench.compiled.processes import usable_cores
        from bench.compiled.table import (
            compile_tasks,
            empty_cache,
            facts,
            kernels,
            tasks,
            use_the_compiler,
            write_table,
        )  # fmt: skip
        from bench.report.rows import results_directory

        every = operation_names()
        chosen = _known("operation", _split(operations), every) or every
        gpus = list(dict.fromkeys(BY_NAME[name] for name in _known("--gpu", _split(gpu), BY_NAME))) or list(GPUS)
        wanted = tasks(chosen, gpus, quick)
        if not wanted:
            raise ValueError(f"{', '.join(chosen)}: has no kernels for {', '.join(gpus)}")
        use_the_compiler()
        began = time.monotonic()
        with nullcontext() if cache else empty_cache(), terminal.progress_bar(interval=10.0) as progress:
            rows = compile_tasks(wanted, jobs or usable_cores(), progress)
        found = kernels(rows)
        if as_json:
            print(json.dumps([facts(operation, row) for operation, row in found]))
        else:
            terminal.print_compiled(rows)
        tell = terminal.say if as_json else print
        complete = not quick and set(chosen) == set(every) and set(gpus) == set(GPUS)
        if complete or results is not None:
            tell(f"Written to {write_table(rows, results or results_directory(), quick)}.")
        wrong = sum(bool(row.problems()) for _, row in found)
        seconds = time.monotonic() - began
        tell(f"{len(found) - wrong} of {len(found)} kernels compile without a problem, in {seconds:.0f} s.")
        if wrong:
            raise typer.Exit(FAILED)


@app.command(short_help="Count the clocks of compiled kernels.")
def count(
    operations: OperationsArgument = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            "--gpu",
            metavar="NAME,…",
            help="By name (h200) or architecture (sm_90); by default sm_80, sm_86, sm_89, sm_90, sm_100 and sm_120.",
            show_default=False,
        ),
    ] = None,
    only: Annotated[
        str, typer.Option(help="Launches whose name contains this regular expression, instead of published shapes.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")] = False,
    results: ResultsOption = None,
) -> None:
    """Count the clocks that compiled kernels cost each pipe, without a GPU, beside public Triton kernels."""
    with _errors_in_one_line():
        from bench import terminal
        from bench.compiled import count
        from bench.compiled.launch import BY_NAME
        from bench.compiled.table import use_the_compiler
        from bench.report.rows import results_directory

        every = count.operations()
        chosen = _known("operation", _split(operations), every) or every
        names = [name for name, known in BY_NAME.items() if known in count.COUNTED]
        gpus = list(dict.fromkeys(BY_NAME[name] for name in _known("--gpu", _split(gpu), names))) or list(count.COUNTED)
        _check_pattern(only)
        use_the_compiler()
        found = []
        for one in count.counts(chosen, gpus, only):
            what = one.hint if one.missing else f"{one.launch}, {one.kernel} {one.part}: {one.bound}"
            terminal.say(f"{one.gpu} {one.operation} {what}")
            found.append(one)
        if not found:
            raise ValueError(f"no launch of {', '.join(chosen)} for {', '.join(gpus)} matches {only!r}")
        if as_json:
            print(json.dumps([dataclasses.asdict(one) for one in found]))
        else:
            terminal.print_counts(found)
        complete = not only and set(chosen) == set(every) and set(gpus) == set(count.COUNTED)
        if complete or results is not None:
            tell = terminal.say if as_json else print
            tell(f"Written to {count.write(found, results or results_directory())}.")


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--only is {pattern!r} ({error}); supported: regular expressions") from error


@app.command(short_help="Measure the kernels' configurations.")
def tune(
    operations: OperationsArgument = None,
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", metavar="NAME,…", help="bf16, fp16 or fp32; bf16 by default.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Main shapes.")] = False,
    minutes: Annotated[
        float | None, typer.Option("--minutes", min=0.05, help="Time limit; the next run resumes.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Repeat shape classes that the tables contain.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Directory for the tables instead of siglip_kernels.")
    ] = None,
) -> None:
    """Measure the kernels' configurations on this GPU and write the tables that the operations read."""
    until = _deadline(minutes)
    with _errors_in_one_line():
        from bench import terminal
        from bench.cases.operations import DTYPES
        from bench.environment import device, hardware
        from bench.measure.run import OutOfTime, deadline
        from bench.tune import TUNABLE, settings_of, time_candidates, tune, write_table

        chosen = _known("operation", _split(operations), TUNABLE) or list(TUNABLE)
        dtypes = [DTYPES[name] for name in _dtypes(dtype) or ["bf16"]]
        if device() != "cuda":
            raise RuntimeError("tune measures kernels on a CUDA device, and this machine has none")
        try:
            with deadline(until), terminal.progress_bar() as progress:
                for name in chosen:
                    tunable, gpu = TUNABLE[name], hardware()
                    target = None if out is None else out / tunable.package.rpartition(".")[2] / "tuned.py"
                    known = () if again else list(tunable.table().get(gpu, {}))
                    settings = settings_of(name, "cuda", dtypes, quick)
                    for one in tune(name, settings, time_candidates, progress, known):
                        source = target if target is not None and target.exists() else tunable.path()
                        path = write_table(source, gpu, {one.key: one.fields}, target)
                        print(
                            f"{name} {one.key}: {one.fields}, {one.milliseconds:.4f} ms, the heuristic "
                            f"{one.heuristic_milliseconds:.4f} ms; {one.tried} tried; written to {path}"
                        )
        except OutOfTime:
            print("Time limit reached; the next run resumes with the shape classes that the tables lack.")


@app.command(short_help="Write tables and plots of the results.")
def report(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE]...", help="Result files; all by default.", show_default=False)
    ] = None,
    results: Annotated[
        Path | None, typer.Option("--results", metavar="DIR", help="Directory of the page and the plots.")
    ] = None,
    readme: Annotated[
        Path | None,
        typer.Option(
            "--readme", metavar="FILE", help="Page with the markers; by default the project's, for its own results."
        ),
    ] = None,
    plots: Annotated[bool, typer.Option(help="Draw the plots.")] = True,
) -> None:
    """Write tables and plots of the results, and the main rows into the README."""
    with _errors_in_one_line():
        _report(files, results, readme, plots)


@app.command(short_help="Check, run and report on this GPU.")
def gpu(
    quick: QuickOption = False,
    minutes: Annotated[
        float | None, typer.Option("--minutes", min=0.05, help="Time limit; 9 with --quick.", show_default=False)
    ] = None,
    results: ResultsOption = None,
) -> None:
    """Check, run and report on this GPU. Resumes if interrupted."""
    until = _deadline(minutes if minutes is not None else 9.0 if quick else None)
    with _errors_in_one_line():
        from bench.environment import device

        if device() != "cuda":
            raise RuntimeError("this machine has no CUDA device; `python -m bench run` measures on a CPU")
        request = _request(None, None, None, None, None, quick, False)
        failed = _check_before_timing(request, results, until)
        _run(request, results, failed, until)
        _report(None, results, None, plots=True)
        if failed:
            raise typer.Exit(FAILED)


@app.command(short_help="List the contenders and their versions.")
def peers(
    suites: SuitesArgument = None,
) -> None:
    """List the contenders, the installed versions, and how to install the others."""
    with _errors_in_one_line():
        from bench.cases.suites import SUITES
        from bench.peers import peers_of

        names = list(dict.fromkeys(case.operation for suite in _suites(suites) for case in SUITES[suite].cases))
        for operation in names:
            print(operation)
            for entry in peers_of(operation).values():
                version = entry.version()
                state = f"{entry.package or 'torch'} {version}" if version else f"missing: {entry.how_to_install()}"
                marks = [entry.note, "CUDA" * entry.cuda, "not with --quick" * entry.slow]
                print(f"  {entry.name:32} {state}; {', '.join(filter(None, marks))}".rstrip("; "))


def _request(
    suites: Sequence[str] | None,
    shapes: Sequence[str] | None,
    peers: Sequence[str] | None,
    dtype: Sequence[str] | None,
    direction: Sequence[str] | None,
    quick: bool,
    again: bool,
) -> Request:
    """The validated request. ValueError lists the supported names."""
    from bench.cases.operations import OPERATIONS
    from bench.cases.shapes import DIRECTIONS
    from bench.cases.suites import SUITES
    from bench.measure.run import Request
    from bench.peers import peers_of

    names = _suites(suites)
    operations = list(dict.fromkeys(case.operation for name in names for case in SUITES[name].cases))
    known_shapes = list(dict.fromkeys(shape for name in names for shape in SUITES[name].shape_names()))
    known_peers = list(dict.fromkeys(entry for operation in operations for entry in peers_of(operation)))
    directions = _known("--direction", _split(direction), DIRECTIONS)
    patterns = _split_shapes(shapes)
    for pattern in patterns:
        _check_shape(pattern, known_shapes, [OPERATIONS[name].shape_class for name in operations])
    chosen = _known("--peers", _split(peers), known_peers)
    return Request(names, patterns, chosen, _dtypes(dtype), directions, quick, again)


def _suites(suites: Sequence[str] | None) -> list[str]:
    from bench.cases.suites import SUITES

    asked = _known("suite", _split(suites), [*SUITES, "all"])
    return list(SUITES) if not asked or "all" in asked else asked


def _dtypes(names: Sequence[str] | None) -> list[str]:
    from bench.cases.operations import DTYPES

    return _known("--dtype", _split(names), DTYPES)


def _split(values: Iterable[str] | None) -> list[str]:
    """`a,b` and `--option a --option b` alike."""
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


def _split_shapes(values: Iterable[str] | None) -> list[str]:
    """As `_split`, but commas between field=value pairs belong to one shape."""
    shapes: list[str] = []
    for value in values or ():
        shapes += [value] if "=" in value else _split([value])
    return shapes


def _known(what: str, asked: Sequence[str], supported: Iterable[str]) -> list[str]:
    names = list(supported)
    unknown = [name for name in asked if name not in names]
    if unknown:
        raise ValueError(f"{what}: {', '.join(unknown)}; supported: {', '.join(names)}")
    return list(dict.fromkeys(asked))


def _check_shape(pattern: str, names: Sequence[str], classes: Sequence[type]) -> None:
    import fnmatch

    from bench.cases.shapes import parse

    if "=" in pattern:
        errors = []
        for shape_class in dict.fromkeys(classes):
            try:
                parse(shape_class, pattern)
                return
            except ValueError as error:
                errors.append(str(error))
        raise ValueError("--shapes: " + "; or ".join(errors))
    if not fnmatch.filter(names, pattern):
        raise ValueError(f"--shapes: {pattern}; supported: {', '.join(names)}, patterns such as so400m*, or sizes")


CHECK_SHARE = 0.4  # of the time limit, for checking and compiling; what it does not reach is judged when it is timed


def _check_before_timing(request: Request, where: Path | None, until: float | None) -> dict[tuple[str, str], str]:
    """The kernels that failed the check and are not timed; none on a CPU, where no kernel is timed."""
    from bench import terminal
    from bench.environment import device
    from bench.measure.check import failures, kernel_operations
    from bench.measure.isolated import check_isolated, record_checks

    if device() != "cuda":
        terminal.say(
            "no CUDA device: PyTorch is timed on the CPU. Triton kernels are not timed here; they are only checked, "
            "by `TRITON_INTERPRET=1 python -m bench check` and `python -m bench compile`"
        )
        return {}
    began = time.monotonic()
    limit = None if until is None else began + CHECK_SHARE * (until - began)
    with terminal.progress_bar() as progress:
        checked = check_isolated(
            kernel_operations(request.suites), quick=True, until=limit, progress=progress, request=request
        )
    terminal.print_checks(checked)
    seconds = time.monotonic() - began
    terminal.say(f"checked and compiled in {seconds:.0f} s; {record_checks(checked, where)}")
    found = failures(checked)
    for (operation, kernels), reason in found.items():
        terminal.say(f"{operation} {kernels} is not timed: {reason}")
    return found


def _run(request: Request, where: Path | None, failed: dict[tuple[str, str], str], until: float | None) -> None:
    from bench import terminal
    from bench.cases.suites import SUITES
    from bench.environment import device
    from bench.measure.isolated import run_isolated
    from bench.measure.run import open_results, plan_for, run
    from bench.report.tables import groups

    for suite in request.without_settings():
        only = SUITES[suite].device
        terminal.say(
            f"{suite}: is measured without a GPU; CUDA_VISIBLE_DEVICES= hides those of this machine"
            if only and only != device()
            else f"{suite}: nothing requested is measured on this machine by default; name its --shapes to measure them"
        )
    plan = plan_for(request.quick, failed)
    with terminal.progress_bar() as progress:
        if device() == "cuda":
            outcome, path = run_isolated(request, where, plan, until, progress)
        else:
            results = open_results(where)
            outcome, path = run(request, results, plan, until, progress), results.path
    terminal.print_groups(groups(outcome.rows))
    missing = {row.impl: row.reason for row in outcome.rows if row.status == "missing"}
    for name, how in missing.items():
        print(f"{name} is missing: {how}")
    if outcome.settled:
        print(f"{outcome.settled} group(s) measured before with this commit (--again repeats them).")
    if outcome.left_out:
        print(f"Time limit reached. Left out: {', '.join(outcome.left_out)}.")
    print(f"{len(outcome.rows)} rows written to {path}.")


def _report(files: Sequence[Path] | None, where: Path | None, readme: Path | None, plots: bool) -> None:
    from bench.environment import ROOT, in_repository
    from bench.report.checked import checks
    from bench.report.counted import comparison, read_shares
    from bench.report.plots import draw_all
    from bench.report.rows import is_of_rows, read, results_directory
    from bench.report.tables import full_report, insert, summary

    directory = (where.parent if where is not None and where.suffix == ".jsonl" else where) or results_directory()
    chosen = list(files or sorted(filter(is_of_rows, directory.glob("*.jsonl"))))
    absent = [path for path in chosen if not path.exists()]
    if absent:
        raise ValueError(f"no such file: {', '.join(map(str, absent))}")
    rows = read(chosen)
    directory.mkdir(parents=True, exist_ok=True)
    drawn = draw_all(rows, directory) if plots else []
    page = directory / "README.md"
    compiled = sorted(directory.glob("compile-*.jsonl"))
    shares = read_shares(sorted({*results_directory().glob("counted-*.jsonl"), *directory.glob("counted-*.jsonl")}))
    sections = [checks(sorted(directory.glob("check-*.jsonl"))), comparison(rows, shares)]
    page.write_text(full_report(rows, chosen, drawn, compiled, sections))
    print(f"Written: {', '.join(str(path) for path in (page, *drawn))}.")
    usual = in_repository() and directory.resolve() == results_directory().resolve()
    target = readme or (ROOT / "README.md" if usual else None)
    text = summary(rows, chosen, drawn, target.parent if target else Path.cwd(), compiled)
    if target is None:
        print(text)
        return
    insert(target, text)
    print(f"Updated {target}.")


def _place() -> str:
    from bench.environment import device, hardware

    return hardware() if device() == "cuda" else "Triton's interpreter"


def _deadline(minutes: float | None) -> float | None:
    """The time at which measuring stops, which leaves a little for tables and plots."""
    return None if minutes is None else time.monotonic() + 60 * minutes - min(20.0, 6 * minutes)


@contextmanager
def _errors_in_one_line(kept: str = "rows measured so far are written, and the next run resumes") -> Iterator[None]:
    """Turns errors into a line and an exit code. kept: what an interruption leaves."""
    try:
        yield
    except typer.Exit:  # a RuntimeError
        raise
    except KeyboardInterrupt:
        print("; ".join(filter(None, ("bench: interrupted", kept))), file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"bench: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(USAGE_ERROR) from None


def main() -> None:
    """The entry point of `python -m bench`."""
    app(prog_name="python -m bench")
