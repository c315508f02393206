"""The texts of a lab's configuration files. Each line that is not obvious says why it is there."""

from __future__ import annotations

from pathlib import Path

import cgroups
from layout import Lab

SLURM_CONF = """\
# Written by slurm/lab/up; `up` writes it again.
ClusterName={lab.cluster}
SlurmctldHost={lab.host}(127.0.0.1)
SlurmctldPort={lab.controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it may start again; SLURM takes no less than 5.
AuthInfo=socket={lab.munge_socket},cred_expire={lab.requeue_delay}
CredType=cred/munge
MpiDefault=none
MailProg=/bin/true

StateSaveLocation={lab.folder}/state
SlurmdSpoolDir={lab.folder}/spool/%n
SlurmctldPidFile={lab.folder}/run/slurmctld.pid
SlurmdPidFile={lab.folder}/run/slurmd.%n.pid
SlurmctldDebug=verbose
SlurmdDebug=verbose

# Which processes of a job get a signal depends on this: with linuxproc all of them, with cgroup only srun's own tasks.
ProctrackType=proctrack/{lab.proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
# Nodes have more CPUs than the machine; without this they would be drained for it.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
FirstJobId={lab.first_job}

# Everything that a cluster takes minutes for, in seconds.
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
PriorityType=priority/basic
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=20
KillWait=5
MinJobAge=3600

JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{preempt_signal}{accounting}
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=10 GraceTime=8 MaxTime=INFINITE State=UP
PartitionName=short Nodes=ALL PriorityTier=10 GraceTime=0 MaxTime=1 DefaultTime=1 State=UP
PartitionName=high Nodes=ALL PriorityTier=100 PreemptMode=OFF MaxTime=INFINITE State=UP
"""

ACCOUNTING = """
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={lab.accounting_port}
# Not a password: where the munged is that slurmdbd asks.
AccountingStoragePass={lab.munge_socket}
AccountingStorageTRES=gres/gpu
"""

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={lab.munge_socket}
SlurmUser=root
DbdHost={lab.host}
DbdAddr=127.0.0.1
DbdPort={lab.accounting_port}
# Over the socket that MYSQL_UNIX_PORT names: this MariaDB has no TCP port and no passwords.
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
PidFile={lab.folder}/run/slurmdbd.pid
"""

# The lab watches processes with cgroups and constrains nothing: its CPUs and GPUs are not real.
CGROUP_CONF = """\
ConstrainCores=no
ConstrainRAMSpace=no
{ignore_systemd}"""


def slurm_conf(lab: Lab) -> str:
    return SLURM_CONF.format(
        lab=lab,
        preempt_signal="SlurmctldParameters=preempt_send_user_signal\n" if lab.preempt_signal else "",
        accounting=ACCOUNTING.format(lab=lab) if lab.accounting else "AccountingStorageType=accounting_storage/none\n",
        nodes="\n".join(node_line(lab, index) for index in range(lab.nodes)),
    )


def node_line(lab: Lab, index: int) -> str:
    name = lab.node_names[index]
    words = [
        f"NodeName={name}",
        f"NodeHostname={name if lab.separate else lab.host}",
        f"NodeAddr={lab.node_address(index)}",
        f"Port={lab.node_port(index)}",
        "CPUs=8 RealMemory=4000 State=UNKNOWN",
    ]
    return " ".join([*words, f"Gres=gpu:{lab.gpus}"] if lab.gpus else words)


def gres_conf(lab: Lab) -> str:
    """SLURM counts these GPUs out and sets CUDA_VISIBLE_DEVICES as it does for real ones."""
    names = ",".join(lab.node_names)
    return "".join(f"NodeName={names} Name=gpu File={lab.path}/dev/gpu{number}\n" for number in range(lab.gpus))


def hosts(lab: Lab) -> str:
    """What the nodes see as /etc/hosts: the machine's own, and before it each other's names."""
    lines = [f"{lab.node_address(index)} {name}\n" for index, name in enumerate(lab.node_names)]
    try:
        own = Path("/etc/hosts").read_text(encoding="utf-8")
    except OSError:
        own = "127.0.0.1 localhost\n"
    return "".join(lines) + own


def write(lab: Lab) -> None:
    """Write all configuration files and the folders they name into the lab's folder."""
    # Everybody may look at the cluster, as on a real one; the keys and the database are root's.
    lab.path.chmod(0o755)
    for name, mode in (("munge", 0o755), ("mariadb", 0o700), ("state", 0o700), ("spool", 0o755), ("log", 0o755)):
        (lab.path / name).mkdir(exist_ok=True)
        (lab.path / name).chmod(mode)
    for name in ("run", "dev", *(f"spool/{node}" for node in lab.node_names)):
        (lab.path / name).mkdir(exist_ok=True)
    for number in range(lab.gpus):
        # Without a device behind the name SLURM counts the GPU, but sets no CUDA_VISIBLE_DEVICES.
        device = lab.path / "dev" / f"gpu{number}"
        if not device.is_symlink():
            device.symlink_to("/dev/null")
    ignore_systemd = "" if cgroups.SYSTEMD.is_dir() else "IgnoreSystemd=yes\n"
    texts = {
        lab.slurm_conf: slurm_conf(lab),
        lab.path / "gres.conf": gres_conf(lab),
        lab.path / "cgroup.conf": CGROUP_CONF.format(ignore_systemd=ignore_systemd),
        lab.hosts_file: hosts(lab),
    }
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
        path.chmod(0o644)
    if lab.accounting:
        # slurmdbd refuses a file that others may read.
        secret = lab.path / "slurmdbd.conf"
        secret.touch(mode=0o600)
        secret.write_text(SLURMDBD_CONF.format(lab=lab), encoding="utf-8")
