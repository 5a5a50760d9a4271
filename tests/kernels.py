"""Kernels that begin with the libraries imported: one process imports them once and forks a kernel for each chapter.

A chapter's kernel spends most of its time on importing torch. The kernels of this module share that: the server (this
file, run as a script) imports what most chapters use and then waits for orders at a socket, from every worker of the
tests. Each order is one line of JSON; the answer is the process number of a fork, which is a kernel like any other from
then on.
"""

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

LIBRARIES = ["matplotlib.pyplot", "pandas", "torchvision", "timm", "segmentation_models_pytorch", "albumentations"]
LIBRARIES += ["scipy.stats", "accelerate", "torch.utils.data", "ipykernel.ipkernel", "ipykernel.kernelapp"]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
ADDRESS = "CRACKSEG_KERNELS"  # the environment variable that names the server's socket


def become_kernel(order, connection):
    "Turn this fork into a kernel: its own session, environment, folder and files."
    import matplotlib
    from ipykernel.kernelapp import IPKernelApp

    os.setsid()
    connection.sendall(b"%d\n" % os.getpid())  # not before: Jupyter sends its signals to the kernel's whole group
    connection.close()
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(order["environment"], JPY_PARENT_PID=str(os.getppid()))
    tempfile.tempdir = None  # the folder of the environment, not that of the server
    os.chdir(order["folder"])
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nowhere, number)
    # A kernel asks for figures in the notebook through the environment, before matplotlib is imported.
    matplotlib.use("module://matplotlib_inline.backend_inline")
    IPKernelApp.launch_instance(argv=["-f", order["connection_file"]])


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def serve(address, owner):
    "Import the libraries, then fork a kernel for each order until the process `owner` is gone."
    for name in LIBRARIES:
        importlib.import_module(name)
    # Once, at its import, pandas looks whether it writes to a terminal; this process has none, a notebook has room.
    importlib.import_module("pandas").set_option("display.max_columns", 20)
    gc.freeze()  # a fork's garbage collection leaves the pages of the libraries alone
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # of SIGCHLD: the system itself takes care of kernels that ended
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    listener.settimeout(2)
    while is_running(owner):
        with contextlib.suppress(TimeoutError, json.JSONDecodeError):  # a client may be gone before its order
            connection, _ = listener.accept()
            with connection, connection.makefile() as lines:
                order = json.loads(lines.readline())
                if not os.fork():
                    listener.close()
                    lines.close()
                    become_kernel(order, connection)
                    sys.exit()  # what is registered for the end of a process is done


class ForkedKernel:
    "The part of `subprocess.Popen` that Jupyter uses, for a process that is no child of this one."

    stdin = stdout = stderr = None

    def __init__(self, pid):
        self.pid = pid

    def poll(self):
        return None if is_running(self.pid) else 0

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


def connect(seconds=300):
    "Return a connection to the server; the first process that asks for one starts it."
    address, end = os.environ[ADDRESS], time.monotonic() + seconds
    with contextlib.suppress(FileExistsError):
        os.close(os.open(f"{address}.started", os.O_CREAT | os.O_EXCL))
        subprocess.Popen([sys.executable, __file__, address, os.environ[f"{ADDRESS}_OWNER"]], start_new_session=True)
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(address)
            return connection
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def fork(connection_file, environment, folder):
    "Return a kernel for the given connection file, a fork of the server."
    order = {"connection_file": connection_file, "environment": dict(environment), "folder": os.fspath(folder)}
    with connect() as connection, connection.makefile() as lines:
        connection.sendall(json.dumps(order).encode() + b"\n")
        return ForkedKernel(int(lines.readline()))


def fork_kernels(folder):
    "Let Jupyter's clients in this process start Python kernels as forks; the server's socket lies in `folder`."
    from jupyter_client.provisioning import local_provisioner

    if ADDRESS not in os.environ:  # workers of the tests inherit it from the process that started them
        os.environ |= {ADDRESS: f"{folder}/kernels", f"{ADDRESS}_OWNER": str(os.getpid())}
    start = local_provisioner.launch_kernel

    def launch(cmd, env=None, cwd=None, **settings):
        if "ipykernel_launcher" not in cmd:
            return start(cmd, env=env, cwd=cwd, **settings)
        return fork(cmd[cmd.index("-f") + 1], os.environ if env is None else env, cwd or os.getcwd())

    local_provisioner.launch_kernel = launch


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
