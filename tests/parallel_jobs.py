"What the processes of tests/test_parallel.py do; they import it, so it lies in a module of its own."

import os
import signal
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from crackseg_nb.core.checks import CrackSegError, Stopped
from crackseg_nb.metrics.counts import BinaryMetrics
from crackseg_nb.training import exchange as exchange_module
from crackseg_nb.training.exchange import (
    RunningStatistics,
    any_process,
    gather_metrics,
    gather_objects,
    sum_gradients,
    sum_over_processes,
)
from crackseg_nb.training.memory import NoRoom

MICRO_BATCHES = ((3, 2), (0, 1), (0, 0), (1, 1))  # of each process, in four windows


class Normalised(nn.Module):
    "Every kind of batch normalisation: with momentum, used twice, averaging, and frozen."

    def __init__(self):
        super().__init__()
        self.first, self.average, self.frozen = (
            nn.BatchNorm2d(3),
            nn.BatchNorm2d(3, momentum=None),
            nn.BatchNorm2d(3, momentum=None),
        )
        self.last = nn.BatchNorm2d(3, momentum=1.0)
        self.frozen.eval()

    def forward(self, image):
        return self.last(self.frozen(self.average(self.first(self.first(image) * 2 + 1))))


def micro_batches():
    return list(
        torch.randn(sum(map(sum, MICRO_BATCHES)), 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1
    )


def statistics_of_windows(accelerator):
    "Return the buffers after all windows, each process having taken its share."
    model, images = Normalised(), micro_batches()
    statistics = RunningStatistics(model)
    for sizes in MICRO_BATCHES:
        statistics.snapshot()
        shares = [[images.pop(0) for _ in range(size)] for size in sizes]
        for image in shares[accelerator.process_index]:
            model(image)
        statistics.combine(accelerator)
    return dict(model.named_buffers())


def gradients(accelerator):
    "Return the gradients of parameters that both processes, one or none of them reached."
    rank = accelerator.process_index
    both, one, none, double = (
        nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in (torch.float32,) * 3 + (torch.float64,)
    )
    frozen, image = nn.Parameter(torch.zeros(2), requires_grad=False), nn.Parameter(torch.zeros(2, 3, 2, 2))
    both.grad, double.grad = torch.tensor([1.0, 2.0]) * (rank + 1), torch.full((2,), 1e-12 + rank, dtype=torch.float64)
    image.grad = torch.arange(24.0).view(2, 3, 2, 2)
    if rank == 0:
        image.grad = image.grad.to(memory_format=torch.channels_last)  # the same numbers in another order
    if rank == 1:
        one.grad = torch.tensor([5.0, 6.0])
    parameters = dict(both=both, one=one, none=none, double=double, frozen=frozen, image=image)
    sum_gradients(parameters.values(), accelerator)
    return {name: parameter.grad for name, parameter in parameters.items()}


def metrics_of(indices):
    metrics = BinaryMetrics()
    for index in indices:
        torch.manual_seed(index)
        metrics.update(torch.rand(1, 6, 6), (torch.rand(1, 6, 6) > 0.5).long(), [index])
    return metrics


def scores(accelerator):
    "Return the gathered scores of 1 to 7 images that two processes share; both hold image 0."
    rank = accelerator.process_index
    shares = [sorted({0, *range(rank, count, 2)}) if count > 1 else [0][rank:] for count in range(1, 8)]
    return [gather_metrics(metrics_of(share), accelerator).compute() for share in shares]


def unnumbered(accelerator):
    metrics = BinaryMetrics()
    metrics.update(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long))
    try:
        gather_metrics(metrics, accelerator)
    except CrackSegError as error:
        return str(error)


def no_room(accelerator):
    "Return what both processes say where the second has no memory for the exchange of gradients."

    def full(parameters):
        raise torch.OutOfMemoryError("CUDA out of memory")

    join = exchange_module.join_gradients
    exchange_module.join_gradients = full if accelerator.process_index == 1 else join
    try:
        sum_gradients(nn.Linear(1, 1).parameters(), accelerator)
    except NoRoom as error:
        return str(error)
    finally:
        exchange_module.join_gradients = join


def everything(folder):
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    print(f"process {rank} is at work")
    answers = dict(
        world=accelerator.num_processes,
        threads=torch.get_num_threads(),
        pid=os.getpid(),
        gradients=gradients(accelerator),
        scores=scores(accelerator),
        unnumbered=unnumbered(accelerator),
        buffers=statistics_of_windows(accelerator),
        any=[any_process(flag, accelerator) for flag in (False, rank == 1, True)],
        objects=gather_objects(dict(rank=rank), accelerator),
        no_room=no_room(accelerator),
        sum=sum_over_processes(torch.tensor([1.0, 10.0 * rank]), accelerator).tolist(),
    )
    torch.save(answers, Path(folder) / f"{rank}.pt")


def fail(kind, folder):
    "Fail in the second process while the first waits for it, or does not know of it yet."
    if kind == "user":
        if os.environ["RANK"] == "0":
            time.sleep(100)
        (Path(folder) / "failed").touch()
        raise CrackSegError("data_root: found\nnothing, expected images")
    accelerator = Accelerator(cpu=True)
    if accelerator.process_index == 0:
        return accelerator.wait_for_everyone()
    (Path(folder) / "failed").touch()
    if kind == "bug":
        [][3]
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)


def wait_for_signals(folder, wanted, stuck):
    "Leave a note for each signal; stop when all wanted ones have come, after as long as writing a checkpoint takes."
    accelerator, received = Accelerator(cpu=True), []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: received.append(number))
    if stuck:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # heeds nothing, as in a long computation
    (Path(folder) / f"{accelerator.process_index}.started.{os.getpid()}").touch()
    while any_process(set(received) != set(wanted), accelerator):
        time.sleep(0.05)
    time.sleep(1)
    (Path(folder) / f"{accelerator.process_index}.saved").touch()
    if accelerator.process_index == 0:
        raise Stopped("stopped at epoch 3")
    sys.exit(75)
