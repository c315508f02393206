"""What failures look like: the words of exceptions and of trusted log lines, and what each means for the user.

The texts are those that torch, NCCL, gloo, CUDA, DeepSpeed, safetensors, SLURM and the kernel print. A line of a log counts
only if it has the form of one of these speakers: a run's own output may hold any words.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass

KINDS = (
    *("config", "data", "out_of_memory", "disk", "node", "network", "hang", "numbers"),
    *("preemption", "time_limit", "cancelled", "checkpoint", "unknown"),
)


@dataclass(frozen=True)
class Case:
    """One way to fail."""

    kind: str
    what: str
    advice: str = ""
    follows: bool = False
    """Seen on a process that lost another one, or waited for it: not a cause if another process has one."""


_LESS = "lower train.per_device_train_batch_size or data.max_length, or take a plan that shards more (sft-dist plan)"
_SPACE = "free some, or put runs elsewhere (run.dir), then resume"
CASES = {
    "gpu_memory": Case("out_of_memory", "a GPU ran out of memory", _LESS),
    "host_memory": Case("out_of_memory", "the host ran out of memory", "ask for more (slurm.mem), or offload less"),
    "shared_memory": Case("out_of_memory", "shared memory (/dev/shm) is full", "give the container or node more of it"),
    "disk_full": Case("disk", "the disk is full", _SPACE),
    "inodes": Case("disk", "the file system has no room for another file", "delete small files, then resume"),
    "quota": Case("disk", "the disk quota is used up", _SPACE),
    "read_only": Case("disk", "the file system is read-only", "put the run on one that can be written (run.dir)"),
    "permission": Case("disk", "a file may not be opened or written", "check its owner and permissions, then resume"),
    "disk_write": Case("disk", "a file could not be written", "check space and quota of the run's disk, then resume"),
    "ecc": Case("node", "a GPU reports memory errors (ECC)", "tell the cluster's staff"),
    "gpu_lost": Case("node", "a GPU is gone from its node", "tell the cluster's staff"),
    "xid": Case("node", "the GPU driver reports a hardware error", "tell the cluster's staff"),
    "driver": Case("node", "the GPU driver does not work on the node", "tell the cluster's staff"),
    "gpu_busy": Case("node", "the node's GPU cannot be used", "tell the cluster's staff"),
    "node_down": Case("node", "a node went down"),
    "port": Case("network", "the port where the processes meet is taken"),
    "name": Case("network", "a host's name could not be looked up", "check slurm.master_addr"),
    "files_gone": Case("network", "the file system did not answer"),
    "web": Case("network", "a server on the network did not answer", "fetch with sft-dist data prepare beforehand"),
    "lost": Case("network", "the connection to another process was lost", follows=True),
    "meeting": Case("network", "the processes did not find each other", "check slurm.socket_ifname", follows=True),
    "hang": Case("hang", "a process waited for the others until its time was up", follows=True),
    "numbers": Case("numbers", "the loss or a gradient is not finite", "lower train.learning_rate; look at the data"),
    "weights": Case("checkpoint", "a file of weights is damaged", "move it away; an older checkpoint is taken"),
    "sharding": Case("checkpoint", "the checkpoint is for another number of processes", "resume with as many as before"),
    "package": Case("config", "a package or library is missing", "install it where the job runs"),
    "offline": Case("config", "a file was to be fetched, but the hub is off", "run sft-dist data prepare first"),
    "gpus": Case("config", "there are more processes than GPUs for them", "set slurm.gpus_per_node, parallel.num_processes"),
    "compiler": Case("config", "what DeepSpeed compiles needs CUDA's compiler", "load the module, or set parallel.plan"),
    "job_memory": Case("out_of_memory", "the job took more host memory than it had", "ask for more: slurm.mem"),
    "preempted": Case("preemption", "the job was preempted"),
    "out_of_time": Case("time_limit", "the job ran into its time limit"),
    "cancelled": Case("cancelled", "the job was cancelled"),
}  # fmt: skip

# Of OSError and its subclasses.
ERRNO = {
    errno.ENOSPC: "disk_full",
    errno.EDQUOT: "quota",
    errno.EROFS: "read_only",
    errno.ENOMEM: "host_memory",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "permission"),
    **dict.fromkeys((errno.EADDRINUSE, errno.EADDRNOTAVAIL), "port"),
    **dict.fromkeys((errno.ESTALE, errno.EIO, errno.EREMOTEIO, errno.ESHUTDOWN, errno.ENOTCONN), "files_gone"),
    **dict.fromkeys((errno.ECONNRESET, errno.EPIPE, errno.ECONNREFUSED, errno.ECONNABORTED), "lost"),
}

# Names of exception types that say it all.
TYPES = {
    "OutOfMemoryError": "gpu_memory",
    "MemoryError": "host_memory",
    "ImportError": "package",
    "ModuleNotFoundError": "package",
    "OfflineModeIsEnabled": "offline",
    "LocalEntryNotFoundError": "offline",
    "UnpicklingError": "weights",
    "SafetensorError": "weights",
    "FloatingPointError": "numbers",
    "MissingCUDAException": "compiler",
    "CUDAMismatchException": "compiler",
    "RendezvousTimeoutError": "meeting",
    "RendezvousConnectionError": "meeting",
    "RendezvousClosedError": "lost",
    "BrokenPipeError": "lost",
    "ConnectionResetError": "lost",
    "ConnectionRefusedError": "lost",
    "gaierror": "name",
}
# Types whose message is the library's own, never a piece of the user's data.
SPEAKS = re.compile(
    r"(Runtime|Accelerator|OutOfMemory|Memory|OS|IO|Permission|DistBackend|DistNetwork|DistStore|Dist|Safetensor|Import"
    r"|ModuleNotFound|Assertion|Connection\w*|ConnectTimeout|Timeout|gai|Broken\w*|Unpickling|EOF|HfHubHTTP|XetDownload"
    r"|Rendezvous\w*|Unrecoverable\w*|NVML\w*|Blocking\w*)Error"
    r"|(ZeRORuntime|MissingCUDA|CUDAMismatch)Exception|Exception|ConnectTimeout|ReadTimeout|MaxRetryError|gaierror"
)

_RULES = (
    # Memory. "Tried to allocate" is in every message of the caching allocator.
    (r"(CUDA|HIP|XPU) out of memory\. Tried to allocate", "gpu_memory"),
    (r"CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|Cuda failure (\d+ )?'out of memory'", "gpu_memory"),
    (r"Error while creating shared memory segment|unable to (write to|mmap|resize|open shared memory)[^\n]*</torch_", "shared_memory"),
    (r"workers are out of shared memory|insufficient shared memory \(shm\)", "shared_memory"),
    (r"DefaultCPUAllocator: (can't allocate memory|not enough memory)|\[Errno 12\]|Cannot allocate memory", "host_memory"),
    # Disk: C++ and Rust have no errno to give.
    (r"\[Errno 122\]|\(os error 122\)|Disk quota exceeded", "quota"),
    (r"\[Errno 28\]|\(os error 28\)|No space left on device|Not enough disk space", "disk_full"),
    (r"\[Errno 30\]|\(os error 30\)|Read-only file system", "read_only"),
    (r"PytorchStreamWriter failed|basic_ios::clear: iostream error|inline_container\.cc:\d+\] \. unexpected pos", "disk_write"),
    (r"write\(\): fd \d+ failed with", "disk_write"),
    (r"Parent directory \S+ does not exist|File \S+ cannot be opened", "disk_write"),
    (r"\[Errno (116|5|108)\]|Stale file handle|Input/output error|Cannot send after transport endpoint shutdown", "files_gone"),
    # GPUs and their driver.
    (r"uncorrectable ECC error|uncorrectable NVLink error|memory over nvlink or a hardware error", "ecc"),
    (r"fallen off the bus|GPU is lost|Unable to determine the device handle for", "gpu_lost"),
    (r"no CUDA-capable device is detected|Found no NVIDIA driver", "gpu_lost"),
    (r"Driver/library version mismatch|forward compatibility was attempted on non supported HW", "driver"),
    (r"NVIDIA driver on your system is too old|driver version is insufficient|system not yet initialized", "driver"),
    (r"(CUDA|CUDA driver) (initialization: Unexpected error|initialization failed)|libcuda\.so\.1: cannot open", "driver"),
    (r"CUDA-capable device\(s\) is/are busy or unavailable|CUDA error: unknown error", "gpu_busy"),
    (r"CUDA error: invalid device ordinal|Duplicate GPU detected", "gpus"),
    (r"Torch not compiled with CUDA enabled|Ninja is required to load C\+\+ extensions", "package"),
    (r"CUDA_HOME does not exist|CUDA_HOME environment variable is not set", "compiler"),
    # Numbers and weights.
    (r"Current loss scale already at minimum|returned nan values in its \d+th output", "numbers"),
    (r"PytorchStreamReader failed|Error while deserializing header|Weights only load failed|invalid load key", "weights"),
    (r"^Ran out of input|storage has wrong byte size|unexpected EOF, expected", "weights"),
    (r"The checkpoint being loaded used a DP world size|different data parallel world size", "sharding"),
    # Processes that wait for each other, or for a name or port of one.
    (r"EADDRINUSE|[Aa]ddress already in use", "port"),
    (r"Name or service not known|Temporary failure in name resolution|nodename nor servname|gai error|No address associated", "name"),
    (r"HTTPS?ConnectionPool|Max retries exceeded with url|(Read|Connect) ?[Tt]imeout error|Gateway Time-?out", "web"),
    (r"[Cc]ollective operation timeout|watchdog got stuck for|[Tt]imed out waiting \d+ms for (recv|send)", "hang"),
    (r"failed to pass monitoredBarrier|timed out in monitoredBarrier|Application timeout caused pair closure", "hang"),
    (r"wait timeout after \d+ms, keys|Timeout waiting for key|^Socket Timeout|Operation timed out!", "hang"),
    (r"client socket has (timed out|failed to connect)|connectFullMesh failed|Connect timeout \[", "meeting"),
    (r"Connection (closed|reset) by (remote )?peer|Socket closed|Connection was likely closed|Broken pipe", "lost"),
    (r"ncclRemoteError|remote process exited or there was a network error|Got completion from peer", "lost"),
    (r"NCCL communicator was aborted|[Cc]onnection (refused|timed out)|Software caused connection abort", "lost"),
    (r"ncclSystemError|socketStartConnect|Connection reset", "lost"),
)  # fmt: skip
RULES = tuple((re.compile(pattern), case) for pattern, case in _RULES)

# Xid numbers that mean hardware or driver; the others are mostly faults of the program that ran (13, 31, 43) or follow.
XIDS = {48, 61, 62, 63, 64, 74, 79, 92, 94, 95, 119, 120, 140, 143, 154}
XID = re.compile(r"NVRM: Xid \(PCI:[0-9A-Fa-f:.]+\): (\d+)(?:, pid='?(\d+|<unknown>))?")
KERNEL_KILLED = re.compile(r"[Oo]ut of memory: Killed process (\d+)")


def case_of_exception(name: str, message: str, number: int | None) -> str | None:
    """The case (a key of CASES) that an exception of the type `name` stands for, None if it says nothing."""
    short = name.rpartition(".")[2]
    if number is not None and number in ERRNO:
        return "shared_memory" if ERRNO[number] == "disk_full" and "/dev/shm" in message else ERRNO[number]
    if SPEAKS.fullmatch(short):
        for pattern, case in RULES:
            if pattern.search(message):
                return case
    return TYPES.get(short)
