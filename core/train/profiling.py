"""Where a training step's time goes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WAIT, WARM_UP, STEPS = 2, 1, 3  # steps that pass, that only switch the profiler on, and that are recorded
PROFILED_UNTIL = WAIT + WARM_UP + STEPS
TRACE = "trace.json.gz"


@contextmanager
def profiled(folder: Path, device: torch.device, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Gives a function to be called after each step; writes a trace of a few of them, and says the ten costliest."""
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda

    def tell(recorded: profile) -> None:
        say(costliest(recorded, on_cuda))
        try:
            recorded.export_chrome_trace(str(folder / TRACE))
        except OSError as error:
            say(f"{folder / TRACE} can't be written ({error.strerror}); training goes on")
        else:
            say(f"wrote {folder / TRACE}: open it in https://ui.perfetto.dev")

    plan = schedule(wait=WAIT, warmup=WARM_UP, active=STEPS, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=tell) as recorder:

        def step() -> None:
            if on_cuda and recorder.step_num <= PROFILED_UNTIL:  # or kernels of the step before would be counted in
                torch.cuda.synchronize(device)
            recorder.step()

        yield step


def costliest(recorded: profile, on_cuda: bool, count: int = 10) -> str:
    """A table of the kernels (on the CPU: operators) that took most of the recorded steps' time."""
    rows = []
    for event in recorded.key_averages():
        if on_cuda and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        microseconds = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        if not event.key.startswith("ProfilerStep"):
            rows.append((microseconds / 1000 / STEPS, event.count / STEPS, event.key))
    whole = sum(milliseconds for milliseconds, _, _ in rows)
    lines = [f"{'ms a step':>10}  {'share':>6}  {'calls':>6}  kernel"]
    for milliseconds, calls, name in sorted(rows, reverse=True)[:count]:
        lines.append(f"{milliseconds:>10.2f}  {milliseconds / whole:>6.1%}  {calls:>6.0f}  {name[:80]}")
    return "\n".join([*lines, f"{whole:>10.2f}  100.0%          all {len(rows)}"])
