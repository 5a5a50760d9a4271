"""Kernels that begin with the libraries imported: one process imports them once and forks a kernel for each chapter.

A chapter's kernel spends most of its time on importing torch. The kernels of this module share that: the server (this
file, run as a script) imports what most chapters use and then waits for orders. Each order is one line of JSON on its
standard input; the answer is the process number of a fork, which is a kernel like any other from then on.
"""

import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time

LIBRARIES = ["matplotlib.pyplot", "pandas", "torchvision", "timm", "segmentation_models_pytorch", "albumentations"]
LIBRARIES += ["scipy.stats", "accelerate", "torch.utils.data", "ipykernel.ipkernel", "ipykernel.kernelapp"]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)


def become_kernel(order):
    "Turn this fork into a kernel: its own session, environment, folder and files."
    import matplotlib
    from ipykernel.kernelapp import IPKernelApp

    os.setsid()
    print(os.getpid(), flush=True)  # not before: Jupyter sends its signals to the kernel's whole group
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(order["environment"], JPY_PARENT_PID=str(os.getppid()))
    os.chdir(order["folder"])
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nowhere, number)
    # A kernel asks for figures in the notebook through the environment, before matplotlib is imported.
    matplotlib.use("module://matplotlib_inline.backend_inline")
    IPKernelApp.launch_instance(argv=["-f", order["connection_file"]])


def serve():
    "Import the libraries, then fork a kernel for each order until the input ends."
    for name in LIBRARIES:
        importlib.import_module(name)
    # Once, at its import, pandas looks whether it writes to a terminal; this process has none, a notebook has room.
    importlib.import_module("pandas").set_option("display.max_columns", 20)
    gc.freeze()  # a fork's garbage collection leaves the pages of the libraries alone
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # of SIGCHLD: the system itself takes care of kernels that ended
    for line in sys.stdin:
        if not os.fork():
            become_kernel(json.loads(line))
            sys.exit()  # what is registered for the end of a process is done


class ForkedKernel:
    "The part of `subprocess.Popen` that Jupyter uses, for a process that is no child of this one."

    stdin = stdout = stderr = None

    def __init__(self, pid):
        self.pid = pid

    def poll(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, 0)
            return None
        return 0

    def wait(self, timeout=None):
        end = time.monotonic() + (timeout or float("inf"))
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("kernel", timeout)
            time.sleep(0.02)
        return 0

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def terminate(self):
        self.send_signal(signal.SIGTERM)


class Server:
    "A server that starts with its first kernel and ends with this process."

    process = None

    def fork(self, connection_file, environment, folder):
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        order = {"connection_file": connection_file, "environment": dict(environment), "folder": os.fspath(folder)}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return ForkedKernel(int(self.process.stdout.readline()))


def fork_kernels():
    "Let Jupyter's clients in this process start Python kernels as forks."
    from jupyter_client.provisioning import local_provisioner

    server, start = Server(), local_provisioner.launch_kernel

    def launch(cmd, env=None, cwd=None, **settings):
        if "ipykernel_launcher" not in cmd:
            return start(cmd, env=env, cwd=cwd, **settings)
        return server.fork(cmd[cmd.index("-f") + 1], os.environ if env is None else env, cwd or os.getcwd())

    local_provisioner.launch_kernel = launch


if __name__ == "__main__":
    serve()
