"""A profile of a few training steps: the slowest kernels, and a trace for Perfetto."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WAIT, WARMUP, STEPS = 2, 1, 3  # steps before the profiler, steps that only start it, and recorded steps
PROFILED_STEPS = WAIT + WARMUP + STEPS
TRACE = "trace.json.gz"


@contextmanager
def profiled(folder: Path, device: torch.device, log: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Yields a function to call after each step. Logs the ten slowest kernels and writes a trace to `folder`."""
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda

    def report(recorded: profile) -> None:
        log(slowest_kernels(recorded, on_cuda))
        try:
            recorded.export_chrome_trace(str(folder / TRACE))
        except OSError as error:
            log(f"warning: {folder / TRACE} can't be written ({error.strerror}); training continues")
        else:
            log(f"wrote {folder / TRACE}; open it in https://ui.perfetto.dev")

    plan = schedule(wait=WAIT, warmup=WARMUP, active=STEPS, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=report) as recorder:

        def step() -> None:
            if on_cuda and recorder.step_num <= PROFILED_STEPS:  # else kernels of the step before are counted too
                torch.cuda.synchronize(device)
            recorder.step()

        yield step


def slowest_kernels(recorded: profile, on_cuda: bool, count: int = 10) -> str:
    """A table of the kernels (on the CPU: operators) with the largest share of the time of the recorded steps."""
    rows = []
    for event in recorded.key_averages():
        if on_cuda and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        microseconds = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        if not event.key.startswith("ProfilerStep"):
            rows.append((microseconds / 1000 / STEPS, event.count / STEPS, event.key))
    total = sum(milliseconds for milliseconds, _, _ in rows)
    lines = [f"{'ms/step':>10}  {'share':>6}  {'calls':>6}  kernel"]
    for milliseconds, calls, name in sorted(rows, reverse=True)[:count]:
        lines.append(f"{milliseconds:>10.2f}  {milliseconds / total:>6.1%}  {calls:>6.0f}  {name[:80]}")
    return "\n".join([*lines, f"{total:>10.2f}  100.0%          all {len(rows)}"])
