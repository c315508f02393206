"""Failures told apart by the texts that libraries, drivers, SLURM and the kernel really print.

The messages of gloo, c10d and torch on CPUs were provoked with torch 2.13; those of NCCL, CUDA, the driver and SLURM are
quoted from issues of their users and from their documentation.
"""

from __future__ import annotations

import errno
import signal

import pytest

from sft_dist.jobs.failures import Failure, classify, sentence_of_state
from sft_dist.jobs.signs import CASES, KINDS
from sft_dist.jobs.words import Evidence, JobWord, Word

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/"
NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3690, "
TRACE = 'Traceback (most recent call last):\n  File "/x/train.py", line 7, in <module>\n    main()\n'
CUDA_HINT = "\nCUDA kernel errors might be asynchronously reported at some other API call"

# Type, message, errno; the class, and a word of the sentence.
RAISED: list[tuple[str, str, int | None, str, str]] = [
    ("torch.OutOfMemoryError", "CUDA out of memory. Tried to allocate 22.78 GiB. GPU 0 has a total capacity of 31.47 GiB", None, "out_of_memory", "GPU"),
    ("torch.cuda.OutOfMemoryError", "CUDA out of memory. Tried to allocate 32.00 MiB. GPU 0 has a total capacty of 4.00 GiB", None, "out_of_memory", "GPU"),
    ("RuntimeError", "CUDA out of memory. Tried to allocate 2.26 GiB (GPU 0; 6.00 GiB total capacity)", None, "out_of_memory", "GPU"),
    ("torch.AcceleratorError", "CUDA error: out of memory" + CUDA_HINT, None, "out_of_memory", "GPU"),
    ("RuntimeError", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", None, "out_of_memory", "GPU"),
    ("torch.distributed.DistBackendError", NCCL + "unhandled cuda error\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'", None, "out_of_memory", "GPU"),
    ("RuntimeError", "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000000 bytes. Error code 12 (Cannot allocate memory)", None, "out_of_memory", "host"),
    ("MemoryError", "", None, "out_of_memory", "host"),
    ("OSError", "[Errno 12] Cannot allocate memory", errno.ENOMEM, "out_of_memory", "host"),
    ("RuntimeError", "unable to write to file </torch_8289_606636967_0>: No space left on device (28)", None, "out_of_memory", "/dev/shm"),
    ("RuntimeError", "DataLoader worker (pid 56811) is killed by signal: Bus error. It is possible that dataloader's workers are out of shared memory. Please try to raise your shared memory limit.", None, "out_of_memory", "/dev/shm"),
    ("torch.distributed.DistBackendError", NCCL + "unhandled system error\nLast error:\nError while creating shared memory segment /dev/shm/nccl-ab12 (size 9637888), error: No space left on device (28)", None, "out_of_memory", "/dev/shm"),
    ("OSError", "[Errno 28] No space left on device", errno.ENOSPC, "disk", "full"),
    ("OSError", "[Errno 122] Disk quota exceeded", errno.EDQUOT, "disk", "quota"),
    ("OSError", "[Errno 30] Read-only file system: '/scratch/runs/a'", errno.EROFS, "disk", "read-only"),
    ("PermissionError", "[Errno 13] Permission denied: 'runs/a/status.json'", errno.EACCES, "disk", "permissions"),
    ("RuntimeError", "basic_ios::clear: iostream error", None, "disk", "written"),
    ("RuntimeError", "[enforce fail at inline_container.cc:857] . PytorchStreamWriter failed writing file data/322: file write failed", None, "disk", "written"),
    ("RuntimeError", "[enforce fail at inline_container.cc:595] . unexpected pos 7328640 vs 7328528", None, "disk", "written"),
    ("RuntimeError", "write(): fd 29 failed with Input/output error", None, "disk", "written"),
    ("safetensors._safetensors_rust.SafetensorError", "Error while serializing: I/O error: No space left on device (os error 28)", None, "disk", "full"),
    ("safetensors._safetensors_rust.SafetensorError", "Error while serializing: I/O error: Disk quota exceeded (os error 122)", None, "disk", "quota"),
    ("OSError", "Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  ...\nOSError: [Errno 28] No space left on device", None, "disk", "full"),
    ("OSError", "Not enough disk space. Needed: 35.1 GiB (download: 12 GiB)", None, "disk", "full"),
    ("OSError", "[Errno 116] Stale file handle: '/nfs/runs/a'", errno.ESTALE, "network", "file system"),
    ("OSError", "[Errno 108] Cannot send after transport endpoint shutdown", errno.ESHUTDOWN, "network", "file system"),
    ("OSError", "[Errno 5] Input/output error", errno.EIO, "network", "file system"),
    ("RuntimeError", "CUDA error: uncorrectable ECC error encountered" + CUDA_HINT, None, "node", "ECC"),
    ("torch.AcceleratorError", "CUDA error: uncorrectable NVLink error detected during the execution", None, "node", "ECC"),
    ("RuntimeError", "CUDA error: Invalid access of peer GPU memory over nvlink or a hardware error", None, "node", "ECC"),
    ("RuntimeError", "No CUDA GPUs are available: CUDA error: no CUDA-capable device is detected", None, "node", "gone"),
    ("RuntimeError", "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU", None, "node", "gone"),
    ("RuntimeError", "CUDA error: CUDA-capable device(s) is/are busy or unavailable", None, "node", "cannot be used"),
    ("RuntimeError", "CUDA error: unknown error" + CUDA_HINT, None, "node", "cannot be used"),
    ("RuntimeError", "Unexpected error from cudaGetDeviceCount(). Error 804: forward compatibility was attempted on non supported HW", None, "node", "driver"),
    ("RuntimeError", "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized", None, "node", "driver"),
    ("RuntimeError", "The NVIDIA driver on your system is too old (found version 11040).", None, "node", "driver"),
    ("ImportError", "libcuda.so.1: cannot open shared object file: No such file or directory", None, "node", "driver"),
    ("torch.AcceleratorError", "CUDA error: invalid device ordinal\nGPU device may be out of range, do you have enough GPUs?", None, "config", "GPUs"),
    ("torch.distributed.DistBackendError", NCCL + "invalid usage\nLast error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000", None, "config", "GPUs"),
    ("AssertionError", "Torch not compiled with CUDA enabled", None, "config", "package"),
    ("ModuleNotFoundError", "No module named 'bitsandbytes'", None, "config", "package"),
    ("deepspeed.ops.op_builder.builder.MissingCUDAException", "CUDA_HOME does not exist, unable to compile CUDA op(s)", None, "config", "compile"),
    ("huggingface_hub.errors.LocalEntryNotFoundError", "Cannot find the requested files in the disk cache and outgoing traffic has been disabled.", errno.ENOENT, "config", "prepare"),
    ("huggingface_hub.errors.OfflineModeIsEnabled", "Cannot reach https://huggingface.co: offline mode is enabled.", None, "config", "prepare"),
    ("torch.distributed.DistNetworkError", "The server socket has failed to listen on any local network address. port: 23999, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use", None, "network", "port"),
    ("OSError", "[Errno 98] Address already in use", errno.EADDRINUSE, "network", "port"),
    ("socket.gaierror", "[Errno -2] Name or service not known", -2, "network", "name"),
    ("RuntimeError", f"{GLOO}device.cc:84] Unable to find address for: n7: Temporary failure in name resolution", None, "network", "name"),
    ("requests.exceptions.ConnectionError", "HTTPSConnectionPool(host='huggingface.co', port=443): Max retries exceeded with url: /api", None, "network", "server"),
    ("torch.distributed.DistNetworkError", "The client socket has timed out after 6000ms while trying to connect to (n1, 23456).", None, "network", "find each other"),
    ("RuntimeError", f"{GLOO}pair.cc:537] Read error [127.0.0.1]:12698: Connection reset by peer. This is typically caused by a remote worker hanging or bugs in the application.", None, "network", "lost"),
    ("RuntimeError", f"{GLOO}pair.cc:534] Connection closed by peer [10.0.0.2]:5423", None, "network", "lost"),
    ("torch.distributed.DistNetworkError", "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?", None, "network", "lost"),
    ("torch.distributed.DistBackendError", NCCL + "remote process exited or there was a network error, NCCL version 2.20.5\nncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.", None, "network", "lost"),
    ("torch.distributed.DistBackendError", NCCL + "unhandled system error, NCCL version 2.10.3\nncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.", None, "network", "lost"),
    ("RuntimeError", f"{GLOO}unbound_buffer.cc:78] Timed out waiting 6000ms for recv operation to complete", None, "hang", "waited"),
    ("RuntimeError", "[Rank 0]: Rank 1 failed to pass monitoredBarrier in 3000 ms\n Original exception: \n...", None, "hang", "waited"),
    ("torch.distributed.DistStoreError", "wait timeout after 2000ms, keys: /default_pg/0//nothing", None, "hang", "waited"),
    ("torch.distributed.DistBackendError", "[Rank 2] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1580, OpType=ALLREDUCE) ran for 600004 milliseconds before timing out.", None, "hang", "waited"),
    ("Exception", "Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.", None, "numbers", "finite"),
    ("RuntimeError", "Function 'MulBackward0' returned nan values in its 0th output.", None, "numbers", "finite"),
    ("safetensors._safetensors_rust.SafetensorError", "Error while deserializing header: header too small", None, "checkpoint", "damaged"),
    ("RuntimeError", "PytorchStreamReader failed reading zip archive: failed finding central directory", None, "checkpoint", "damaged"),
    ("_pickle.UnpicklingError", "Weights only load failed. In PyTorch 2.6, we changed the default value", None, "checkpoint", "damaged"),
    ("EOFError", "Ran out of input", None, "checkpoint", "damaged"),
    ("deepspeed.runtime.zero.utils.ZeRORuntimeException", "The checkpoint being loaded used a DP world size of 8 but the current world size is 4.", None, "checkpoint", "number of processes"),
    # Words that must not be taken for what they name.
    ("ValueError", "row 3: {'text': 'CUDA out of memory. Tried to allocate 2 GiB'} has no messages", None, "unknown", "row 3"),
    ("KeyError", "'No space left on device'", None, "unknown", "KeyError"),
    ("json.decoder.JSONDecodeError", "Expecting value: line 1 column 1 (char 0): 'Killed'", None, "unknown", "Expecting"),
    ("RuntimeError", "out of cheese", None, "unknown", "out of cheese"),
    ("RuntimeError", "The size of tensor a (3) must match the size of tensor b (4)", None, "unknown", "size"),
    ("RuntimeError", "CUDA error: device-side assert triggered", None, "unknown", "assert"),
    ("FileNotFoundError", "[Errno 2] No such file or directory: 'optimizer.pt'", errno.ENOENT, "unknown", "optimizer.pt"),
]  # fmt: skip

# The text of a log, the class, a word of the sentence; None: nothing in it says why.
LOGS: list[tuple[str, str | None, str]] = [
    ("slurmstepd: error: Detected 1 oom-kill event(s) in StepId=14604003.0 cgroup. Some of your processes may have been killed by the cgroup out-of-memory handler.", "out_of_memory", "slurm.mem"),
    ("slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks have been OOM Killed.", "out_of_memory", "slurm.mem"),
    ("srun: error: n2: task 4: Out Of Memory", "out_of_memory", "n2"),
    ("slurmstepd: error: *** JOB 494583 ON n1 CANCELLED AT 2024-04-20T09:09:37 DUE TO TIME LIMIT ***", "time_limit", "time limit"),
    ("slurmstepd: error: *** JOB 32391783 ON n1 CANCELLED AT 2021-06-18T13:05:36 DUE TO PREEMPTION ***", "preemption", "preempted"),
    ("slurmstepd: error: *** JOB 12 ON n1 CANCELLED AT 2024-01-01T00:00:00 DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***", "node", "went down"),
    ("slurmstepd: error: *** JOB 608 ON n1 CANCELLED AT 2022-08-12T02:06:12 ***", "cancelled", "cancelled"),
    ("srun: error: Node failure on n2", "node", "n2"),
    ("[Tue Mar  5 10:11:12 2024] NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.", "node", "gone"),
    ("NVRM: Xid (PCI:0000:01:00): 48, pid=1234, name=python, An uncorrectable double bit error (DBE) has been detected", "node", "hardware"),
    ("Failed to initialize NVML: Driver/library version mismatch", "node", "driver"),
    ("Unable to determine the device handle for GPU0000:03:00.0: Unknown Error", "node", "gone"),
    ("[rank0]:[E321 02:07:08.408271257 ProcessGroupNCCL.cpp:607] [Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1580, OpType=ALLREDUCE) ran for 600060 milliseconds before timing out.", "hang", "rank 0"),
    ("[rank7]:[E626 05:14:36.393067540 ProcessGroupNCCL.cpp:1743] [PG ID 0 PG GUID 0(default_pg) Rank 7] ProcessGroupNCCL's watchdog got stuck for 480 seconds without making progress", "hang", "rank 7"),
    ("[E ProcessGroupNCCL.cpp:455] NCCL error: remote process exited or there was a network error, NCCL version 2.14.3", "network", "lost"),
    ("a100-st-22:183006:183181 [1] misc/socket.cc:538 NCCL WARN Net : Connection closed by remote peer a100-st-22<47861>", "network", "lost"),
    ("n122-246-085:12251:12400 [5] misc/socket.cc:483 NCCL WARN socketStartConnect: Connect to fe80::966d%ib1<17943> failed : Software caused connection abort", "network", "lost"),
    ("node1:39964:40044 [0] init.cc:1 NCCL WARN Cuda failure 2 'out of memory'", "out_of_memory", "GPU"),
    (TRACE + "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "out_of_memory", "GPU"),
    ("\n".join("[rank3]: " + line for line in (TRACE + "OSError: [Errno 122] Disk quota exceeded").splitlines()), "disk", "rank 3"),
    (" 10%|#   | 1/10 [00:00<?]\rrank 1: error: No space left on device", "disk", "full"),
    ("error: /scratch/runs/a/status.json: Disk quota exceeded", "disk", "quota"),
    ("/var/spool/slurmd/job7/slurm_script: line 20:   123 Killed                  srun python", "unknown", "killed"),
    # A run's own words.
    ("Killed", None, ""),
    ("CUDA out of memory. Tried to allocate 2 GiB", None, ""),
    ('{"messages": [{"role": "user", "content": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate"}]}', None, ""),
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", None, ""),
    ("the answer: Node failure on n2, due to preemption", None, ""),
    ("log: NVRM: Xid (PCI:0000:01:00): 79, pid=1", None, ""),
    ("NVRM: Xid (PCI:0000:01:00): 13, pid=1234, name=python, Graphics Exception", None, ""),
    ("slurmstepd: error: *** STEP 3495064.0 ON orion-01-01 CANCELLED AT 2021-10-27T19:35:36 ***", None, ""),
    ("warning: address already in use by a teapot; No space left on device for it", None, ""),
]  # fmt: skip


def word(
    kind: str, message: str, number: int | None = None, rank: int | None = 0, time: float = 1.0, **more: object
) -> Word:
    return Word(type=kind, message=message, errno=number, rank=rank, node="n1", time=time, **more)  # type: ignore[arg-type]


LOST = ("RuntimeError", f"{GLOO}pair.cc:534] Connection closed by peer [10.0.0.2]:5423")
TIMED_OUT = LOGS[12][0]


def test_there_are_enough_messages() -> None:
    assert len(RAISED) + len(LOGS) >= 100
    assert {case.kind for case in CASES.values()} < set(KINDS)


@pytest.mark.parametrize(("name", "message", "number", "kind", "said"), RAISED, ids=[row[1][:40] for row in RAISED])
def test_an_error_is_told_by_type_number_and_words(
    name: str, message: str, number: int | None, kind: str, said: str
) -> None:
    failure = classify(Evidence(words=[word(name, message, number, rank=3)]))
    assert (failure.kind, said in failure.sentence) == (kind, True), failure
    assert (failure.rank, failure.node) == (3, "n1")
    assert "\n" not in failure.sentence
    assert failure.evidence


@pytest.mark.parametrize(("text", "kind", "said"), LOGS, ids=[row[0][:40].replace("\n", " ") for row in LOGS])
def test_a_log_is_believed_only_where_one_who_knows_speaks(text: str, kind: str | None, said: str) -> None:
    evidence = Evidence(logs={"err": f"step 1\n{text}\nmore\n"}, nodes=("n1", "n2"), reason="no word")
    failure = classify(evidence)
    assert (failure.kind, said in failure.sentence) == (kind or "unknown", True), failure
    assert (failure.sentence == "no word") == (kind is None)


def test_the_first_cause_wins_over_those_that_follow() -> None:
    lost = word(*LOST, rank=0, time=1.0)
    cause = word("torch.OutOfMemoryError", "CUDA out of memory. Tried to allocate 1 GiB", rank=5, time=2.0)
    assert classify(Evidence(words=[lost])).kind == "network"
    for order in ([lost, cause], [cause, lost]):
        failure = classify(Evidence(words=order, logs={"err": TIMED_OUT}))
        assert (failure.kind, failure.rank) == ("out_of_memory", 5)
    # An error without a class is a cause, too.
    bug = word("ValueError", "wrong", rank=2, time=3.0)
    assert classify(Evidence(words=[lost, bug])).sentence == "ValueError: wrong"
    # Of two causes, the earlier.
    disk = word("OSError", "", errno.ENOSPC, rank=7, time=1.5)
    assert classify(Evidence(words=[cause, disk])).kind == "disk"


def test_of_followers_the_earlier_one_counts() -> None:
    waited = word(RAISED[56][0], RAISED[56][1], rank=1, time=1.0)
    assert classify(Evidence(words=[waited, word(*LOST, rank=0, time=2.0)])).kind == "hang"


def test_a_killed_worker_is_unknown_unless_memory_ran_out() -> None:
    killed = Word(signal=signal.SIGKILL, rank=1, pid=77, node="n2", time=1.0)
    lost = word(*LOST, rank=0, time=2.0)
    failure = classify(Evidence(words=[killed, lost]))
    assert failure == Failure("unknown", "rank 1 (process 77) was killed by SIGKILL", "SIGKILL", "n2", 1)
    counted = Word(signal=signal.SIGKILL, rank=1, pid=77, node="n2", oom_kills=1)
    by_kernel = Word(signal=9, rank=1, pid=77, kernel=("Memory cgroup out of memory: Killed process 77 (python)",))
    other = Word(signal=9, rank=1, pid=77, kernel=("Out of memory: Killed process 78 (firefox)",))
    for found in (Evidence(words=[counted]), Evidence(words=[by_kernel]), Evidence(words=[killed], oom_kills=1)):
        assert (classify(found).kind, "host" in classify(found).sentence) == ("out_of_memory", True)
    assert classify(Evidence(words=[other])).kind == "unknown"
    assert classify(Evidence(words=[killed], job=JobWord("OUT_OF_MEMORY"))).kind == "out_of_memory"
    # A helper that was killed for memory has nothing to do with a wrong config.
    config = Word(kind="config", message="wrong", exit=2)
    assert classify(Evidence(words=[config], oom_kills=1)).kind == "config"


def test_a_crash_is_named_and_an_abort_after_a_timeout_is_none() -> None:
    crash = Word(signal=signal.SIGSEGV, rank=2, pid=9, time=1.0)
    assert "SIGSEGV" in classify(Evidence(words=[crash, word(*LOST, time=2.0)])).sentence
    abort = Word(signal=signal.SIGABRT, rank=0, pid=9, time=1.0)
    assert classify(Evidence(words=[abort], logs={"err": TIMED_OUT})).kind == "hang"
    assert "SIGABRT" in classify(Evidence(words=[abort])).sentence
    # torchrun ends the others so.
    asked = Word(signal=signal.SIGTERM, rank=3, pid=10, time=0.5)
    assert classify(Evidence(words=[asked, crash])).rank == 2


def test_slurms_word_explains_lost_connections() -> None:
    lost = word(*LOST)
    down = classify(Evidence(words=[lost], job=JobWord("RUNNING", down=("n2",)), nodes=("n1", "n2")))
    assert (down.kind, down.node) == ("node", "n2")
    assert classify(Evidence(words=[lost], job=JobWord("NODE_FAIL"))).kind == "node"
    assert classify(Evidence(words=[lost], job=JobWord("RUNNING"))).kind == "network"
    by = classify(Evidence(job=JobWord("CANCELLED", by="1000", exit_code="0:15")))
    assert (by.kind, "uid 1000" in by.evidence) == ("cancelled", True)
    assert [classify(Evidence(job=JobWord(it))).kind for it in ("PREEMPTED", "TIMEOUT", "BOOT_FAIL", "FAILED")] == [
        "preemption",
        "time_limit",
        "node",
        "unknown",
    ]
    assert sentence_of_state("OUT_OF_MEMORY") == "the job took more host memory than it had"
    assert sentence_of_state("FAILED") is None


def test_our_own_errors_say_their_class_and_others_are_echoes() -> None:
    own = Word(kind="data", message="rows.jsonl:3: 'CUDA out of memory. Tried to allocate' is no role", rank=0, exit=4)
    failure = classify(Evidence(words=[own]))
    assert (failure.kind, failure.sentence) == ("data", own.message)
    echo = Word(message="rank 1 was killed", echo=True, time=0.0)
    assert classify(Evidence(words=[echo, own])).kind == "data"
    assert classify(Evidence(words=[Word(echo=True, exit=5)], reason="said")).kind == "checkpoint"
    hang = Word(kind="hang", message="rank 3 has not moved for 600 s, in all_reduce", rank=3, time=9.0)
    assert classify(Evidence(words=[word(*LOST, time=1.0), hang])).rank == 3


def test_the_errors_before_it_explain_one_that_says_nothing() -> None:
    error = Word(type="RuntimeError", message="saving failed", chain=(("OSError", "", errno.EDQUOT),), rank=0)
    assert classify(Evidence(words=[error])).kind == "disk"
    full = word("OSError", "", errno.ENOSPC)
    assert "another file" in classify(Evidence(words=[full], no_inodes=True)).sentence


@pytest.mark.parametrize(
    ("number", "in_job", "cancelled", "kind"),
    [
        (signal.SIGTERM, True, False, "preemption"),
        (signal.SIGUSR2, True, False, "time_limit"),
        (signal.SIGTERM, True, True, "cancelled"),
        (signal.SIGTERM, False, False, "cancelled"),
        (signal.SIGINT, True, False, "cancelled"),
        (0, True, False, "cancelled"),
    ],
)
def test_a_stop_is_told_by_who_asked(number: int, in_job: bool, cancelled: bool, kind: str) -> None:
    evidence = Evidence(state="stopped", reason="stopped at 3", number=number, in_job=in_job, cancelled=cancelled)
    assert (classify(evidence).kind, classify(evidence).sentence) == (kind, "stopped at 3")


def test_nothing_known_is_unknown() -> None:
    assert classify(Evidence()) == Failure("unknown", "it ended without a word")
    assert classify(Evidence(reason="said so")).facts()["sentence"] == "said so"


def test_a_gpu_error_in_the_kernels_log_is_ours_if_nobody_elses() -> None:
    mine = "NVRM: Xid (PCI:0000:01:00): 94, pid=77, name=python, Contained: SM (0x1)"
    bug = word("RuntimeError", "CUDA error: unspecified launch failure", pid=77)
    assert classify(Evidence(words=[bug], kernel=[mine])).kind == "node"
    assert classify(Evidence(words=[bug], kernel=[mine.replace("77", "78")])).kind == "unknown"
    at_worker = Word(
        type="RuntimeError", message="CUDA error: unspecified launch failure", pid=77, kernel=(mine,), node="n2"
    )
    found = classify(Evidence(words=[at_worker]))
    assert (found.kind, found.node) == ("node", "n2")


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("OSError: [Errno 28] No space left on device", "disk"),
        ("SafetensorError: Error while serializing: I/O error: No space left on device (os error 28)", "disk"),
        ("ValueError: a row reads [Errno 28] No space left on device", "unknown"),
        ("it ended without a word", "unknown"),
    ],
)
def test_where_nothing_could_be_left_the_reason_on_record_tells(reason: str, kind: str) -> None:
    """Not even a small file fits on a full disk."""
    assert classify(Evidence(reason=reason)).kind == kind
