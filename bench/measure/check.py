"""Checks the kernels against fp64, on this GPU or in Triton's interpreter, beside eager and SDPA.

Outputs with and without gradients, and every gradient, may have twice the error of the definition in the same dtype,
plus one rounding. A second run must give the same bits. Fresh memory is filled with NaN, which exposes elements that a
kernel does not write.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.cases.checked import HUGE, QUICK, THOROUGH, TINY
from bench.cases.operations import DTYPES, OPERATIONS, Contender, Inputs, Setting, kernels_for
from bench.cases.suites import SUITES, dtype_name
from bench.environment import device, environment
from bench.measure.accuracy import PROJECT_FACTOR, Found, Judge, allowed_distance, distance, forward, gradients
from bench.measure.measure import DeadDevice, device_is_dead, free
from bench.measure.progress import Event, Progress, silent
from bench.peers import peers_of
from bench.report.rows import checks_file
from siglip_kernels import MissingBackendError, UnsupportedInputError
from siglip_kernels.device import why_not

# The peer whose error stands beside the kernels' in the table.
BESIDE = {"attention": "sdpa"}


@dataclass
class Checked:
    """One operation on one shape in one dtype. Errors are relative to fp64, those of the worst output or gradient."""

    op: str
    shape: dict[str, Any]
    dtype: str
    ok: bool
    kernels: str = "triton"  # or a name of `bench.peers.registry.FAMILIES`
    problem: str = ""
    what: str = ""  # the output or gradient that comes closest to, or exceeds, its allowed error
    error: float | None = None
    allowed: float | None = None
    eager_error: float | None = None
    sdpa_error: float | None = None
    crashed: bool = False  # the process could not continue: see `bench.report.rows.Row.crashed`
    unsupported: bool = False  # the kernels rejected the input


def kernels_can_run() -> str | None:
    """None on a GPU that they support or in the interpreter; elsewhere the reason why kernels cannot run."""
    return why_not(torch.device(device()))


def kernel_operations(suites: Iterable[str]) -> list[str]:
    """The operations of the suites that have kernels, each once."""
    named = (case.operation for suite in suites for case in SUITES[suite].cases)
    return list(dict.fromkeys(name for name in named if kernels_for(name) is not None))


def settings(operation: str, quick: bool, dtypes: Sequence[str] = (), tiny: bool = False) -> list[Setting]:
    """The settings on which an operation is checked: model sizes and awkward ones on a GPU, tiny ones elsewhere.

    tiny: on a GPU as well, for tools that make kernels a hundred times slower.
    """
    place = device()
    if place == "cuda" and not tiny:
        chosen = QUICK[operation] if quick else QUICK[operation] + THOROUGH.get(operation, ())
    else:
        chosen = TINY[operation][: 1 if quick else None]
    known = OPERATIONS[operation]
    wanted = [name for name in dtypes or (("bf16",) if quick else known.dtypes) if name in known.dtypes]
    return [
        Setting(known, shape, DTYPES[dtype], place, "fwd+bwd" if known.trains else "fwd")
        for shape, dtype in itertools.product(chosen, wanted)
    ]


def beyond_31_bits(operation: str) -> list[Setting]:
    """Forward on a tensor of more than 2^31 elements; none without a GPU."""
    place = device()
    if place != "cuda" or operation not in HUGE:
        return []
    return [Setting(OPERATIONS[operation], HUGE[operation], torch.bfloat16, place, "fwd")]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fills fresh memory with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


def check(setting: Setting, kernels: Callable[..., Any] | None = None) -> Checked:
    """Checks this project's kernels, or `kernels` in their place, on one setting."""
    name = setting.operation.name
    kernels = kernels or kernels_for(name)
    result = Checked(name, setting.shape.sizes(), dtype_name(setting.dtype), ok=False)
    if kernels is None:
        return replace(result, problem=f"siglip_kernels has no {name}")
    try:
        huge = setting.shape is HUGE.get(name)
        return _check_huge(setting, result) if huge else _check(setting, kernels, result)
    except (torch.OutOfMemoryError, MissingBackendError) as error:  # the latter of fp8, on a GPU without it
        return replace(result, ok=True, problem=f"not checked: {' '.join(str(error).split())[:100]}")
    except Exception as error:  # a kernel that raises has failed, like one that is wrong
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return replace(result, problem=problem, unsupported=isinstance(error, UnsupportedInputError))
    finally:
        free()


def _check(setting: Setting, kernels: Callable[..., Any], result: Checked) -> Checked:
    inputs = setting.inputs(seed=2)
    evaluate = gradients if setting.operation.trains else _results
    exact = evaluate(
        setting.operation.definition(setting, torch.float64), inputs.map(torch.Tensor.double), setting.dtype
    )
    eager = evaluate(setting.operation.definition(setting, setting.dtype), inputs, setting.dtype)
    contender = Contender(kernels)
    with poisoned():
        found = evaluate(contender, inputs, setting.dtype)
        again = evaluate(contender, inputs, setting.dtype)
        inference = forward(contender, inputs)
    excess = -1.0
    for name in exact:
        error, eager_error = distance(found[name], exact[name]), distance(eager[name], exact[name])
        if name == "results":
            error = max(error, distance(inference, exact[name]), key=lambda value: (value != value, value))
        allowed = allowed_distance(eager[name], exact[name], setting.dtype, PROJECT_FACTOR)
        if not error / allowed <= excess:
            excess = error / allowed
            result = replace(result, what=name, error=error, allowed=allowed, eager_error=eager_error)
        if not error <= allowed:
            return replace(result, problem=f"{name} is off by {error:.1e}, {allowed:.1e} is allowed")
    if not _same_bits(found, again):
        return replace(result, problem="a second run gave other bits")
    return replace(result, ok=True, sdpa_error=_beside(setting, inputs, exact, result.what))


def _results(contender: Contender, inputs: Inputs, dtype: torch.dtype) -> Found:
    """In place of `gradients` where there are none."""
    return {"results": forward(contender, inputs)}


def _same_bits(first: Found, second: Found) -> bool:
    return all(torch.equal(a, b) for name in first for a, b in zip(first[name], second[name], strict=True))


def _beside(setting: Setting, inputs: Any, exact: Found, what: str) -> float | None:
    entry = peers_of(setting.operation.name).get(BESIDE.get(setting.operation.name, ""))
    if entry is None:
        return None
    return distance(gradients(entry.prepare(setting), inputs, setting.dtype)[what], exact[what])


def _check_huge(setting: Setting, result: Checked) -> Checked:
    entry = peers_of(setting.operation.name)["triton"]
    verdict = Judge(setting, setting.inputs()).judge(entry, entry.prepare(setting))
    return replace(result, ok=not verdict.problem, problem=verdict.problem, what="results", error=verdict.error)


def check_all(
    operations: Sequence[str],
    quick: bool,
    dtypes: Sequence[str] = (),
    progress: Progress = silent,
    tiny: bool = False,
) -> Iterator[Checked]:
    """Checks every setting of the operations. Raises DeadDevice after the result that broke the CUDA context."""
    wanted = [setting for name in operations for setting in settings(name, quick, dtypes, tiny)]
    if not quick and not tiny:
        wanted += [setting for name in operations for setting in beyond_31_bits(name)]
    for done, setting in enumerate(wanted):
        label = f"{setting.operation.name} {setting.shape.name} {dtype_name(setting.dtype)}"
        progress(Event(done, len(wanted), label, setting=setting))
        checked = check(setting)
        if device_is_dead():
            yield replace(checked, ok=False, crashed=True, problem=f"crashed: {checked.problem}")
            raise DeadDevice(f"{label} broke the CUDA context: {checked.problem}")
        yield checked
    progress(Event(len(wanted), len(wanted)))


def not_checked(one: Checked) -> Checked:
    """What the kernels of one architecture reject, which is no failure: others compute it."""
    return replace(one, ok=True, problem=f"not checked: {one.problem}") if one.unsupported else one


def write_checks(checked: Iterable[Checked], where: Path | None) -> Path:
    """Appends a line of JSON for each, with the environment. where: as of `bench.report.rows.results_file`."""
    path = checks_file(where)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps({**asdict(one), **environment()}) + "\n" for one in checked)
    return path


# Operations that run all the others.
_MODELS = ("vision_tower", "naflex_tower", "siglip", "training_step")


def failures(checked: Iterable[Checked]) -> dict[tuple[str, str], str]:
    """(operation, kernels) that must not be timed, with the first reason.

    A model that runs failed kernels is judged by its own results, unless the failure was a crash.
    """
    found: dict[tuple[str, str], str] = {}
    for one in checked:
        if one.ok:
            continue
        reason = f"failed the check ({one.shape['name']} {one.dtype}): {one.problem}"
        more = with_models(one.op, one.kernels, reason) if one.crashed else {}
        found = {**more, (one.op, one.kernels): reason, **found}
    return found


def with_models(operation: str, kernels: str, reason: str) -> dict[tuple[str, str], str]:
    """A failure of the operation's kernels and of every model, which would crash as well."""
    return {(one, kernels): reason if one == operation else f"{operation}: {reason}" for one in (operation, *_MODELS)}
