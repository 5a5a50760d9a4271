"""A SLURM of one node for tests, from Debian's packages (`apt-get install slurm-wlm munge`); needs root, cleans up."""

import os
import platform
import secrets
import shutil
import socket
import subprocess
import time
from contextlib import ExitStack, contextmanager

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
# A short life of credentials: a job that is requeued begins twice that time later.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def reason_against():
    "Say why no cluster can be started here; empty if one can."
    missing = [program for program in PROGRAMS if shutil.which(program, path=search_path()) is None]
    if missing:
        return f"no SLURM ({', '.join(missing)} missing); on Debian: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "SLURM is started by root only"


def search_path():
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def free_ports(count):
    "Return ports of this machine that nobody listens on."
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for(condition, what, seconds=30):
    "Wait until `condition()` is true; fail after `seconds`."
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.1)


def kill_all(folder):
    "End every process that lives on the cluster in `folder`: jobs, their kernels, and the SLURM steps that watch them."
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SLURM_CONF") == str(folder / "slurm.conf"):
                found += [process, *[parent for parent in process.parents() if parent.name() == "slurmstepd"]]
        except psutil.Error:
            pass
    for process in found:
        try:
            process.kill()
        except psutil.Error:
            pass


@contextmanager
def slurm_cluster(folder, cpus=2):
    "Start a cluster that lives in `folder`, yield its environment variables, and stop it."
    folder.chmod(0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "key").touch(mode=0o400)
    (folder / "key").write_bytes(secrets.token_bytes(128))
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(host=platform.node().split(".")[0], ports=free_ports(2), folder=folder, cpus=cpus)
    )
    environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": search_path()}
    commands = [
        [
            "munged",
            "--foreground",
            "--force",
            f"--key-file={folder}/key",
            *[
                f"--{name}={folder}/munge.{end}"
                for name, end in {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}.items()
            ],
        ],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-c"],
    ]
    daemons = []
    try:
        for command in commands:
            with open(folder / f"{command[0]}.out", "w") as output:
                daemons.append(subprocess.Popen(command, env=os.environ | environment, stdout=output, stderr=output))
            if command[0] == "munged":
                wait_for((folder / "munge.socket").exists, "munged")
        wait_for(
            lambda: (
                "idle"
                in subprocess.run(
                    ["sinfo", "-h", "-o", "%t"], env=os.environ | environment, capture_output=True, text=True
                ).stdout
            ),
            "an idle node",
        )
        yield environment
    finally:
        for daemon in reversed(daemons[1:]):
            daemon.terminate()
        kill_all(folder)
        for daemon in daemons[:1]:
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
